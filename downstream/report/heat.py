"""Heat maps across tasks: of upstreams, or of ways of fine-tuning with their seeds together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from downstream.report.compare import Row
from downstream.report.figures import (
    MOST_ROWS,
    Figure,
    Panel,
    Values,
    alt,
    by_heading,
    gain,
    left_out_of,
    paired_rows,
    says,
    short_names,
)
from downstream.report.matrix import Cell, Line, Matrix
from downstream.report.table import heading

MARKS = {"better": " ▲", "kept": " =", "slightly worse": " ▽", "worse": " ▼", "seen": " †"}
LONGEST = 40  # letters of a way
FULL = 50.0  # per cent of errors more or fewer: the deepest colour
READING = (
    "(▲ better, = kept, ▽ slightly worse, ▼ worse, no mark: undecided). Colour: purple makes fewer "
    "errors, orange more, full at half as many again or fewer."
)


def heat(rows: Sequence[Row], reference: str, suite: str) -> Figure | None:
    """What each upstream wins or loses in each task."""
    mine = [r for r in paired_rows(rows, reference) if math.isfinite(gain(r))]
    tasks = list(by_heading(mine))
    named = list(dict.fromkeys(r.upstream for r in mine))
    if len(tasks) < 2 or not mine:
        return None
    shown, short = named[:MOST_ROWS], short_names(named)
    values = [
        {"name": short[r.upstream], "task": heading(r), "gain": gain(r),
         "text": f"{round(r.difference, 1) + 0.0:+.1f}{MARKS.get(r.verdict, '')}", "says": says(r)}
        for r in mine
        if r.upstream in shown
    ]  # fmt: skip
    return Figure(
        f"{suite}-across-tasks",
        "Across tasks",
        f"Points minus {reference} {READING}",
        f"{len(named)} upstreams in {len(tasks)} tasks; the numbers stand in the table above",
        [_panel(values, [short[n] for n in shown], tasks)],
        left_out_of(named, MOST_ROWS),
    )


def crossed(found: Matrix) -> Figure | None:
    """What each way of fine-tuning wins or loses in each task."""
    rows = {_name(line): line for line in found.lines}
    tasks = [f"{task} {metric}" for task, metric in found.tasks.items()]
    if len(tasks) < 2:
        return None
    shown, short = list(rows)[:MOST_ROWS], short_names(list(rows), LONGEST)
    values = [
        {"name": short[n], "task": f"{task} {found.tasks[task]}", "gain": cell.gain,
         "text": f"{round(cell.difference, 1) + 0.0:+.1f}{MARKS.get(_verdict(cell), '')}",
         "says": f"{n}, {task}: {cell.score:.2f}, minus {found.base} {cell.difference:+.2f}, "
         f"{cell.verdict or 'no verdict'}"}
        for n in shown
        for task, cell in rows[n].cells.items()
        if math.isfinite(cell.gain)
    ]  # fmt: skip
    if not values:
        return None
    return Figure(
        f"{found.suite}-ways-across-tasks",
        "Ways of fine-tuning across tasks",
        f"Fine-tuned on, strategy and method, α, fine-tuning seeds; points minus {found.base} "
        f"{READING} †: fine-tuning had labels of this test audio.",
        f"{len(rows)} ways in {len(tasks)} tasks",
        [_panel(values, [short[n] for n in shown], tasks)],
        left_out_of(list(rows), MOST_ROWS),
    )


def _name(line: Line) -> str:
    seeds = f", {line.seeds} seeds" if line.seeds > 1 else ""
    return f"{line.tuned_on}: {line.way}, α {line.alpha or '?'}{seeds}"


def _verdict(cell: Cell) -> str:
    return "seen" if cell.seen else cell.verdict


def _panel(values: Values, names: Sequence[str], tasks: Sequence[str]) -> Panel:
    values = [{**v, "gain": max(-FULL, min(FULL, v["gain"]))} for v in values]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("task:N", sort=tasks, title=None,
                axis=alt.Axis(orient="top", labelAngle=-30, labelAlign="left", domain=False)),
        y=alt.Y("name:N", sort=list(names), title=None,
                axis=alt.Axis(domain=False, labelLimit=290)),
    )  # fmt: skip
    scale = alt.Scale(domain=[-FULL, 0, FULL], range=["#E66100", "#f7f7f7", "#5D3A9B"])
    boxes = base.mark_rect(stroke="white").encode(
        color=alt.Color("gain:Q", scale=scale, legend=None), description="says:N"
    )
    dark = "abs(datum.gain) > 42 ? 'white' : '#222'"
    text = base.mark_text(fontSize=11, color=alt.ExprRef(dark)).encode(text="text:N")
    return alt.layer(boxes, text).properties(width=alt.Step(62), height=alt.Step(22))
