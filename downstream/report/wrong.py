"""What one upstream gets right and another wrong, utterance by utterance."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from downstream.base import Count
from downstream.report.groups import grouped, results_of, version
from downstream.report.layout import as_csv, text, wrapped
from downstream.report.results import Result
from upstream.common.errors import UserError, near_miss

Side = Literal["A", "B"]


class Utterance(NamedTuple):
    """One test utterance; errors are means over the head seeds that both have."""

    id: str
    speaker: str
    reference: str
    a: str  # what most heads of A say
    b: str
    errors_a: float
    errors_b: float
    path: str  # of its audio, where the corpus still tells it

    @property
    def better(self) -> Side | None:
        """Who made fewer errors: of labels, whose majority of heads was right."""
        if self.errors_a == self.errors_b:
            return None
        return "A" if self.errors_a < self.errors_b else "B"


def compared(
    a: str,
    b: str,
    task: str,
    suite: str,
    results: Sequence[Result],
    paths: Mapping[str, str] = {},
) -> list[Utterance]:
    """All test utterances of a task, those that tell most first: A better, then B, then neither.

    Raises UserError for unknown names, different test sets and tasks that score trials.
    """
    sides = []
    for wanted in (a, b):
        mine = [r for r in results_of(wanted, results) if r.cell.suite == suite]
        here = [r for r in mine if r.cell.task == task]
        if not here:
            known = {r.cell.task for r in mine}
            raise UserError(f"{wanted} has no results in {suite}/{task}{near_miss(task, known)}")
        sides.append(grouped(here, version))
    shared = sides[0].keys() & sides[1].keys()
    if not shared:
        raise UserError(f"{suite}/{task}: {a} and {b} have different versions of it")
    newest = max(shared, key=lambda v: max(r.score.created for r in sides[0][v]))
    left, right = ({r.cell.seed: r for r in side[newest]} for side in sides)
    seeds = sorted(left.keys() & right.keys())
    if not seeds or left[seeds[0]].summary.test != right[seeds[0]].summary.test:
        raise UserError(f"{suite}/{task}: no head seed in common, or not the same test utterances")
    rows = [
        _utterance(x, y, paths.get(x[0].id, ""))
        for x, y in zip(_by_id([left[s] for s in seeds]), _by_id([right[s] for s in seeds]))
    ]
    rows.sort(key=lambda u: (-abs(u.errors_a - u.errors_b), u.id))
    return sorted(rows, key=lambda u: {"A": 0, "B": 1, None: 2}[u.better])


def render(a: str, b: str, rows: Sequence[Utterance], limit: int, form: str = "text") -> str:
    """Counts, then for each side the `limit` utterances that tell most."""
    better: dict[Side | None, list[Utterance]] = defaultdict(list)
    for row in rows:
        better[row.better].append(row)
    chosen = [*better["A"][:limit], *better["B"][:limit]]
    if form == "json":
        counts = {"a_better": len(better["A"]), "b_better": len(better["B"])}
        shown = [row._asdict() for row in chosen]
        return json.dumps({"a": a, "b": b, **counts, "same": len(better[None]), "rows": shown})
    if form == "csv":
        return as_csv(Utterance._fields, chosen)
    blocks = [
        f"A = {a}\nB = {b}\n{len(rows)} utterances: A makes fewer errors on {len(better['A'])}, "
        f"B on {len(better['B'])}, as many {len(better[None])}"
    ]
    sides: tuple[tuple[Side, str], ...] = (("A", "A better"), ("B", "B better"))
    for side, title in sides:
        if not better[side]:
            continue
        table = [[title, "reference", "A says", "B says", "errors A", "B", "audio"]]
        for u in better[side][:limit]:
            said = [_short(each) for each in (u.reference, u.a, u.b)]
            table.append([u.id, *said, f"{u.errors_a:g}", f"{u.errors_b:g}", u.path])
        blocks.append(text(table, 200))
    return "\n\n".join(blocks) + "\n\n" + wrapped(
        ["errors: the mean over the head seeds that both have; said: by most of these heads"]
    )  # fmt: skip


def _by_id(results: Sequence[Result]) -> list[list[Count]]:
    """The records of the first metric of each utterance, one of every head, in order of the ids."""
    found: dict[str, list[Count]] = defaultdict(list)
    for result in results:
        for record in result.predictions:
            if not isinstance(record, Count):
                raise UserError(f"{result.cell.task}: scores trials, not utterances")
            if record.metric in ("", result.score.metric):
                found[record.id].append(record)
    return [found[key] for key in sorted(found)]


def _utterance(a: Sequence[Count], b: Sequence[Count], path: str) -> Utterance:
    first = a[0]
    said, other = (Counter(r.hypothesis for r in s).most_common(1)[0][0] for s in (a, b))
    mine, theirs = (round(sum(r.errors for r in s) / len(s), 3) for s in (a, b))
    facts = (first.id, first.speaker, first.reference)
    return Utterance(*facts, said, other, mine, theirs, path)


def _short(said: str) -> str:
    said = " ".join(said.split())
    return said if len(said) <= 40 else f"{said[:39]}…"
