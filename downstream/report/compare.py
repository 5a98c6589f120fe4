"""Which results belong together, what to call them, and the difference between two groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import pandas as pd

from downstream.report.results import Result
from downstream.report.statistics import Difference, Rows, paired
from downstream.tasks.metrics import METRICS
from upstream.common.errors import UserError, near_miss

SIGNIFICANT = 0.05

Verdict = Literal["better", "worse", "tie", "unknown"]


class Job(NamedTuple):
    """What two upstreams must have in common to be compared."""

    suite: str
    task: str
    recipe: str


class Name(NamedTuple):
    """An upstream: what it is called and what it is."""

    upstream: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.upstream}@{self.fingerprint}"


def job(result: Result) -> Job:
    """The job that a result is one upstream's answer to."""
    return Job(result.cell.suite, result.cell.task, result.cell.recipe)


def name(result: Result) -> Name:
    """The upstream that a result is about."""
    return Name(result.cell.upstream, result.cell.fingerprint)


def find(results: Iterable[Result], wanted: str) -> list[Result]:
    """The results of one upstream, by name or name@fingerprint.

    Raises UserError if there are none, or if the name stands for several weights.
    """
    names = {name(r) for r in results}
    hits = {n for n in names if wanted in (n.upstream, str(n))}
    if not hits:
        known = {n.upstream for n in names}
        raise UserError(f"no results for upstream {wanted!r}{near_miss(wanted, known)}")
    if len(hits) > 1:
        choices = " or ".join(sorted(map(str, hits)))
        raise UserError(f"{wanted!r} has results of different weights; say {choices}")
    return [r for r in results if name(r) in hits]


def by_job(results: Iterable[Result]) -> dict[Job, list[Result]]:
    """The results of one upstream, its seeds together."""
    groups: dict[Job, list[Result]] = defaultdict(list)
    for result in results:
        groups[job(result)].append(result)
    return groups


def suites(results: Iterable[Result]) -> list[str]:
    """The suites that have results."""
    return sorted({r.cell.suite for r in results})


def upstream_labels(names: Iterable[Name]) -> dict[Name, str]:
    """What a table calls each upstream: the fingerprint is added where a name has several."""
    names = set(names)
    shared = {n.upstream for n in names if sum(n.upstream == m.upstream for m in names) > 1}
    return {n: str(n) if n.upstream in shared else n.upstream for n in names}


def job_labels(jobs: Iterable[Job]) -> dict[Job, str]:
    """What a table calls each job: the task, with suite and recipe where needed to tell them."""
    jobs = set(jobs)
    several = len({j.suite for j in jobs}) > 1
    labels = {}
    for one in jobs:
        label = f"{one.suite}/{one.task}" if several else one.task
        alone = sum(one[:2] == other[:2] for other in jobs) == 1
        labels[one] = label if alone else f"{label}@{one.recipe[:6]}"
    return labels


def rows(group: Iterable[Result]) -> Rows:
    """The predictions of several seeds."""
    return pd.concat([r.rows for r in group], ignore_index=True)


def mean(group: Iterable[Result]) -> float:
    """The score in per cent over several seeds."""
    scores = [r.score.score for r in group]
    return math.fsum(scores) / len(scores)


def contrast(a: Sequence[Result], b: Sequence[Result]) -> Difference:
    """a minus b, one job, in the metric's own direction (accuracy up), over the seeds both have.

    Raises UserError if there is no such seed or the test sets differ.
    """
    shared = {r.cell.seed for r in a} & {r.cell.seed for r in b}
    if not shared:
        raise UserError("no head seed in common")
    d = paired(*(rows(r for r in group if r.cell.seed in shared) for group in (a, b)))
    return d if a[0].score.better == "lower" else -d


def verdict(difference: float, p: float, metric: str) -> Verdict:
    """What a difference in a metric says of the first of the two; p as adjusted."""
    if math.isnan(p):
        return "unknown"
    if p >= SIGNIFICANT:
        return "tie"
    return "better" if (difference < 0) == (METRICS[metric].better == "lower") else "worse"
