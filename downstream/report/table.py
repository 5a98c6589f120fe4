"""Rows to read: a suite as one table, two upstreams side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from downstream.report.compare import Comparison, Row, differences, scores
from downstream.report.groups import grouped, labels, name, of_upstream, version
from downstream.report.layout import TextTable, as_csv, latex, markdown, text, wrapped
from downstream.report.notes import heading, mark, notes_on, p_value
from downstream.report.results import Result, finite
from upstream.common import disk
from upstream.common.errors import UserError, near_miss

TASKS_ABREAST = 4  # what fits into 100 columns

Format = Literal["text", "md", "csv", "json", "latex"]


class Table(NamedTuple):
    """Scores, then differences from each reference; and what could not be compared."""

    rows: list[Row]
    skipped: list[str]


def summary(results: Sequence[Result], suite: str, references: Sequence[str] = ()) -> Table:
    """The table of a suite, the upstreams in the order of `references` and then of their names.

    A reference is a name or name@fingerprint; what is paired with an earlier one is not paired
    again. Raises UserError for an unknown suite or name.
    """
    mine = [r for r in results if r.cell.suite == suite]
    if not mine:
        known = {r.cell.suite for r in results}
        raise UserError(f"no results in suite {suite!r}{near_miss(suite, known)}")
    chosen = [name(of_upstream(mine, reference)[0]) for reference in references]
    called = labels(mine)
    groups = {n: grouped(group, version) for n, group in grouped(mine, name).items()}
    order = [*chosen, *(n for n in sorted(groups) if n not in chosen)]
    rows = [row for n in order for v in sorted(groups[n]) for row in scores(groups[n][v], called)]
    skipped = []
    for i, reference in enumerate(chosen):
        for other in order[i + 1 :]:
            more, refused = differences(groups[other], groups[reference], called)
            lacking = sorted(groups[other].keys() - groups[reference].keys())
            refused += [f"{called.task[v]}: {called.upstream[reference]} has none" for v in lacking]
            rows += more
            skipped += [f"not compared: {called.upstream[other]}, {line}" for line in refused]
    return Table(rows, skipped)


def show(table: Table) -> str:
    """For the terminal: scores, then differences from each reference, four tasks abreast."""
    columns = _columns(table)
    parts = [columns[i : i + TASKS_ABREAST] for i in range(0, len(columns), TASKS_ABREAST)]
    blocks = [f"{title}{text(body)}" for part in parts for title, body in _blocks(table, part)]
    return "\n\n".join([*blocks, wrapped(notes_on(table.rows) + table.skipped)])


def write(root: Path, results: Sequence[Result], references: Sequence[str] = ()) -> list[Path]:
    """Write `table.csv` (a line per Row) and `table.md`, every suite in both.

    Where a suite has no results of a reference, its differences are left out and a note says so:
    at the end of a long run a page without them is better than none. Raises UserError if `root`
    cannot be written.
    """
    rows, pages = list[Row](), ["# Results"]
    for suite, mine in sorted(grouped(results, lambda r: r.cell.suite).items()):
        known, notes = [], []
        for reference in references:
            try:
                of_upstream(mine, reference)
                known.append(reference)
            except UserError as error:
                notes.append(f"no differences: {error}")
        table = summary(mine, suite, known)
        rows += table.rows
        blocks = [f"{title}\n{markdown(body)}" for title, body in _blocks(table, _columns(table))]
        notes = notes_on(table.rows) + table.skipped + notes
        pages += [f"## {suite}", *blocks, "\n".join(f"- {note}" for note in notes)]
    disk.write(root / "table.csv", as_csv(Row._fields, rows))
    disk.write(root / "table.md", "\n\n".join(pages) + "\n")
    return [root / "table.csv", root / "table.md"]


def render(comparison: Comparison, form: Format = "text") -> str:
    """A comparison for the terminal, a page, a program or a paper."""
    if form == "json":
        rows = [row._asdict() for row in comparison.rows]
        return json.dumps(finite({**comparison._asdict(), "rows": rows}), indent=1)
    if form == "csv":
        return as_csv(Row._fields, comparison.rows)
    table = ["task|A|B|A - B|95 % interval|p|A is".split("|")]
    for r in comparison.rows:
        span = "unknown" if math.isnan(r.low) else f"[{r.low:+.2f}, {r.high:+.2f}]"
        marked = f"{r.score:.2f}{mark(r.seen)}", f"{r.reference_score:.2f}{mark(r.reference_seen)}"
        shown = [heading(r), *marked, f"{r.difference:+.2f}", span, p_value(r.p_holm), r.verdict]
        table.append(shown)
    skipped = [f"not compared: {line}" for line in comparison.skipped]
    notes = [f"A = {comparison.a}", f"B = {comparison.b}", *notes_on(comparison.rows), *skipped]
    if form == "text":
        return f"{text(table)}\n\n{wrapped(notes)}"
    if form == "md":
        return "\n".join([markdown(table), "", *(f"- {note}" for note in notes)])
    if form == "latex":
        return "\n".join([latex(table), *(f"% {note}" for note in notes)])
    raise UserError(f"unknown format {form!r}{near_miss(form, get_args(Format))}")


def _columns(table: Table) -> list[str]:
    return sorted({heading(row) for row in table.rows})


def _blocks(table: Table, columns: Sequence[str]) -> list[tuple[str, TextTable]]:
    """Scores, then under a title the differences from each reference."""
    blocks = list[tuple[str, TextTable]]()
    for reference in dict.fromkeys(row.reference for row in table.rows):
        mine = [row for row in table.rows if row.reference == reference]
        cells = {(row.upstream, heading(row)): _cell(row) for row in mine}
        body = [
            [upstream, *(cells.get((upstream, column), "-") for column in columns)]
            for upstream in dict.fromkeys(row.upstream for row in mine)
        ]
        title = f"minus {reference}, with p and verdict\n" if reference else ""
        blocks.append((title, [["upstream", *columns], *body]))
    return blocks


def _cell(row: Row) -> str:
    """`5.75 ±0.40`, or of a difference `+0.31 ±0.40 p .120` and below it the verdict."""
    value = row.difference if row.reference else row.score
    half = "±?" if math.isnan(row.low) else f"±{value - row.low:.2f}"  # intervals are symmetric
    if not row.reference:
        return f"{value:.2f} {half}{mark(row.seen)}"
    p = p_value(row.p_holm)
    value = round(value, 2) + 0.0  # no -0.00
    return f"{value:+.2f} {half}{p and ' p ' + p}\n{row.verdict}"
