"""What fine-tuning on one task does to all: a row is a way of making upstreams, its seeds together.

An upstream is one draw of a way: another fine-tuning seed gives other weights. A row's difference
from the pre-trained upstream is the mean over K fine-tuning seeds, each the mean over its head
seeds, minus the mean over the base's H head seeds. Its variance has three parts. Clusters: each
speaker (or fold) left out in turn from the whole difference. Fine-tuning seeds: the variance of the
K means over K, less what the clusters alone would make them differ by (`statistics.interval` takes
the K means as it takes heads). The base's heads, common to all rows: their variance over H. Degrees
of freedom are Satterthwaite's. With one fine-tuning seed nothing is known of another one: there is
an interval over speakers and head seeds, and no verdict.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np

from downstream.report.compare import SEEDS, SIGNIFICANT, Verdict, judged, reduction
from downstream.report.groups import (
    Labels,
    Name,
    TaskVersion,
    grouped,
    labels,
    name,
    results_of,
    version,
)
from downstream.report.layout import as_csv, noted
from downstream.report.lineage import Lineage, likely_base, lineages
from downstream.report.results import Result, finite
from downstream.report.statistics import (
    Interval,
    Sample,
    Summary,
    from_error,
    holm,
    interval,
    paired,
    stacked,
)
from downstream.report.table import HEARD, Format
from downstream.tasks.metrics import of_result
from upstream.common.errors import UserError, near_miss

Heads = Sequence[Summary]  # of one upstream on one task, by head seed


class Cell(NamedTuple):
    """A row on one task. Scores in per cent, differences in points of the task's first metric."""

    score: float
    difference: float
    low: float
    high: float
    p: float  # adjusted for the tasks of the row (Holm)
    verdict: Verdict
    seen: bool  # fine-tuning had labels of this test audio: it counts in no mean
    gain: float  # relative reduction of errors against the base, per cent


class Line(NamedTuple):
    """A way of making an upstream."""

    tuned_on: str
    way: str  # strategy, and where it is not linear the method
    alpha: str
    seeds: int  # fine-tuning seeds
    cells: dict[str, Cell]  # by task
    gain: float  # mean over the tasks that were not seen
    worst: str  # the task, of these, that lost most, and by how many points
    layers: str  # how far the transformer's layers moved, from the least to the most
    seconds: float  # of stage 1 and 2, the mean over seeds
    peak_gb: float
    stored_mb: float


class Matrix(NamedTuple):
    """All ways in one suite, against one pre-trained upstream."""

    suite: str
    base: str
    tasks: dict[str, str]  # task -> its metric with an arrow
    scores: dict[str, float]  # of the base
    lines: list[Line]
    notes: list[str]


def matrix(results: Sequence[Result], suite: str, base: str | None = None) -> Matrix:
    """The cross-task matrix of a suite. Raises UserError for an unknown suite or base."""
    mine = [r for r in results if r.cell.suite == suite]
    if not mine:
        suites = {r.cell.suite for r in results}
        raise UserError(f"no results in suite {suite!r}{near_miss(suite, suites)}")
    chosen = base or likely_base(mine)
    if chosen is None:
        raise UserError(f"suite {suite}: nothing says what its upstreams grew from; give --base")
    reference = grouped(results_of(chosen, mine), version)
    print_of = next(iter(reference.values()))[0].cell.fingerprint
    called, known = labels(mine), lineages(mine)
    made = {each[1]: line for each, line in known.items()}
    known = {each: _from_first(line, made) for each, line in known.items()}
    rows: dict[object, dict[tuple[int, ...], Name]] = defaultdict(dict)
    notes = []
    upstreams = grouped(mine, name)
    for each in sorted(upstreams):
        line = known.get(each)
        if line is None:
            if each[1] != print_of:
                notes.append(f"{called[each]}: no record of how it was made; not in the matrix")
        elif line.base != print_of:
            notes.append(f"{called[each]}: grew from another upstream ({line.base})")
        else:
            rows[line.row].setdefault(line.seeds, each)
    tasks = {called[v]: _metric(group[0]) for v, group in sorted(reference.items())}
    scores = {
        called[v]: mean(r.summary.samples[r.score.metric].whole[0] for r in group)
        for v, group in reference.items()
    }
    lines = [
        _line(
            [(known[each], grouped(upstreams[each], version)) for each in members.values()],
            reference,
            called,
        )
        for members in rows.values()
    ]
    lines.sort(key=lambda line: (line.tuned_on, line.way, line.alpha))
    return Matrix(
        suite, called[name(next(iter(reference.values()))[0])], tasks, scores, lines, notes
    )


def _from_first(line: Lineage, made: Mapping[str, Lineage]) -> Lineage:
    """Of an upstream tuned in sequence, back to the first base, as far as `made` knows them."""
    for _ in range(len(made)):
        before = made.get(line.base)
        if before is None or before.base == line.base:
            break
        line = line._replace(
            base=before.base,
            tuned_on=(", then ".join(("+".join(before.tuned_on), "+".join(line.tuned_on))),),
            strategy=f"{line.strategy} (after alpha {before.alpha:g})"
            if before.alpha is not None
            else line.strategy,
            recipe=f"{before.recipe} {line.recipe}",
            seeds=(*before.seeds, *line.seeds),
            seconds=before.seconds + line.seconds,
            peak=max(before.peak, line.peak),
            layers=None,
        )
    return line


def pooled(tuned: Sequence[Heads], base: Heads, metric: str) -> Interval:
    """The mean of upstreams that differ in their fine-tuning seed, minus the base; see above.

    Raises UserError, as `paired` does, if the test sets differ.
    """
    first, heads = tuned[0], min(len(tuned[0]), len(base))
    if len(tuned) == 1:
        return paired(first[:heads], base[:heads], metric)
    for each in tuned:
        paired(each[:1], base[:1], metric)  # refuses other test sets
    ours = [stacked(each, metric) for each in tuned]
    theirs = stacked(base, metric)
    whole = np.array([each.whole.mean() for each in ours]) - theirs.whole.mean()
    without = np.stack([each.without.mean(1) for each in ours], 1) - theirs.without.mean(1)[:, None]
    found = interval(Sample(whole, without))
    count = len(theirs.whole)
    if found.reason or count < 2:
        return found
    own, common = found.standard_error**2, float(theirs.whole.var(ddof=1)) / count
    freedom = own**2 / found.df + common**2 / (count - 1)
    return from_error(found.value, math.sqrt(own + common), (own + common) ** 2 / freedom)


def _line(
    members: Sequence[tuple[Lineage, Mapping[TaskVersion, Sequence[Result]]]],
    reference: Mapping[TaskVersion, Sequence[Result]],
    called: Labels,
) -> Line:
    first = members[0][0]
    cells: dict[str, Cell] = {}
    lower: dict[str, bool] = {}  # by task: whether fewer are better
    for task, base in sorted(reference.items()):
        here = [tasks[task] for _, tasks in members if task in tasks]
        if here:
            cells[called[task]] = _cell(here, base)
            lower[called[task]] = base[0].score.better == "lower"
    adjusted = holm([cell.p for cell in cells.values()])
    for (where, cell), p in zip(cells.items(), adjusted):
        wins = (cell.difference < 0) == lower[where]
        verdict = judged(p, wins, cell.seen and wins, cell.verdict)
        cells[where] = cell._replace(p=p, verdict=verdict)
    unseen = {t: c for t, c in cells.items() if not c.seen and math.isfinite(c.gain)}
    worst = min(unseen, key=lambda task: unseen[task].gain, default="")
    lost = unseen[worst] if worst and unseen[worst].gain < 0 else None
    method = json.loads(first.way)[0] if first.way else ""
    several = f" of {len(first.tuned)}" if len(first.tuned) > 1 else ""
    way = first.strategy + (f", {method}{several}" if several or method != "linear" else "")
    way = way.removesuffix(", ")
    built = [line for line, _ in members]
    return Line(
        tuned_on="+".join(first.tuned_on) or "no labels",
        way=way,
        alpha="" if first.alpha is None else f"{first.alpha:g}",
        seeds=len(members),
        cells=cells,
        gain=mean(cell.gain for cell in unseen.values()) if unseen else math.nan,
        worst=f"{worst} {lost.difference:+.2f}" if lost else "none",
        layers=_span([line.layers for line in built if line.layers]),
        seconds=mean(line.seconds for line in built),
        peak_gb=max(line.peak for line in built) / 1e9,
        stored_mb=mean(line.stored for line in built) / 1e6,
    )


def _cell(tuned: Sequence[Sequence[Result]], base: Sequence[Result]) -> Cell:
    score = base[0].score
    heads = [[r.summary for r in _by_seed(group)] for group in tuned]
    theirs = [r.summary for r in _by_seed(base)]
    found = pooled(heads, theirs, score.metric)
    better = of_result(score.metric, score.better).better
    was = stacked(theirs, score.metric).whole.mean()
    few = len(tuned) < SEEDS or len(theirs) < 2
    return Cell(
        score=float(was + found.value),
        difference=found.value,
        low=found.low,
        high=found.high,
        p=math.nan if few else found.p,
        verdict="withheld" if few else "unknown",  # until p is adjusted
        seen=any(r.score.seen for group in tuned for r in group),
        gain=reduction(better, was, found.value),
    )


def _by_seed(group: Sequence[Result]) -> list[Result]:
    return sorted(group, key=lambda r: r.cell.seed)


def _metric(result: Result) -> str:
    metric = of_result(result.score.metric, result.score.better)
    return f"{metric.label} {metric.arrow}"


def _span(shares: Sequence[tuple[float, float]]) -> str:
    if not shares:
        return ""
    low, high = min(s[0] for s in shares), max(s[1] for s in shares)
    return f"{100 * low:.0f}-{100 * high:.0f} %"


MARKS = {"better": "+", "worse": "-", "seen": HEARD, "withheld": "", "no difference shown": "="}


def render(found: Matrix, form: Format = "text") -> str:
    """For the terminal, a page, a program or a paper."""
    if form == "json":
        lines = [
            {**line._asdict(), "cells": {t: c._asdict() for t, c in line.cells.items()}}
            for line in found.lines
        ]
        return json.dumps(finite({**found._asdict(), "lines": lines}), indent=1)
    if form == "csv":
        head = ["tuned_on", "way", "alpha", "seeds", "task", *Cell._fields]
        head += ["mean_gain", "worst", "layers", "seconds", "peak_gb", "stored_mb"]
        rows = [
            [*line[:4], task, *cell, line.gain, *line[6:]]
            for line in found.lines
            for task, cell in line.cells.items()
        ]
        return as_csv(head, rows)
    columns = [f"{task} {metric}" for task, metric in found.tasks.items()]
    table = [["tuned on", "strategy", "alpha", "seeds", *columns, "gain", "worst", "layers moved",
              "cost"]]  # fmt: skip
    base = [f"{found.scores[task]:.2f}" for task in found.tasks]
    table.append(["nothing", found.base, "", "", *base, "", "", "", ""])
    for line in found.lines:
        cells = [_text(line.cells.get(task)) for task in found.tasks]
        gain = "" if math.isnan(line.gain) else f"{line.gain:+.1f} %"
        cost = f"{line.seconds:.0f} s, {line.peak_gb:.1f} GB, {line.stored_mb:.1f} MB"
        facts = [line.tuned_on, line.way, line.alpha, str(line.seeds)]
        table.append([*facts, *cells, gain, line.worst, line.layers, cost])
    notes = [
        f"in brackets: minus {found.base}, with 95 % intervals over speakers (or folds), "
        f"fine-tuning and head seeds; + better, - worse, = no difference shown (p < {SIGNIFICANT}, "
        f"Holm over the tasks of a row); no mark: fewer than {SEEDS} fine-tuning seeds, no verdict",
        f"gain: mean relative reduction of errors over the tasks without {HEARD}; {HEARD}: "
        "fine-tuning had labels of this test audio; worst: what lost most, in points",
        *found.notes,
    ]
    return noted(table, notes, form, 200)


def _text(cell: Cell | None) -> str:
    """`60.05 (+1.47 ±0.60 -)`"""
    if cell is None:
        return "-"
    half = "±?" if math.isnan(cell.low) else f"±{cell.difference - cell.low:.2f}"
    mark = f" {MARKS[cell.verdict]}" if MARKS.get(cell.verdict) else ""
    heard = HEARD if cell.seen and HEARD not in mark else ""
    return f"{cell.score:.2f} ({cell.difference:+.2f} {half}{mark}){heard}"
