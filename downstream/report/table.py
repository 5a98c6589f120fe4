"""Rows to read: a suite as one table, two upstreams side by side, and what must be said of them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from downstream.report import superb
from downstream.report.compare import Comparison, Row, answers, differences, overall, scores
from downstream.report.groups import grouped, labels, name, results_of, version
from downstream.report.layout import TextTable, as_csv, markdown, noted, plain, text, wrapped
from downstream.report.pool import Pool
from downstream.report.published import NOTE, Published, beside, left_out
from downstream.report.results import Result, finite
from downstream.report.verdicts import SIGNIFICANT, Margin, answer_lines
from downstream.tasks.metrics import of_result, parted
from upstream.common import disk
from upstream.common.errors import UserError, near_miss

TASKS_ABREAST = 4  # what fits into 100 columns
SILENT = ("wer", "cer", "per")  # an empty answer has 100 % of errors
FEW = 4  # upstreams; from so many on, nine half-widths in ten are within 2.5 times (test_coverage)
HEARD = "†"  # marks the score of an upstream that has heard the answers

Format = Literal["text", "md", "csv", "json", "latex"]


class Table(NamedTuple):
    """Scores, then differences from each reference; and what could not be compared."""

    rows: list[Row]
    skipped: list[str]


def summary(
    results: Sequence[Result],
    suite: str,
    references: Sequence[str] = (),
    published: Sequence[Published] = (),
    pool: Pool | None = None,
) -> Table:
    """The table of a suite, the upstreams in the order of `references` and then of their names.

    pool: of more results than the table shows, such as all of a results folder.

    A reference is a name or name@fingerprint; what is paired with an earlier one is not paired
    again. `published` rows come last, on tasks that are SUPERB's own. Raises UserError for an
    unknown suite or name.
    """
    mine = [r for r in results if r.cell.suite == suite]
    if not mine:
        known = {r.cell.suite for r in results}
        raise UserError(f"no results in suite {suite!r}{near_miss(suite, known)}")
    chosen = [name(results_of(reference, mine)[0]) for reference in references]
    called, pool = labels(mine), pool or Pool(mine)
    groups = {n: grouped(group, version) for n, group in grouped(mine, name).items()}
    order = list(dict.fromkeys([*chosen, *sorted(groups)]))
    table = Table([], [])
    for n in order:
        for _, group in sorted(groups[n].items()):
            table.rows.extend(scores(group, called, pool))
        table.rows.extend(overall(groups[n], called, pool))
    extra = beside(published, grouped(mine, version), called)
    table.rows.extend(extra)
    table.skipped.extend(left_out(published, {row.upstream for row in extra}))
    for i, reference in enumerate(dict.fromkeys(chosen)):
        for other in order[i + 1 :]:
            rows, refused = differences(groups[other], groups[reference], called, pool)
            lacking = sorted(groups[other].keys() - groups[reference].keys())
            refused += [f"{called[v]}: {called[reference]} has none" for v in lacking]
            table.rows.extend(rows)
            table.skipped.extend(f"{called[other]}, {reason}" for reason in refused)
    return table


def show(table: Table) -> str:
    """For the terminal: the answer, scores, differences from each reference, four tasks abreast."""
    blocks = [title + text(body) for title, body in _blocks(table.rows, TASKS_ABREAST)]
    answer = [wrapped(answer_lines(answers(table.rows)))]
    return "\n\n".join([*filter(None, answer), *blocks, wrapped(remarks(table))])


def write(
    root: Path,
    results: Sequence[Result],
    references: Sequence[str] = (),
    published: Sequence[Published] = (),
    margins: Mapping[str, Margin] = {},
) -> list[Path]:
    """Write `table.csv` (a line per Row) and `table.md`, every suite in both.

    Where a suite has no results of a reference, its differences are left out and a note says so:
    at the end of a long run a page without them is better than none. Raises UserError if `root`
    cannot be written.
    """
    rows, pages, pool = list[Row](), ["# Results"], Pool(results, margins)
    for suite, mine in sorted(grouped(results, lambda r: r.cell.suite).items()):
        known, unknown = [], []
        for reference in references:
            try:
                results_of(reference, mine)
                known.append(reference)
            except UserError as error:
                unknown.append(f"no differences: {error}")
        table = summary(mine, suite, known, published, pool)
        rows += table.rows
        blocks = [
            f"{plain(title)}\n{markdown(body)}"
            for title, body in _blocks(table.rows, len(table.rows))
        ]
        notes = [f"- {plain(note)}" for note in remarks(table) + unknown]
        said = "\n".join(f"- {plain(line.strip())}" for line in answer_lines(answers(table.rows)))
        pages += [f"## {plain(suite)}", *filter(None, [said]), *blocks, "\n".join(notes)]
    disk.write(root / "table.csv", as_csv(Row._fields, rows))
    disk.write(root / "table.md", "\n\n".join(pages) + "\n")
    return [root / "table.csv", root / "table.md"]


def render(comparison: Comparison, form: Format = "text") -> str:
    """A comparison for the terminal, a page, a program or a paper."""
    if form == "json":
        rows = [row._asdict() for row in comparison.rows]
        said = [answer._asdict() for answer in comparison.answers]
        content = {**comparison._asdict(), "rows": rows, "answers": said}
        return json.dumps(finite(content), indent=1)
    if form == "csv":
        return as_csv(Row._fields, comparison.rows)
    table = ["task|A|B|A - B|95 % interval|p|A is".split("|")]
    for r in comparison.rows:
        span = "unknown" if math.isnan(r.low) else f"[{r.low:+.2f}, {r.high:+.2f}]"
        a, b = (
            f"{score:.2f}{HEARD if seen else ''}"
            for score, seen in ((r.score, r.seen), (r.reference_score, r.reference_seen))
        )
        table.append([heading(r), a, b, f"{r.difference:+.2f}", span, p_text(r.p_holm), r.verdict])
    notes = [*answer_lines(comparison.answers), f"A = {comparison.a}", f"B = {comparison.b}"]
    notes += [*comparison.notes, *remarks(comparison)]
    if form not in get_args(Format):
        raise UserError(f"unknown format {form!r}{near_miss(form, get_args(Format))}")
    return noted(table, notes, form)


def _blocks(rows: Sequence[Row], abreast: int) -> Iterable[tuple[str, TextTable]]:
    """Scores, then under a title the differences from each reference; so many columns at once."""
    by_task = sorted(rows, key=lambda row: row.task)  # and then as the metrics of a task come
    columns = list(dict.fromkeys(map(heading, by_task)))
    for first in range(0, len(columns), abreast):
        part = columns[first : first + abreast]
        for reference in dict.fromkeys(row.reference for row in rows):
            mine = [row for row in rows if row.reference == reference]
            cells = {(row.upstream, heading(row)): cell_text(row) for row in mine}
            upstreams = dict.fromkeys(row.upstream for row in mine)
            body = [[u, *(cells.get((u, column), "-") for column in part)] for u in upstreams]
            title = f"minus {reference}, with p and verdict\n" if reference else ""
            if not reference:
                body += baselines(mine, part)
            yield title, [["upstream", *part], *body]


def baselines(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """Lines below the scores: what takes no upstream; none where no task is an accuracy."""
    table = []
    for label, field in (("(chance)", "chance"), ("(majority class)", "majority")):
        levels = {heading(row): getattr(row, field) for row in rows if row.chance == row.chance}
        if any(column in levels for column in columns):
            cells = [f"{levels[c]:.2f}" if c in levels else "-" for c in columns]
            table.append([label, *cells])
    return table


def at_floor(row: Row) -> str:
    """Why a score says nothing of its upstream: its interval, or without one the score, reaches
    what takes no upstream."""
    if row.reference:
        return ""
    low, high = (row.score if math.isnan(end) else end for end in (row.low, row.high))
    floor = max(row.chance, row.majority)
    if low <= floor:
        return f"at chance: no better than always the most frequent class ({floor:.1f})"
    if row.metric in SILENT and high >= 100:
        return "nothing learnt: no better than saying nothing (100)"
    return ""


def cell_text(row: Row) -> str:
    """`5.75 ±0.40`, or of a difference `+0.31 ±0.40 p .120` and below it the verdict."""
    value = row.difference if row.reference else row.score
    half = half_text(row)
    if not row.reference:
        return f"{value:.2f} {half}{HEARD if row.seen else ''}"
    p = p_text(row.p_holm)
    value = round(value, 2) + 0.0  # no -0.00
    return f"{value:+.2f} {half}{p and ' p ' + p}\n{row.verdict}"


def half_text(row: Row) -> str:
    """`±0.40`; of a score whose interval ends at the end of its scale `[57.0, 100.0]`."""
    value = row.difference if row.reference else row.score
    below, above = value - row.low, row.high - value
    if math.isnan(below):
        return "±?"
    if abs(above - below) > 1e-6 * max(below, above):
        return f"[{row.low:.1f}, {row.high:.1f}]"
    return f"±{below:.2f}"


def heading(row: Row) -> str:
    """`asr WER ↓`"""
    if row.metric == superb.METRIC:
        return f"{row.task} ↑"
    metric = of_result(row.metric, row.better)
    return f"{row.task} {metric.label} {metric.arrow}"


def p_text(p: float) -> str:
    """`.012`, `<.001`, or nothing."""
    if math.isnan(p):
        return ""
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def remarks(table: Table | Comparison) -> list[str]:
    """What a reader must know to read the numbers, one line each."""
    rows = table.rows
    paired = [row for row in rows if row.reference and not row.note.startswith(NOTE)]
    seeds = {row.seeds for row in rows} - {0}
    sample = "only (one head seed)" if seeds == {1} else "and head seeds"
    notes = [f"intervals: 95 %, t over speakers (or folds) {sample}"] if seeds else []
    pooled = [row.pooled for row in rows if row.pooled]
    if pooled:
        few = "; of so few it is known poorly, and intervals vary" if min(pooled) < FEW else ""
        notes.append(
            "how far head seeds lie apart is taken from all upstreams with results on a task "
            f"(their number: {_span(pooled)}{few}): a further one moves intervals and p a little"
        )
    if paired:
        notes += [
            "differences: paired by utterance; p: Holm-adjusted for the tasks of the two upstreams",
            f"better, worse: p < {SIGNIFICANT}; intervals are not adjusted, one may leave out 0 at "
            "a larger p",
            f"kept: not worse by the margin, {_margins(paired)} (one-sided p < {SIGNIFICANT}, Holm "
            "over the same tasks); slightly worse: a difference, but within it",
        ]
    if any(row.metric == superb.METRIC for row in rows):
        notes.append(
            f"{superb.METRIC}: 0 is FBANK, 1000 the best upstream by the constants named beside it "
            "(results/published/constants.csv); its p is not adjusted"
        )
    for task in sorted({row.task for row in rows}):
        mine = [row for row in rows if row.task == task and row.seeds]
        if not mine:
            continue
        counts = [
            f"{_span([row.utterances for row in mine])} utterances",
            f"{_span([row.clusters for row in mine])} {mine[0].unit}",
            f"{_span([row.seeds for row in mine])} seeds",
        ]
        sizes = [round(row.detectable, 1) for row in mine if not math.isnan(row.detectable)]
        power = f"; a verdict in 80 % of cases from {_span(sizes)} points" if sizes else ""
        notes.append(f"{task}: {', '.join(counts)}{power}")
    for r in rows:
        if r.groups and not r.reference:
            notes.append(f"{r.upstream} {heading(r)[:-2]}: {r.groups}")
    places: dict[str, dict[str, None]] = defaultdict(dict)  # why -> where, each once
    for r in rows:
        for why in filter(None, (r.note, at_floor(r))):
            places[why][f"{r.upstream} {r.task}"] = None
        for upstream, seen in ((r.upstream, r.seen), (r.reference, r.reference_seen)):
            if seen:
                why = f"fine-tuning had the labels of {100 * seen:.0f} % of the test audio"
                place = f"{HEARD} {upstream} {r.task}"
                places[f"{why}: no evidence of generalisation"][place] = None
    for why, where in places.items():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        notes.append(f"{', '.join([*where][:3])}{more}: {why}")
    return notes + [f"not compared: {line}" for line in table.skipped]


def _margins(rows: Sequence[Row]) -> str:
    """`asr 2.5, er 1.9 points`"""
    tasks: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if not math.isnan(row.margin) and not parted(row.metric)[1]:
            tasks[heading(row)[:-2]].append(float(f"{row.margin:.2g}"))
    shown = ", ".join(f"{task} {_span(sizes)}" for task, sizes in sorted(tasks.items()))
    return f"{shown} points" if shown else "of which none can be said"


def _span(values: Sequence[float]) -> str:
    """`3`, or `2-3`."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
