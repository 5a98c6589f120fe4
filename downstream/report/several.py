"""Several upstreams at once: which of them cannot be told apart, task by task.

All pairs are compared as `compare` does it; p, of a difference as of *kept*, is Holm-adjusted over
the pairs of a task, for the choice is among all of them. The sentences are those of `compare` with
the first upstream, and adjusted as there. Letters (compact letter display, Piepho 2004): two
upstreams share a letter if and only if no difference between them is shown.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from downstream.report import published
from downstream.report.compare import Row, answers, between, verdict_of
from downstream.report.groups import grouped, results_of, version
from downstream.report.layout import as_csv, noted
from downstream.report.pool import Pool
from downstream.report.results import Result, finite
from downstream.report.statistics import holm
from downstream.report.table import heading
from downstream.report.verdicts import SIGNIFICANT, Answer, Margin, answer_lines

MOST = 200  # groups of a task; where there are more, letters are not the fewest of all
Group = frozenset[int]


class Place(NamedTuple):
    """One upstream on one metric of one task."""

    task: str
    upstream: str
    score: float
    letters: str  # shared: not told apart; empty: some difference has no p
    speakers: int
    utterances: int


class Several(NamedTuple):
    """Many upstreams."""

    places: list[Place]  # the best first
    pairs: list[Row]  # p adjusted over a task's
    skipped: list[str]  # what could not be compared
    answers: list[Answer]  # of all others against the first upstream


def several(
    names: Sequence[str], results: Sequence[Result], margins: Mapping[str, Margin] = {}
) -> Several:
    """Every upstream with every other.

    Raises UserError for unknown names.
    """
    by_task: dict[str, list[tuple[int, int, Row]]] = defaultdict(list)
    skipped: list[str] = []
    measured = [name for name in names if not name.startswith(published.PREFIX)]
    sides = {name: grouped(results_of(name, results), version) for name in measured}
    pool, said = Pool(results, margins), list[Answer]()
    for i, j in combinations(range(len(names)), 2):
        numbers = [name.startswith(published.PREFIX) for name in (names[i], names[j])]
        if all(numbers):
            continue
        if any(numbers):
            pair = published.compare(names[i], names[j], results)
        else:
            pair = between(names[i], names[j], sides[names[i]], sides[names[j]], pool)
            if i == 0:
                back = between(names[j], names[i], sides[names[j]], sides[names[i]], pool)
                said += answers(back.rows)
        skipped += [f"{names[i]}, {names[j]}: {line}" for line in pair.skipped]
        for row in pair.rows:
            by_task[heading(row)].append((i, j, row))
    places, rows = list[Place](), list[Row]()
    for task, pairs in sorted(by_task.items()):
        adjusted = holm([row.p for *_, row in pairs])
        kept = holm([row.p_kept for *_, row in pairs])
        for (*_, row), p, p_kept in zip(pairs, adjusted, kept):
            row = row._replace(p_holm=p, p_kept_holm=p_kept, needed="")
            rows.append(row if math.isnan(p) else row._replace(verdict=verdict_of(row)))
        facts: dict[int, tuple[float, Row]] = {}
        for i, j, row in pairs:
            facts.setdefault(i, (row.score, row))
            facts.setdefault(j, (row.reference_score, row))
        apart = {(i, j) for (i, j, _), p in zip(pairs, adjusted) if p < SIGNIFICANT}
        known = {(i, j) for (i, j, _), p in zip(pairs, adjusted) if not math.isnan(p)}
        sign = -1 if pairs[0][2].better == "higher" else 1
        order = sorted(facts, key=lambda i: (sign * facts[i][0], i))
        tested = [i for i in order if not names[i].startswith(published.PREFIX)]
        whole = known == set(combinations(sorted(tested), 2))
        letters = letters_of(tested, apart) if whole else {}
        for i in order:
            score, row = facts[i]
            facts_of = (score, letters.get(i, ""), row.clusters, row.utterances)
            places.append(Place(task, names[i], *facts_of))
    return Several(places, rows, skipped, said)


def letters_of(order: Sequence[int], apart: set[tuple[int, int]]) -> dict[int, str]:
    """Letters by member, from the best; `apart`: the pairs (smaller first) that differ.

    Members of a letter are all alike, and whoever are alike have one in common.
    """
    groups = _all_groups(order, apart)
    if groups is None:
        groups = _enough_groups(order, apart)
    place = {i: k for k, i in enumerate(order)}
    groups.sort(key=lambda g: sorted(place[i] for i in g))
    names = [_letter(k) for k in range(len(groups))]
    return {i: "".join(n for n, g in zip(names, groups) if i in g) for i in order}


def _all_groups(order: Sequence[int], apart: set[tuple[int, int]]) -> list[Group] | None:
    """Every largest group of members that are alike; None if there are more than MOST of them.

    Insert and absorb (Piepho 2004): begin with one group; each difference splits every group that
    holds both; a group inside another goes. There may be exponentially many.
    """
    groups = [frozenset(order)]
    for i, j in sorted(apart):
        whole = [g for g in groups if i in g and j in g]
        parts = {part for g in whole for part in (g - {i}, g - {j})}
        kept = [g for g in groups if not (i in g and j in g)]
        new = [
            part for part in parts
            if not any(part <= g for g in kept) and not any(part < other for other in parts)
        ]  # fmt: skip
        groups = kept + new  # what was not split lies in no part: it would have lain in its whole
        if len(groups) > MOST:
            return None
    return groups


def _enough_groups(order: Sequence[int], apart: set[tuple[int, int]]) -> list[Group]:
    """Groups of members that are alike, at least one for every pair that is: at most one a pair."""
    alike = {i: {j for j in order if j != i and (min(i, j), max(i, j)) not in apart} for i in order}
    groups, open_pairs = list[Group](), {i: set(others) for i, others in alike.items()}
    for i in order:
        if not alike[i]:
            groups.append(frozenset({i}))
        while open_pairs[i]:
            j = next(k for k in order if k in open_pairs[i])
            members, candidates = {i, j}, alike[i] & alike[j]
            for k in order:
                if k in candidates:
                    members.add(k)
                    candidates &= alike[k]
            for member in members:
                open_pairs[member] -= members
            groups.append(frozenset(members))
    return groups


def _letter(number: int) -> str:
    """a, b, ..., z, a1, b1, ..."""
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def render(
    names: Sequence[str],
    found: Several,
    notes: Sequence[str],
    form: str = "text",
) -> str:
    """A row for each upstream, a column for each task; csv has the pairs."""
    places, rows, skipped, sentences = found
    if form == "csv":
        return as_csv(Row._fields, rows)
    if form == "json":
        content = {"places": [p._asdict() for p in places], "pairs": [r._asdict() for r in rows]}
        content["answers"] = [answer._asdict() for answer in sentences]
        return json.dumps(finite({**content, "notes": [*notes, *skipped]}), indent=1)
    tasks = list(dict.fromkeys(place.task for place in places))
    cells = {(p.upstream, p.task): f"{p.score:.2f} {p.letters}".strip() for p in places}
    table = [["upstream", *tasks], *([n, *(cells.get((n, t), "-") for t in tasks)] for n in names)]
    said = [
        *answer_lines(sentences),
        "no shared letter: a difference is shown (p < "
        f"{SIGNIFICANT}, Holm over all pairs of a task); a shared letter: none is; no letter: a "
        "pair has no p, or the number is a published one",
        *(
            f"{task}: {p.utterances} utterances, {p.speakers} speakers or folds"
            for task, p in {place.task: place for place in places}.items()
        ),
        *notes,
        *(f"not compared: {line}" for line in skipped),
    ]
    return noted(table, said, form, 160)
