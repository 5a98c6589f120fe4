"""Scores as rows, the differences between two upstreams, and what may be said of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

from downstream.base import METRICS
from downstream.report.groups import (
    Labels,
    TaskVersion,
    grouped,
    labels,
    name,
    of_upstream,
    version,
)  # fmt: skip
from downstream.report.results import Result
from downstream.report.statistics import PREDICTED, holm, interval, paired, stacked
from upstream.common.errors import UserError

SIGNIFICANT = 0.05
SEEDS = 3  # fewer say too little of how heads differ (simulated in test_statistics.py)

Verdict = Literal["", "better", "worse", "no difference shown", "withheld", "seen", "unknown"]
Tasks = Mapping[TaskVersion, Sequence[Result]]  # of one upstream, the seeds of a task together


class Row(NamedTuple):
    """An upstream in one metric of one task, alone or minus a reference; a line of table.csv.

    Scores in per cent, differences in percentage points, of the metric as it is shown.
    """

    suite: str
    upstream: str
    fingerprint: str
    task: str
    recipe: str
    metric: str
    score: float  # mean over seeds; beside a reference over the seeds that both have
    low: float  # 95 % interval of the score, or beside a reference of the difference
    high: float
    seeds: int
    clusters: int
    unit: str  # of the clusters: speakers or folds
    utterances: int
    seen: float  # share of the test set whose audio and labels the upstream was fine-tuned on
    note: str  # why there is no verdict or no interval
    reference: str = ""
    reference_score: float = math.nan
    reference_seen: float = 0.0
    difference: float = math.nan
    p: float = math.nan  # of the difference being 0; NaN where the verdict is withheld
    p_holm: float = math.nan  # adjusted for the differences of these two upstreams in this suite
    verdict: Verdict = ""  # on the upstream
    detectable: float = math.nan  # the true difference that is found with a probability of 80 %


class Comparison(NamedTuple):
    """Two upstreams task by task, and what could not be compared."""

    a: str
    b: str
    rows: list[Row]
    skipped: list[str]


def compare(a: str, b: str, results: Sequence[Result]) -> Comparison:
    """A minus B for every task that both have with the same suite, revision and seeds.

    Raises UserError if a name is unknown, or stands for several weights.
    """
    sides = [of_upstream(results, which) for which in (a, b)]
    left, right = (grouped(side, version) for side in sides)
    called = labels([r for side in sides for r in side])
    skipped = [
        f"{called.task[v]}: only {a if v in left else b} has this version of it ({v.revision})"
        for v in sorted(left.keys() ^ right.keys())
    ]
    rows, refused = differences(left, right, called)
    return Comparison(a, b, rows, skipped + refused)


def scores(group: Sequence[Result], called: Labels) -> list[Row]:
    """Every metric of one upstream in one task, its seeds together."""
    summaries = [r.summary for r in group]
    cell, first = group[0].cell, summaries[0]
    seen = max(r.score.seen / r.summary.utterances for r in group)
    if len({summary.test for summary in summaries}) > 1:
        raise UserError(f"{group[0].folder.parent}: seeds were tested on different data; delete it")
    rows = []
    for metric in first.samples:
        found = interval(stacked(summaries, metric))
        rows.append(Row(
            suite=cell.suite, upstream=called.upstream[name(group[0])],
            fingerprint=cell.fingerprint, task=called.task[version(group[0])],
            recipe=cell.revision, metric=metric, score=found.value, low=found.low, high=found.high,
            seeds=len(group), clusters=len(first.clusters), unit=first.unit,
            utterances=first.utterances, seen=seen, note=found.reason,
        ))  # fmt: skip
    return rows


def differences(a: Tasks, b: Tasks, called: Labels) -> tuple[list[Row], list[str]]:
    """`a` minus `b` on the tasks and seeds that both have; what was refused, and why.

    The differences of one pair in one suite are the family that p is adjusted for: neither a
    further upstream in a table nor another suite changes the verdict on a pair.
    """
    rows, refused = list[Row](), []
    for task in sorted(a.keys() & b.keys()):
        lone = sorted({r.cell.seed for r in a[task]} ^ {r.cell.seed for r in b[task]})
        try:
            rows += _minus(a[task], b[task], called)
            refused += [f"{called.task[task]}: seeds that only one has: {lone}"] if lone else []
        except UserError as error:
            refused.append(f"{called.task[task]}: {error}")
    judged = []
    for suite in dict.fromkeys(row.suite for row in rows):
        family = [row for row in rows if row.suite == suite]
        adjusted = holm([row.p for row in family])
        judged += [
            row._replace(p_holm=p, verdict=_verdict(row, p)) for row, p in zip(family, adjusted)
        ]
    return judged, refused


def detectable(results: Iterable[Result], task: TaskVersion) -> float | None:
    """The difference between two upstreams that would be found with a probability of 80 %.

    In points of the task's first metric. From finished results of this version of the task: the
    median over upstreams paired with the first, or if there is only one, as if errors were not
    paired, which is an upper bound. None without a result that says.
    """
    groups = grouped((r for r in results if version(r) == task), name)
    if not groups:
        return None
    first, *others = (groups[key] for key in sorted(groups))
    called = labels(r for group in groups.values() for r in group)
    pairs = [differences({task: other}, {task: first}, called)[0] for other in others]
    sizes = [rows[0].detectable for rows in pairs if rows]
    if not others:
        alone = stacked([r.summary for r in first], first[0].score.metric)
        sizes = [math.sqrt(2) * interval(alone).detectable]
    known = [size for size in sizes if not math.isnan(size)]
    return median(known) if known else None


def _minus(a: Sequence[Result], b: Sequence[Result], called: Labels) -> list[Row]:
    """Every metric of a task. Raises UserError if no seed is shared or the test sets differ."""
    shared = {r.cell.seed for r in a} & {r.cell.seed for r in b}
    if not shared:
        raise UserError("no head seed in common")
    a, b = ([r for r in sorted(side, key=_seed) if r.cell.seed in shared] for side in (a, b))
    x, y = ([r.summary for r in side] for side in (a, b))
    if x[0].test != y[0].test:
        raise UserError(_first_difference(a[0], b[0]))
    rows = []
    for row, other in zip(scores(a, called), scores(b, called)):
        found = paired(x, y, row.metric)
        row = row._replace(
            reference=other.upstream, reference_score=other.score, reference_seen=other.seen,
            difference=found.value, low=found.low, high=found.high, p=found.p, verdict="unknown",
            detectable=found.detectable, note=found.reason,
        )  # fmt: skip
        # where no head is trained there is one seed, and no other to know of
        if len(shared) < SEEDS and a[0].score.lr:
            few = f"{len(shared)} head seed{'s' * (len(shared) > 1)}: the difference between heads "
            few += f"is not known; run --seeds {SEEDS}"
            row = row._replace(p=math.nan, verdict="withheld", note=few)
        rows.append(row)
    return rows


def _seed(result: Result) -> int:
    return result.cell.seed


def _verdict(row: Row, p: float) -> Verdict:
    """What a difference says of the upstream. Who has heard the answers cannot win."""
    if math.isnan(p):
        return row.verdict
    if p >= SIGNIFICANT:
        return "no difference shown"
    wins = (row.difference < 0) == (METRICS[row.metric].better == "lower")
    if row.seen if wins else row.reference_seen:
        return "seen"
    return "better" if wins else "worse"


def _first_difference(a: Result, b: Result) -> str:
    """Where two test sets part."""
    x, y = ({(r.id, r.metric): r._asdict() for r in side.predictions} for side in (a, b))
    if lone := sorted(x.keys() ^ y.keys()):
        return f"{len(lone)} utterances that only one was tested on (such as {lone[0][0]})"
    differ = [
        f"the {field} of {key[0]}"
        for key in x
        for field in x[key]
        if field not in PREDICTED and x[key][field] != y[key][field]
    ]
    return f"the test sets disagree on {len(differ)} facts (such as {differ[0]})"
