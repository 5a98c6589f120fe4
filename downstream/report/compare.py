"""Scores as rows, the differences between two upstreams, and what may be said of them."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from downstream.base import Direction
from downstream.report import superb, unlike
from downstream.report.groups import Labels, TaskVersion, grouped, labels, name, results_of, version
from downstream.report.pool import Pool
from downstream.report.results import Result, reading
from downstream.report.statistics import Interval, holm, minus
from downstream.report.superb import Tasks
from downstream.report.verdicts import (
    SEEDS,
    Answer,
    Finding,
    Margin,
    Verdict,
    answer,
    judge,
    needed,
)
from downstream.tasks.metrics import of_result, parted, scale
from upstream.common.errors import UserError


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
    detectable: float = math.nan  # the true difference that gets a verdict four times in five
    groups: str = ""  # beside the mean over groups, the score of each
    margin: float = math.nan  # points that may be lost by what is still kept
    p_kept: float = math.nan  # one-sided, of having lost as much; NaN where it cannot be asked
    p_kept_holm: float = math.nan  # adjusted for the same tasks as p_holm
    needed: str = ""  # what would decide an undecided one
    pooled: int = 0  # upstreams whose heads tell how far seeds lie apart
    chance: float = math.nan  # of an accuracy: the score of guessing among the test's classes
    majority: float = math.nan  # and of always naming the most frequent one


class Comparison(NamedTuple):
    """Two upstreams task by task, and what could not be compared."""

    a: str
    b: str
    rows: list[Row]
    skipped: list[str]
    notes: Sequence[str] = ()  # what else is not the same
    answers: Sequence[Answer] = ()  # of B against A, and of A against B


Tested = tuple[Row, Interval]  # without a verdict yet; of the difference


def compare(
    a: str, b: str, results: Sequence[Result], margins: Mapping[str, Margin] = {}
) -> Comparison:
    """A minus B for every task that both have with the same suite, revision and seeds.

    Raises UserError if a name is unknown, or stands for several weights.
    """
    left, right = (grouped(results_of(wanted, results), version) for wanted in (a, b))
    pool = Pool(results, margins)
    there, back = between(a, b, left, right, pool), between(b, a, right, left, pool)
    return there._replace(answers=answers([*back.rows, *there.rows]))


def between(a: str, b: str, left: Tasks, right: Tasks, pool: Pool) -> Comparison:
    """The same of results that were looked up."""
    called = labels([r for side in (left, right) for group in side.values() for r in group])
    rows, refused = differences(left, right, called, pool)
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


def scores(group: Sequence[Result], called: Labels, pool: Pool) -> list[Row]:
    """Every metric of one upstream in one task, its seeds together.

    Intervals are cut off where the metric's scale ends: the truth lies on it, so that as many cover
    it (Mandelkern 2002, Statistical Science 17:149).
    """
    with reading(group[0].folder.parent, "delete the folder"):
        return _scores(group, called, pool)


def _scores(group: Sequence[Result], called: Labels, pool: Pool) -> list[Row]:
    summaries = [r.summary for r in group]
    if len({summary.test for summary in summaries}) > 1:
        raise UserError(f"{group[0].folder.parent}: seeds were tested on different data; delete it")
    cell, first = group[0].cell, summaries[0]
    rows = []
    for metric in first.samples:
        score, spread = pool.interval(group, metric), pool.spread(group[0], metric)
        plain, view = parted(metric)
        better = of_result(metric, group[0].score.directions.get(plain, "lower")).better
        lowest, highest = scale(metric, better)
        chance, majority = first.baselines.get(metric, (math.nan, math.nan))
        rows.append(Row(
            suite=cell.suite, upstream=called[name(group[0])],
            fingerprint=cell.fingerprint, task=called[version(group[0])],
            recipe=cell.revision, metric=metric, better=better,
            score=score.value, low=np.maximum(score.low, lowest).item(),
            high=np.minimum(score.high, highest).item(), seeds=len(group),
            clusters=len(first.clusters), unit=first.unit,
            utterances=first.utterances, note=score.reason,
            seen=max(r.score.seen / first.utterances for r in group),
            groups=_groups([s.groups[plain] for s in summaries], better) if view == "macro" else "",
            pooled=spread.upstreams if spread else 0, chance=chance, majority=majority,
        ))  # fmt: skip
    return rows


def _groups(scores: Sequence[Mapping[str, float]], better: Direction) -> str:
    """`de 20.10, en 12.30`: each group's score, the mean over heads, the worst group first."""
    means = {group: sum(s[group] for s in scores) / len(scores) for group in scores[0]}
    ranked = sorted(means.items(), key=lambda item: item[1], reverse=better == "lower")
    return ", ".join(f"{group} {mean:.2f}" for group, mean in ranked)


def differences(a: Tasks, b: Tasks, called: Labels, pool: Pool) -> tuple[list[Row], list[str]]:
    """`a` minus `b` on the tasks and seeds that both have; what was refused, and why.

    The differences of one pair in one suite are the family that p is adjusted for: another suite
    changes no verdict on a pair, nor does a further upstream in a table but through the seeds'
    variance. Views on groups are a family of their own.
    """
    families: dict[tuple[str, bool], list[Tested]] = defaultdict(list)
    refused = []
    for task in sorted(a.keys() & b.keys()):
        left, right = ({r.cell.seed: r for r in side[task]} for side in (a, b))
        shared, lone = sorted(left.keys() & right.keys()), sorted(left.keys() ^ right.keys())
        try:
            pairs = [left[seed] for seed in shared], [right[seed] for seed in shared]
            for row, difference in _minus(*pairs, called, pool):
                family = families[task.suite, bool(parted(row.metric)[1])]
                family.append((row, difference))
            refused += [f"{called[task]}: seeds that only one has: {lone}"] if lone else []
        except UserError as error:
            refused.append(f"{called[task]}: {error}")
    rows = [row for family in families.values() for row in judged(family)]
    return rows + overall(a, called, pool, b), refused


def judged(family: Sequence[Tested]) -> list[Row]:
    """Differences that p is adjusted for together, with their verdicts."""
    tests = sum(not math.isnan(row.p) for row, _ in family)
    ps, kept = holm([row.p for row, _ in family]), holm([row.p_kept for row, _ in family])
    rows = []
    for (row, difference), p, p_kept in zip(family, ps, kept):
        row = row._replace(p_holm=p, p_kept_holm=p_kept)
        if not math.isnan(p):
            verdict = verdict_of(row)
            row = row._replace(verdict=verdict, detectable=difference.detectable(tests))
            if verdict == "undecided":
                more = needed(difference, row.margin, row.better, tests, row.unit)
                row = row._replace(needed=more)
        rows.append(row)
    return rows


def verdict_of(row: Row) -> Verdict:
    """By its adjusted p."""
    wins = (row.difference < 0) == (row.better == "lower")
    return judge(row.p_holm, row.p_kept_holm, wins, row.seen > 0, row.reference_seen > 0)


def overall(a: Tasks, called: Labels, pool: Pool, b: Tasks | None = None) -> list[Row]:
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
            peers = {task: pool.summaries(a[v][0]) for task, v in tasks.items()}
            row, *others = (
                _overall(suite, constants, groups, h, called, peers)
                for groups, h in zip(sides, heads)
            )
            for other in others:
                difference = superb.score(constants, heads[0], heads[1], peers)
                row = _against(row, other, difference, _few(len(seeds)), math.nan)
                (row,) = judged([(row, difference)])
            rows.append(row)
    return rows


def _overall(
    suite: str,
    constants: str,
    groups: Mapping[str, Sequence[Result]],
    heads: superb.Heads,
    called: Labels,
    peers: superb.Peers,
) -> Row:
    """One upstream's score with a set of constants."""
    score = superb.score(constants, heads, peers=peers)
    firsts = [each[0] for each in heads.values()]
    results = [result for group in groups.values() for result in group]
    return Row(
        suite=suite, upstream=called[name(results[0])], fingerprint=results[0].cell.fingerprint,
        task=f"{superb.METRIC} {constants}", recipe="", metric=superb.METRIC, better="higher",
        score=score.value, low=score.low, high=score.high, seeds=max(map(len, heads.values())),
        clusters=sum(len(each.clusters) for each in firsts), unit="speakers or folds",
        utterances=sum(each.utterances for each in firsts), note=score.reason,
        seen=max(r.score.seen / r.summary.utterances for r in results),
    )  # fmt: skip


def detectable(results: Iterable[Result], task: TaskVersion, tests: int) -> float | None:
    """The true difference between two upstreams that gets a verdict with a probability of 80 %.

    In points of the task's first metric, where as many tasks as `tests` are compared. From finished
    results of this version of the task: the median over upstreams paired with the first, or if
    there is only one, as if errors were not paired, which is an upper bound. None without a result
    that says.
    """
    mine = [r for r in results if version(r) == task]
    if not mine:
        return None
    pool, called = Pool(mine), labels(mine)
    first, *others = (group for _, group in sorted(grouped(mine, name).items()))
    sizes = []
    for other in others:
        left, right = ({r.cell.seed: r for r in side} for side in (other, first))
        seeds = sorted(left.keys() & right.keys())
        with contextlib.suppress(UserError):  # of other test sets
            pairs = [left[seed] for seed in seeds], [right[seed] for seed in seeds]
            _, difference = _minus(*pairs, called, pool)[0]
            sizes.append(difference.detectable(tests))
    if not others:
        alone = pool.interval(first, first[0].score.metric)
        sizes = [math.sqrt(2) * alone.detectable(tests)]
    known = [size for size in sizes if not math.isnan(size)]
    return median(known) if known else None


def _minus(a: Sequence[Result], b: Sequence[Result], called: Labels, pool: Pool) -> list[Tested]:
    """Every metric of a task. Raises UserError for no seed, or if the test sets differ."""
    if not a:
        raise UserError("no head seed in common")
    if a[0].summary.test != b[0].summary.test:
        raise UserError(unlike.test_sets(a[0], b[0]))
    few = _few(len(a)) if a[0].score.lr else ""  # untrained, there is no other seed to know of
    tested = []
    for row, other in zip(scores(a, called, pool), scores(b, called, pool)):
        left, right = pool.sample(a, row.metric), pool.sample(b, row.metric)
        difference = minus(left, right, pool.spread(a[0], row.metric))
        margin = pool.margin(a[0]).points(row.better, other.score)
        tested.append((_against(row, other, difference, few, margin), difference))
    return tested


def _few(seeds: int) -> str:
    """Why so few head seeds allow no verdict; nothing if they do."""
    return f"{seeds} head seed{'s' * (seeds > 1)}" if seeds < SEEDS else ""


def _against(row: Row, other: Row, difference: Interval, few: str, margin: float) -> Row:
    """The row beside a reference, without a verdict yet."""
    return row._replace(
        reference=other.upstream, reference_score=other.score, reference_seen=other.seen,
        difference=difference.value, low=difference.low, high=difference.high,
        p=math.nan if few else difference.p, verdict="withheld" if few else "unknown",
        margin=margin, p_kept=math.nan if few else difference.p_kept(margin, row.better),
        note=f"{few}: the difference between heads is not known; run --seeds {SEEDS}"
        if few else difference.reason,
    )  # fmt: skip


def answers(rows: Iterable[Row]) -> list[Answer]:
    """In the order of the rows; scores alone, published numbers and views on groups say nothing."""
    pairs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.reference and row.seeds and row.verdict and not parted(row.metric)[1]:
            pairs[row.reference, row.upstream].append(row)
    return [
        Answer(reference, answer(upstream, _findings(group)))
        for (reference, upstream), group in pairs.items()
    ]


def _findings(rows: Sequence[Row]) -> list[Finding]:
    """A task with several metrics is called by both."""
    count = defaultdict[str, int](int)
    for row in rows:
        count[row.task] += 1
    findings = []
    for row in rows:
        metric = f" {of_result(row.metric, row.better).label}" if count[row.task] > 1 else ""
        findings.append(Finding(f"{row.task}{metric}", row.verdict, row.needed))
    return findings


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
