"""The cross-task matrix for the terminal, a page, a program or a paper."""

from __future__ import annotations

import json
import math

from downstream.report.layout import TextTable, as_csv, noted
from downstream.report.matrix import Cell, Matrix
from downstream.report.published import NOTE
from downstream.report.results import finite
from downstream.report.table import HEARD, Format
from downstream.report.verdicts import SEEDS, SIGNIFICANT, answer_lines

MARKS = {
    "better": "+", "worse": "-", "kept": "=", "slightly worse": "=-", "undecided": "?",
    "seen": HEARD, "withheld": "",
}  # fmt: skip


def render(found: Matrix, form: Format = "text") -> str:
    """For the terminal, a page, a program or a paper."""
    if form == "json":
        lines = [
            {**line._asdict(), "cells": {t: c._asdict() for t, c in line.cells.items()}}
            for line in found.lines
        ]
        said = [answer._asdict() for answer in found.answers]
        return json.dumps(finite({**found._asdict(), "lines": lines, "answers": said}), indent=1)
    if form == "csv":
        head = ["tuned_on", "way", "alpha", "seeds", "task", *Cell._fields]
        head += ["mean_gain", "worst", "layers", "seconds", "peak_gb", "stored_mb"]
        rows = [
            [*line[:4], task, *cell, line.gain, *line[7:]]
            for line in found.lines
            for task, cell in line.cells.items()
        ]
        return as_csv(head, rows)
    return noted(text_table(found), notes(found), form, 200)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _text(cell: Cell | None) -> str:
    """`60.05 (+1.47 ±0.60 -)`"""
    if cell is None:
        return "-"
    if math.isnan(cell.difference):
        return f"{cell.score:.2f}{HEARD if cell.seen else ''}"
    half = "±?" if math.isnan(cell.low) else f"±{cell.difference - cell.low:.2f}"
    mark = f" {MARKS[cell.verdict]}" if MARKS.get(cell.verdict) else ""
    heard = HEARD if cell.seen and HEARD not in mark else ""
    return f"{cell.score:.2f} ({cell.difference:+.2f} {half}{mark}){heard}"


def text_table(found: Matrix) -> TextTable:
    """A row for each way, the base first."""
    columns = [f"{task} {metric}" for task, metric in found.tasks.items()]
    totals = list(dict.fromkeys(t for scores in (found.superb, *(x.superb for x in found.lines))
                                for t in scores))  # fmt: skip
    table = [["tuned on", "strategy", "alpha", "seeds", *columns, *totals, "gain", "worst",
              "layers moved", "cost"]]  # fmt: skip
    base = [f"{found.scores[task]:.2f}" for task in found.tasks]
    base += [_number(found.superb.get(total)) for total in totals]
    table.append(["nothing", found.base, "", "", *base, "", "", "", ""])
    for line in found.lines:
        cells = [_text(line.cells.get(task)) for task in found.tasks]
        cells += [_number(line.superb.get(total)) for total in totals]
        gain = "" if math.isnan(line.gain) else f"{line.gain:+.1f} %"
        cost = f"{line.seconds:.0f} s, {line.peak_gb:.1f} GB, {line.stored_mb:.1f} MB"
        cost = "published" if math.isnan(line.seconds) else cost
        facts = [line.tuned_on, line.way, line.alpha, str(line.seeds or "")]
        table.append([*facts, *cells, gain, line.worst, line.layers, cost])
    return table


def notes(found: Matrix) -> list[str]:
    """What a reader must know."""
    margins: dict[str, set[float]] = {}
    for line in found.lines:
        for task, cell in line.cells.items():
            if not math.isnan(cell.margin):
                margins.setdefault(task, set()).add(float(f"{cell.margin:.2g}"))
    shown = ", ".join(f"{task} {max(sizes):g}" for task, sizes in sorted(margins.items()))
    said = [
        *answer_lines(found.answers),
        f"in brackets: minus {found.base}, with 95 % intervals over speakers (or folds), "
        f"fine-tuning and head seeds; + better, - worse (p < {SIGNIFICANT}, Holm over the "
        f"tasks of a row), = kept: not worse by {shown} points (one-sided, likewise), =- both, "
        f"? undecided; no mark: fewer than {SEEDS} fine-tuning seeds, no verdict",
        f"gain: mean relative reduction of errors over the tasks without {HEARD}; {HEARD}: "
        "fine-tuning had labels of this test audio; worst: what lost most, in points",
        *(f"{line.way}: {NOTE}" for line in found.lines if not line.seeds),
        *found.notes,
    ]
    if found.superb:
        about = (
            "superb_score: by the constants named beside it, the mean over seeds; a task that was "
            "heard counts in it as in the literature"
        )
        said.insert(-len(found.notes) or len(said), about)
    return said
