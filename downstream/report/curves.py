"""Figures of curves: along alpha, by hidden state, and weights against features."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from downstream.report import superb
from downstream.report.compare import Row
from downstream.report.figures import (
    INK,
    MOST_DOTS,
    MOST_LINES,
    MOST_PANELS,
    Figure,
    Panel,
    Values,
    alt,
    gain,
    known_or,
    left_out_of,
    lines,
    paired_rows,
    says,
    short_names,
)  # fmt: skip
from downstream.report.groups import Name
from downstream.report.layers import LayerWeights
from downstream.report.lineage import Lineage
from downstream.report.table import heading
from upstream.measures import MEASURES
from upstream.similarity import Similarity

BARE = "nothing learnt"  # the floor of a similarity


def alphas(
    rows: Sequence[Row], reference: str, lineage: Mapping[Name, Lineage], suite: str
) -> list[Figure]:
    """Scores along alpha, and the task that was fine-tuned on against all others."""
    mine = paired_rows(rows, reference)
    prints = {r.fingerprint for r in mine}
    known = {print_: of for (_, print_), of in lineage.items() if print_ in prints}
    merges = [of for of in known.values() if of.way and of.alpha is not None]
    several = Counter(of.curve for of in merges if of.curve)
    found = [curve for curve, count in several.items() if count > 1][:MOST_LINES]
    names = _curves([next(of for of in merges if of.curve == curve) for curve in found])
    panels: dict[str, list[dict[str, Any]]] = {}
    front: list[dict[str, Any]] = []
    tuned_on = [of.tuned_on for of in merges if of.curve in found]
    better = {heading(r): r.better for r in mine}
    for name, curve in zip(names, found):
        tuned = curve[1]
        at: dict[float, dict[str, Row]] = {}  # alpha -> heading -> row
        for r in mine:
            of = known.get(r.fingerprint)
            if of and of.alpha is not None and of.tuned == tuned and of.curve in (curve, None):
                at.setdefault(of.alpha, {}).setdefault(heading(r), r)
        for head in better:
            points = [_point(a, each[head], name) for a, each in at.items() if head in each]
            if len(points) > 1:
                zero = [] if head in at.get(0, {}) else [_origin(name, reference)]
                panels[head] = panels.get(head, []) + zero + points
        goal = next(of.tuned_on for of in merges if of.curve == curve)
        points = [p for a, each in at.items() for p in _front(list(each.values()), goal, name, a)]
        if points:
            front += points + ([] if 0 in at else [_origin(name, reference)])
    figures = []
    if panels:
        figures.append(
            Figure(
                f"{suite}-alpha",
                "Along α",
                f"α 0 is the pre-trained encoder, 1 the fine-tuned one. Points: score minus "
                f"{reference}, paired by utterance; bars: 95 % interval.",
                "; ".join(v["says"] for each in panels.values() for v in each[:20]),
                [
                    curve_panel(points, names, head, "α", f"points, {arrow} better", "alpha")
                    for head, points in sorted(panels.items())[:MOST_PANELS]
                    for arrow in ["↑" if better[head] == "higher" else "↓"]
                ],
                curves=names,
            )
        )
    if len(front) > 1:
        target = ", ".join(sorted({task for tasks in tuned_on for task in tasks}))
        figures.append(_front_figure(front, names, target, reference, suite))
    return figures


def _curves(merges: Sequence[Lineage]) -> list[str]:
    """What each grew from, in a few words; no two alike."""
    names = [
        f"{'+'.join(of.tuned_on) or 'no labels'}: {of.strategy}, {json.loads(of.way)[0]}, seed "
        f"{' '.join(map(str, of.seeds)) or '?'}"
        for of in merges
    ]
    return [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]


def _point(alpha: float, row: Row, curve: str) -> dict[str, Any]:
    low, high = known_or(row.low, row.difference), known_or(row.high, row.difference)
    return {"curve": curve, "alpha": alpha, "y": row.difference, "low": low, "high": high,
            "says": f"alpha {alpha:g}: {says(row)}"}  # fmt: skip


def _origin(curve: str, reference: str) -> dict[str, Any]:
    """The reference itself, where it was not scored again as a merge of alpha 0."""
    return {"curve": curve, "alpha": 0.0, "order": 0.0, "text": "0", "x": 0.0, "y": 0.0,
            "low": 0.0, "high": 0.0, "says": f"alpha 0: {reference}"}  # fmt: skip


def _front(
    rows: Sequence[Row], tuned_on: Sequence[str], curve: str, alpha: float
) -> list[dict[str, Any]]:
    """One point: gains on the target task (of several the mean) and, on average, on the others.

    Intervals of the mean take tasks as independent and the reference's own errors as fixed.
    """
    firsts = {r.task: r for r in reversed(rows) if r.metric != superb.METRIC}
    known = {task: r for task, r in firsts.items() if math.isfinite(gain(r))}
    target = [gain(r) for task, r in known.items() if task in tuned_on]
    others = [r for task, r in known.items() if task not in tuned_on and not r.seen]
    if not target or not others:
        return []
    halves = [abs(gain(r, known_or(r.high - r.difference, 0.0))) for r in others]
    half = math.hypot(*halves) / len(others)
    x, y = sum(target) / len(target), sum(map(gain, others)) / len(others)
    text = f"alpha {alpha:g}: target {x:+.1f} %, {len(others)} others {y:+.1f} % ±{half:.1f}"
    return [{"curve": curve, "text": f"{alpha:g}", "order": alpha, "x": x, "y": y, "low": y - half,
             "high": y + half, "says": text}]  # fmt: skip


def _front_figure(
    values: Values, names: Sequence[str], target: str, reference: str, suite: str
) -> Figure:
    base = alt.Chart(alt.Data(values=list(values)))
    x = alt.X("x:Q", title=f"fewer errors on {target}, % →", scale=alt.Scale(nice=True))
    zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(color="#666", strokeDash=[3, 2])
    colour = lines(names)
    panel = alt.layer(
        zero.encode(y="y:Q"),
        base.mark_rule(opacity=0.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
        base.mark_line(strokeWidth=1).encode(
            x=x, y="y:Q", order="order:Q", color=colour
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            x=x, y=alt.Y("y:Q", title="↑ fewer errors on the others, mean %"), color=colour,
            shape=lines(names, "shape"), description="says:N",
        ),
        base.mark_text(align="left", dx=7, dy=-7, fontSize=11, color=INK).encode(
            x=x, y="y:Q", text="text:N"
        ),
    ).properties(width=280, height=220)  # fmt: skip
    return Figure(
        f"{suite}-front",
        f"Fine-tuned on {target}: gain there against the others",
        f"Numbers are α. Right: fewer errors on {target} than {reference}; up: fewer on the other "
        "tasks, on average. Bars: 95 %, tasks taken as independent.",
        "; ".join(v["says"] for v in values),
        [panel],
        curves=names,
    )


def curve_panel(
    values: Values, names: Sequence[str], title: str, x_title: str, y_title: str, x: str
) -> Panel:
    """Lines with error bars of the `curve`s in values."""
    base = alt.Chart(alt.Data(values=list(values))).encode(
        x=alt.X(
            f"{x}:Q",
            title=x_title,
            axis=alt.Axis(labelAngle=0, tickMinStep=1 if x == "layer" else 0.25),
        ),
        color=lines(names),
    )
    return alt.layer(
        base.mark_rule(opacity=0.6).encode(
            y=alt.Y("low:Q", title=y_title, scale=alt.Scale(zero=False)), y2="high:Q"
        ),
        base.mark_line(strokeWidth=1.5).encode(y="y:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(
            y="y:Q", shape=lines(names, "shape"), description="says:N"
        ),
    ).properties(title=title, width=230, height=150)


def layer_weights(found: Sequence[LayerWeights], suite: str) -> Figure | None:
    """What share each hidden state has in the features of a head."""
    tested = Counter(each.upstream for each in found)
    named = [upstream for upstream, _ in tested.most_common()]  # first those with most tasks
    shown, short = named[:MOST_LINES], short_names(named)
    names = [short[n] for n in shown]
    tasks = sorted({each.task for each in found})
    panels = []
    for task in tasks[:MOST_PANELS]:
        values = [
            {"curve": short[each.upstream], "layer": i, "y": 100 * share, "low": 100 * low,
             "high": 100 * high,
             "says": f"{each.upstream}, hidden state {i}: {100 * share:.1f} % "
             f"({100 * low:.1f} to {100 * high:.1f} in {each.heads} heads)"}
            for each in found
            if each.task == task and each.upstream in shown
            for i, (share, low, high) in enumerate(each.shares)
        ]  # fmt: skip
        if values:
            panels.append(curve_panel(values, names, task, "hidden state", "share, %", "layer"))
    if not panels:
        return None
    return Figure(
        f"{suite}-layers",
        "Layer weights",
        "Each head weighs the hidden states: 0 is the CNN's output, the last the top layer's. "
        "Points: mean over heads; bars: smallest to largest.",
        f"shares of hidden states for {', '.join(tasks)}",
        panels,
        left_out_of(named, MOST_LINES) + left_out_of(tasks, MOST_PANELS, "tasks"),
        names,
    )


def similar(found: Sequence[Similarity], number: str) -> list[Figure]:
    """Hidden states against a reference's by layer, and with how far weights moved."""
    named = list(dict.fromkeys(each.other for each in found))
    short, reference = short_names([*named, BARE]), found[0].reference
    curves = [short[n] for n in [*named[:MOST_LINES], BARE]]
    dots = [short[n] for n in named[:MOST_DOTS]]
    by_layer, by_weights = [], []
    for measure, label in MEASURES.items():
        rows = [(each.other, each.measures.get(measure, [])) for each in found]
        rows.append((BARE, next((f.floor[measure] for f in found if measure in f.floor), [])))
        values = [
            {"curve": short[n], "layer": i, "y": e.value, "low": e.low, "high": e.high,
             "says": f"{n}, hidden state {i}: {e.value:.4f} ({e.low:.4f} to {e.high:.4f})"}
            for n, row in rows
            if short[n] in curves
            for i, e in enumerate(row)
            if math.isfinite(e.value)
        ]  # fmt: skip
        if values:
            by_layer.append(
                curve_panel(values, curves, label, "hidden state", "similarity", "layer")
            )
        values = [
            {"curve": short[each.other], "x": moved, "y": e.value, "low": e.low, "high": e.high,
             "says": f"{each.other}: weights {moved:.2f} %, {label} {e.value:.4f}"}
            for each in found
            if short[each.other] in dots and "all" in each.weights and measure in each.mean
            for moved, e in [(100 * each.weights["all"], each.mean[measure])]
        ]  # fmt: skip
        if values:
            by_weights.append(_scatter(values, dots, label))
    audio = f"{found[0].utterances} test utterances ({found[0].corpus})"
    figures = [
        Figure(
            f"similarity-layers{number}",
            f"Hidden states against those of {reference}",
            f"On the same {audio}: 1 is the same. {BARE.capitalize()}: the same architecture with "
            "its weights shuffled. Bars: 95 % interval.",
            f"similarity by hidden state of {', '.join(named[:MOST_LINES])}",
            by_layer,
            left_out_of(named, MOST_LINES, "upstreams", ""),
            curves,
        ),
        Figure(
            f"similarity-weights{number}",
            "How far weights moved, and how alike hidden states stayed",
            "Right: further from the reference in weights; up: more alike in hidden states (the "
            "mean over them). Far to the right and high up is what Speech-FT claims for a merge.",
            "; ".join(f"{e.other} {100 * e.weights['all']:.1f} %" for e in found if e.weights),
            by_weights,
            left_out_of(named, MOST_DOTS, "upstreams", ""),
            dots,
        ),
    ]
    return [figure for figure in figures if figure.panels]


def _scatter(values: Values, names: Sequence[str], label: str) -> Panel:
    base = alt.Chart(alt.Data(values=list(values))).encode(
        x=alt.X("x:Q", title="weights moved, % of their length", scale=alt.Scale(zero=True)),
        color=lines(names),
    )
    return alt.layer(
        base.mark_rule(opacity=0.6).encode(
            y=alt.Y("low:Q", title="similarity", scale=alt.Scale(zero=False)), y2="high:Q"
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            y="y:Q", shape=lines(names, "shape"), description="says:N"
        ),
    ).properties(title=label, width=230, height=150)
