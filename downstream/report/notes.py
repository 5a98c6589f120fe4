"""What must be said beside the numbers of a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from downstream.base import METRICS
from downstream.report.compare import SIGNIFICANT, Row


def heading(row: Row) -> str:
    """`asr WER ↓`"""
    return f"{row.task} {METRICS[row.metric].label} {METRICS[row.metric].arrow}"


def mark(seen: float) -> str:
    """A dagger on the score of an upstream that has heard the answers."""
    return "†" if seen else ""


def p_value(p: float) -> str:
    """`.012`, `<.001`, or nothing."""
    if math.isnan(p):
        return ""
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def notes_on(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to read the numbers, one line each."""
    sample = "only (one head seed)" if {row.seeds for row in rows} == {1} else "and head seeds"
    notes = [f"intervals: 95 %, t over speakers (or folds) {sample}"]
    if any(row.reference for row in rows):
        notes += [
            "differences: paired by utterance; p: Holm-adjusted for the tasks of the two upstreams",
            f"better, worse: p < {SIGNIFICANT}; intervals are not adjusted, one may leave out 0 at "
            "a larger p",
        ]
    for task in sorted({row.task for row in rows}):
        mine = [row for row in rows if row.task == task]
        line = ", ".join(
            f"{_span(values)} {what}"
            for what, values in (
                ("utterances", [r.utterances for r in mine]),
                (mine[0].unit, [r.clusters for r in mine]),
                ("seeds", [r.seeds for r in mine]),
            )
        )
        sizes = [round(r.detectable, 1) for r in mine if not math.isnan(r.detectable)]
        power = f"; 80 % power from a difference of {_span(sizes)}" if sizes else ""
        notes.append(f"{task}: {line}{power}")
    places: dict[str, dict[str, None]] = defaultdict(dict)  # why -> where, each once
    for r in rows:
        if r.note:
            places[r.note][f"{r.upstream} {r.task}"] = None
        for upstream, seen in ((r.upstream, r.seen), (r.reference, r.reference_seen)):
            if seen:
                places[_heard(seen)][f"{mark(seen)} {upstream} {r.task}"] = None
    for why, where in places.items():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        notes.append(f"{', '.join([*where][:3])}{more}: {why}")
    return notes


def _heard(seen: float) -> str:
    share = f"{100 * seen:.0f} % of the test audio"
    return f"fine-tuning had the labels of {share}: no evidence of generalisation"


def _span(values: Sequence[float]) -> str:
    """`3`, or `2-3`."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
