"""What fine-tuning on one task does to all: a row is a way of making upstreams, its seeds together.

See `statistics.pooled` for how seeds come together.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import nan
from statistics import mean
from typing import NamedTuple

from downstream.report.compare import Row, overall, reduction
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
from downstream.report.lineage import Lineage, likely_base, lineages
from downstream.report.pool import Pool
from downstream.report.published import HEARD_TOO, Published, beside, left_out
from downstream.report.results import Result
from downstream.report.statistics import Interval, holm, pooled
from downstream.report.summary import stacked
from downstream.report.superb import METRIC, Tasks
from downstream.report.verdicts import SEEDS, Answer, Finding, Verdict, answer, judge, needed
from downstream.tasks.metrics import of_result
from upstream.common.errors import UserError, near_miss


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
    margin: float = nan  # points that may be lost by what is still kept
    p_kept: float = nan  # one-sided, of having lost as much, adjusted likewise
    needed: str = ""  # what would decide an undecided one


class Line(NamedTuple):
    """A way of making an upstream."""

    tuned_on: str
    way: str  # strategy, and where it is not linear the method
    alpha: str
    seeds: int  # fine-tuning seeds
    cells: dict[str, Cell]  # by task
    superb: dict[str, float]  # set of constants -> SUPERB score, of the suites that have all tasks
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
    superb: dict[str, float]
    lines: list[Line]
    notes: list[str]
    answers: list[Answer]  # of every way, against the base


def matrix(
    results: Sequence[Result],
    suite: str,
    base: str | None = None,
    published: Sequence[Published] = (),
    pool: Pool | None = None,
) -> Matrix:
    """The cross-task matrix of a suite, published rows last, on tasks that are SUPERB's own.

    pool: of more results than the matrix shows, such as all of a results folder.

    Raises UserError for an unknown suite or base.
    """
    mine = [r for r in results if r.cell.suite == suite]
    if not mine:
        suites = {r.cell.suite for r in results}
        raise UserError(f"no results in suite {suite!r}{near_miss(suite, suites)}")
    pool = pool or Pool(mine)
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
            first = rows[line.row].setdefault(line.seeds, each)
            if first != each:  # two names of the same weights, or weights made twice
                notes.append(f"{called[each]}: made as {called[first]} was; not counted again")
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
            pool,
        )
        for members in rows.values()
    ]
    lines.sort(key=lambda line: (line.tuned_on, line.way, line.alpha))
    numbers = grouped(beside(published, reference, called), lambda row: row.upstream)
    lines += [_published(row, numbers[row.name]) for row in published if row.name in numbers]
    notes += left_out(published, numbers)
    shown_base = called[name(next(iter(reference.values()))[0])]
    totals = _superb([reference], called, pool)
    said = [Answer(shown_base, _sentence(line)) for line in lines if line.seeds]
    return Matrix(suite, shown_base, tasks, scores, totals, lines, notes, said)


def _sentence(line: Line) -> str:
    alpha = f" alpha {line.alpha}" if line.alpha else ""
    way = f"{line.tuned_on} {line.way}{alpha}".strip()
    cells = line.cells.items()
    return answer(way, [Finding(task, cell.verdict, cell.needed) for task, cell in cells])


def _published(row: Published, shown: Sequence[Row]) -> Line:
    """A row of numbers alone."""
    cells = {
        each.task: Cell(each.score, nan, nan, nan, nan, "", HEARD_TOO in each.note, nan)
        for each in reversed(shown)  # a task's first metric stays
        if each.metric != METRIC
    }
    totals = {each.task: each.score for each in shown if each.metric == METRIC}
    costs = {"seconds": nan, "peak_gb": nan, "stored_mb": nan}
    way = row.name if not row.method else f"{row.method} ({row.name})"
    where = row.tuned_on or "nothing"
    return Line(where, way, "", 0, cells, totals, gain=nan, worst="", layers="", **costs)


def _superb(members: Sequence[Tasks], called: Labels, pool: Pool) -> dict[str, float]:
    """Each SUPERB score that all members have, the mean over them."""
    each = [{row.task: row.score for row in overall(tasks, called, pool)} for tasks in members]
    return {task: mean(scores[task] for scores in each) for task in each[0]
            if all(task in scores for scores in each)}  # fmt: skip


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


def _line(
    members: Sequence[tuple[Lineage, Mapping[TaskVersion, Sequence[Result]]]],
    reference: Mapping[TaskVersion, Sequence[Result]],
    called: Labels,
    pool: Pool,
) -> Line:
    first = members[0][0]
    tested: dict[str, tuple[Cell, Interval, Result]] = {}
    for task, base in sorted(reference.items()):
        here = [tasks[task] for _, tasks in members if task in tasks]
        if here:
            tested[called[task]] = (*_cell(here, base, pool), base[0])
    cells = _judged(tested)
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
        superb=_superb([tasks for _, tasks in members], called, pool),
        gain=mean(cell.gain for cell in unseen.values()) if unseen else math.nan,
        worst=f"{worst} {lost.difference:+.2f}" if lost else "none",
        layers=_span([line.layers for line in built if line.layers]),
        seconds=mean(line.seconds for line in built),
        peak_gb=max(line.peak for line in built) / 1e9,
        stored_mb=mean(line.stored for line in built) / 1e6,
    )


def _judged(tested: Mapping[str, tuple[Cell, Interval, Result]]) -> dict[str, Cell]:
    """The tasks of a row with their verdicts; p is adjusted for them."""
    cells = [cell for cell, _, _ in tested.values()]
    tests = sum(not math.isnan(cell.p) for cell in cells)
    adjusted = zip(holm([cell.p for cell in cells]), holm([cell.p_kept for cell in cells]))
    shown = {}
    for (task, (cell, found, base)), (p, p_kept) in zip(tested.items(), adjusted):
        if not math.isnan(p):
            better = base.score.better
            wins = (cell.difference < 0) == (better == "lower")
            verdict = judge(p, p_kept, wins, cell.seen, False)
            cell = cell._replace(p=p, p_kept=p_kept, verdict=verdict)
            if verdict == "undecided":
                unit = base.summary.unit
                cell = cell._replace(needed=needed(found, cell.margin, better, tests, unit))
        shown[task] = cell
    return shown


def _cell(
    tuned: Sequence[Sequence[Result]], base: Sequence[Result], pool: Pool
) -> tuple[Cell, Interval]:
    score = base[0].score
    heads = [[r.summary for r in _by_seed(group)] for group in tuned]
    theirs = [r.summary for r in _by_seed(base)]
    found = pooled(heads, theirs, score.metric, pool.spread(base[0], score.metric))
    better = of_result(score.metric, score.better).better
    was = stacked(theirs, score.metric).whole.mean()
    few = len(tuned) < SEEDS or len(theirs) < 2
    margin = pool.margin(base[0]).points(better, was)
    cell = Cell(
        score=float(was + found.value),
        difference=found.value,
        low=found.low,
        high=found.high,
        p=math.nan if few else found.p,
        verdict="withheld" if few else "unknown",  # until p is adjusted
        seen=any(r.score.seen for group in tuned for r in group),
        gain=reduction(better, was, found.value),
        margin=margin,
        p_kept=math.nan if few else found.p_kept(margin, better),
    )
    return cell, found


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
