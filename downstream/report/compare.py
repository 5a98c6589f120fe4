"""Scores as rows, the differences between two upstreams, and what may be said of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

from downstream.base import Direction
from downstream.report import superb, unlike
from downstream.report.groups import Labels, TaskVersion, grouped, labels, name, results_of, version
from downstream.report.results import Result, reading
from downstream.report.statistics import Interval, Sample, holm, interval, minus, stacked
from downstream.report.superb import Tasks
from downstream.tasks.metrics import of_result, parted
from upstream.common.errors import UserError

SIGNIFICANT = 0.05
SEEDS = 3  # fewer say too little of how heads differ (simulated in test_statistics.py)

Verdict = Literal["", "better", "worse", "no difference shown", "withheld", "seen", "unknown"]


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
    better: Direction
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
    groups: str = ""  # beside the mean over groups, the score of each


class Comparison(NamedTuple):
    """Two upstreams task by task, and what could not be compared."""

    a: str
    b: str
    rows: list[Row]
    skipped: list[str]
    notes: Sequence[str] = ()  # what else is not the same


class Memo(NamedTuple):
    """What was computed of an upstream alone, by its results (their `id`) and metric."""

    samples: dict[tuple[str, tuple[int, ...]], Sample]
    intervals: dict[tuple[str, tuple[int, ...]], Interval]

    def sample(self, group: Sequence[Result], metric: str) -> Sample:
        """The heads of several seeds side by side."""
        key = (metric, tuple(map(id, group)))
        if key not in self.samples:
            self.samples[key] = stacked([r.summary for r in group], metric)
        return self.samples[key]

    def interval(self, group: Sequence[Result], metric: str) -> Interval:
        """Of their mean."""
        key = (metric, tuple(map(id, group)))
        if key not in self.intervals:
            self.intervals[key] = interval(self.sample(group, metric))
        return self.intervals[key]


def compare(a: str, b: str, results: Sequence[Result]) -> Comparison:
    """A minus B for every task that both have with the same suite, revision and seeds.

    Raises UserError if a name is unknown, or stands for several weights.
    """
    left, right = (grouped(results_of(wanted, results), version) for wanted in (a, b))
    return between(a, b, left, right)


def between(a: str, b: str, left: Tasks, right: Tasks, memo: Memo | None = None) -> Comparison:
    """The same of results that were looked up; `memo` serves where one of many pairs is compared.

    A memo is good for as long as the results live.
    """
    called = labels([r for side in (left, right) for group in side.values() for r in group])
    rows, refused = differences(left, right, called, memo)
    return Comparison(a, b, rows, _alone(a, b, left, right, called) + refused)


def _alone(a: str, b: str, left: Tasks, right: Tasks, called: Labels) -> list[str]:
    """Versions of a task that one of them lacks; where both have another, what they differ in."""
    lines = []
    for v in sorted(left.keys() ^ right.keys()):
        mine, others = (left, right) if v in left else (right, left)
        like = [u for u in others if (u.suite, u.task) == (v.suite, v.task)]
        if like and v in left and not any(u in left for u in like):
            other = max(like, key=lambda u: others[u][0].score.created)  # the newest
            why = unlike.versions(left[v][0], right[other][0])
            lines.append(f"{called[v]}: of {b} there is {called[other]}: {why}")
        elif not like or any(u in mine for u in like):
            lines.append(f"{called[v]}: only {a if v in left else b} has it ({v.revision})")
    return lines


def scores(group: Sequence[Result], called: Labels, memo: Memo | None = None) -> list[Row]:
    """Every metric of one upstream in one task, its seeds together."""
    with reading(group[0].folder.parent, "delete the folder"):
        return _scores(group, called, memo or Memo({}, {}))


def _scores(group: Sequence[Result], called: Labels, memo: Memo) -> list[Row]:
    summaries = [r.summary for r in group]
    if len({summary.test for summary in summaries}) > 1:
        raise UserError(f"{group[0].folder.parent}: seeds were tested on different data; delete it")
    cell, first = group[0].cell, summaries[0]
    rows = []
    for metric in first.samples:
        score = memo.interval(group, metric)
        plain, view = parted(metric)
        better = of_result(metric, group[0].score.directions.get(plain, "lower")).better
        rows.append(Row(
            suite=cell.suite, upstream=called[name(group[0])],
            fingerprint=cell.fingerprint, task=called[version(group[0])],
            recipe=cell.revision, metric=metric, better=better,
            score=score.value, low=score.low, high=score.high,
            seeds=len(group), clusters=len(first.clusters), unit=first.unit,
            utterances=first.utterances, note=score.reason,
            seen=max(r.score.seen / first.utterances for r in group),
            groups=_groups([s.groups[plain] for s in summaries], better) if view == "macro" else "",
        ))  # fmt: skip
    return rows


def _groups(scores: Sequence[Mapping[str, float]], better: Direction) -> str:
    """`de 20.10, en 12.30`: each group's score, the mean over heads, the worst group first."""
    means = {group: sum(s[group] for s in scores) / len(scores) for group in scores[0]}
    ranked = sorted(means.items(), key=lambda item: item[1], reverse=better == "lower")
    return ", ".join(f"{group} {mean:.2f}" for group, mean in ranked)


def differences(
    a: Tasks, b: Tasks, called: Labels, memo: Memo | None = None
) -> tuple[list[Row], list[str]]:
    """`a` minus `b` on the tasks and seeds that both have; what was refused, and why.

    The differences of one pair in one suite are the family that p is adjusted for: neither a
    further upstream in a table nor another suite changes the verdict on a pair. Views on groups
    are a family of their own.
    """
    families: dict[tuple[str, bool], list[Row]] = defaultdict(list)
    refused = []
    for task in sorted(a.keys() & b.keys()):
        left, right = ({r.cell.seed: r for r in side[task]} for side in (a, b))
        shared, lone = sorted(left.keys() & right.keys()), sorted(left.keys() ^ right.keys())
        try:
            pairs = [left[seed] for seed in shared], [right[seed] for seed in shared]
            for row in _minus(*pairs, called, memo or Memo({}, {})):
                families[task.suite, bool(parted(row.metric)[1])].append(row)
            refused += [f"{called[task]}: seeds that only one has: {lone}"] if lone else []
        except UserError as error:
            refused.append(f"{called[task]}: {error}")
    rows = [
        row._replace(p_holm=p, verdict=_verdict(row, p))
        for family in families.values()
        for row, p in zip(family, holm([row.p for row in family]))
    ]
    return rows + overall(a, called, b), refused


def overall(a: Tasks, called: Labels, b: Tasks | None = None) -> list[Row]:
    """The SUPERB scores of an upstream, or minus those of `b`, where all their tasks are there.

    Each is one number, decided on before: its p is not adjusted.
    """
    rows = []
    for suite in sorted({v.suite for v in a}):
        shared = {v: a[v] for v in a if v.suite == suite and (b is None or v in b)}
        for constants, tasks in superb.complete(shared).items():
            sides = [{task: side[v] for task, v in tasks.items()} for side in (a, b) if side]
            groups = [group for side in sides for group in side.values() if group[0].score.lr]
            seeds = set.intersection(*({r.cell.seed for r in group} for group in groups))
            heads = [
                {
                    task: [r.summary for r in group if r.cell.seed in seeds or not r.score.lr]
                    for task, group in side.items()
                }
                for side in sides
            ]
            if not seeds:
                continue
            row, *others = (_overall(suite, constants, s, h, called) for s, h in zip(sides, heads))
            for other in others:
                row = _against(row, other, superb.score(constants, *heads), _few(len(seeds)))
                row = row._replace(p_holm=row.p, verdict=_verdict(row, row.p))
            rows.append(row)
    return rows


def _overall(
    suite: str,
    constants: str,
    groups: Mapping[str, Sequence[Result]],
    heads: superb.Heads,
    called: Labels,
) -> Row:
    """One upstream's score with a set of constants."""
    score, firsts = superb.score(constants, heads), [each[0] for each in heads.values()]
    results = [result for group in groups.values() for result in group]
    return Row(
        suite=suite, upstream=called[name(results[0])], fingerprint=results[0].cell.fingerprint,
        task=f"{superb.METRIC} {constants}", recipe="", metric=superb.METRIC, better="higher",
        score=score.value, low=score.low, high=score.high, seeds=max(map(len, heads.values())),
        clusters=sum(len(each.clusters) for each in firsts), unit="speakers or folds",
        utterances=sum(each.utterances for each in firsts), note=score.reason,
        seen=max(r.score.seen / r.summary.utterances for r in results),
    )  # fmt: skip


def detectable(results: Iterable[Result], task: TaskVersion) -> float | None:
    """The difference between two upstreams that would be found with a probability of 80 %.

    In points of the task's first metric. From finished results of this version of the task: the
    median over upstreams paired with the first, or if there is only one, as if errors were not
    paired, which is an upper bound. None without a result that says.
    """
    mine = [r for r in results if version(r) == task]
    if not mine:
        return None
    first, *others = (group for _, group in sorted(grouped(mine, name).items()))
    pairs = [differences({task: other}, {task: first}, labels(mine))[0] for other in others]
    sizes = [rows[0].detectable for rows in pairs if rows]
    if not others:
        alone = stacked([r.summary for r in first], first[0].score.metric)
        sizes = [math.sqrt(2) * interval(alone).detectable]
    known = [size for size in sizes if not math.isnan(size)]
    return median(known) if known else None


def _minus(a: Sequence[Result], b: Sequence[Result], called: Labels, memo: Memo) -> list[Row]:
    """Every metric of a task. Raises UserError for no seed, or if the test sets differ."""
    if not a:
        raise UserError("no head seed in common")
    if a[0].summary.test != b[0].summary.test:
        raise UserError(unlike.test_sets(a[0], b[0]))
    few = _few(len(a)) if a[0].score.lr else ""  # untrained, there is no other seed to know of
    return [
        _against(row, other, minus(*(memo.sample(side, row.metric) for side in (a, b))), few)
        for row, other in zip(scores(a, called, memo), scores(b, called, memo))
    ]


def _few(seeds: int) -> str:
    """Why so few head seeds allow no verdict; nothing if they do."""
    return f"{seeds} head seed{'s' * (seeds > 1)}" if seeds < SEEDS else ""


def _against(row: Row, other: Row, minus: Interval, few: str) -> Row:
    """The row beside a reference, without a verdict yet."""
    return row._replace(
        reference=other.upstream, reference_score=other.score, reference_seen=other.seen,
        difference=minus.value, low=minus.low, high=minus.high, detectable=minus.detectable,
        p=math.nan if few else minus.p, verdict="withheld" if few else "unknown",
        note=f"{few}: the difference between heads is not known; run --seeds {SEEDS}"
        if few else minus.reason,
    )  # fmt: skip


def _verdict(row: Row, p: float) -> Verdict:
    wins = (row.difference < 0) == (row.better == "lower")
    return judged(p, wins, bool(row.seen if wins else row.reference_seen), row.verdict)


def judged(p: float, wins: bool, seen: bool, unknown: Verdict) -> Verdict:
    """What a difference says of an upstream; `unknown` without a p.

    seen: the winner has heard the answers, and cannot win.
    """
    if math.isnan(p):
        return unknown
    if p >= SIGNIFICANT:
        return "no difference shown"
    if seen:
        return "seen"
    return "better" if wins else "worse"


def reduction(better: Direction, before: float, difference: float) -> float:
    """By how many per cent of the errors there were `before` a difference makes fewer.

    NaN if there were none.
    """
    errors = before if better == "lower" else 100 - before
    return (
        100 * (-difference if better == "lower" else difference) / errors
        if errors > 0
        else math.nan
    )
