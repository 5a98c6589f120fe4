"""How sure a score, or the difference between two, is: t intervals over clusters and head seeds.

One method everywhere. What was drawn is the cluster: a speaker, or where a task is scored in folds
the fold, whose speakers share one head. Each cluster is left out in turn (the delete-one jackknife)
and the movement of the score gives its variance. Heads trained from several seeds are a second
sample, crossed with the clusters: their variance component is added and the degrees of freedom are
Satterthwaite's. The interval is Student's t, with C - 1 degrees of freedom for C clusters when
there is one seed. A percentile bootstrap covers too little with few clusters (IEMOCAP has 5 folds)
and agrees with t where there are many. tests/downstream/test_statistics.py simulates coverage and
false positives; with fewer than three seeds the latter reach 13 % and more, so there is no verdict.

All values are in per cent, or percentage points, of the metric as it is shown (accuracy: upwards).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from downstream.base import AND, Count, Direction, Metric, Record
from downstream.tasks.metrics import of_result
from upstream.common.errors import UserError

Array: TypeAlias = NDArray[np.float64]

PREDICTED = {"hypothesis", "errors", "total", "score"}  # all else in a record is the test set's


class Sample(NamedTuple):
    """One metric of K heads that differ in their seed, and again without each of C clusters."""

    whole: Array  # [K]
    without: Array  # [C, K]


@dataclass(frozen=True)
class Summary:
    """All that statistics need of one head's records."""

    test: str  # hash: two heads with the same one were tested on the same
    utterances: int
    unit: str  # what a cluster is: speakers or folds
    clusters: list[str]
    samples: dict[str, Sample]  # metric, or view on its groups (`wer/worst`) -> [1], [C, 1]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> group -> score


@dataclass(frozen=True)
class Interval:
    """A score, or a difference of two, with its 95 % interval.

    Where no interval can be had, low, high and p are NaN and `reason` says why.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # two-sided, of being 0
    standard_error: float = math.nan
    df: float = math.nan
    reason: str = ""

    @property
    def detectable(self) -> float:
        """The true difference that a test like this one finds with a probability of 80 %."""
        return float(stdtrit(self.df, 0.975) + stdtrit(self.df, 0.8)) * self.standard_error


def summarise(
    records: Sequence[Record], metric: str, directions: Mapping[str, Direction] = {}
) -> Summary:
    """The summary of one head's records; `metric` is that of records that name none.

    directions: of a user's metrics; registered ones have their own.

    Raises UserError for no records, an id that comes twice, or references that are all empty.
    """
    if not records:
        raise UserError("there are no predictions to compare; run the benchmark first")
    if len({(r.id, r.metric) for r in records}) < len(records):
        raise UserError("utterances are predicted twice; ids must differ")
    facts = sorted(
        [str(value) for key, value in r._asdict().items() if key not in PREDICTED] for r in records
    )
    by_metric: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_metric[record.metric or metric].append(record)
    clusters = sorted({cluster for r in records for cluster in r.clusters})
    samples: dict[str, Sample] = {}
    groups: dict[str, dict[str, float]] = {}
    for name, mine in by_metric.items():
        known = of_result(name, directions.get(name, "lower"))
        samples[name] = _sample(known, mine, clusters)
        if len({r.group for r in mine}) > 1:
            groups[name], views = _views(known, mine, clusters)
            samples |= {f"{name}/{view}": sample for view, sample in views.items()}
    return Summary(
        test=hashlib.sha256(repr(facts).encode()).hexdigest()[:12],
        utterances=len({r.id for r in records}),
        unit="folds" if records[0].fold else "speakers",
        clusters=clusters,
        samples=samples,
        groups=groups,
    )


def paired(a: Sequence[Summary], b: Sequence[Summary], metric: str) -> Interval:
    """`a` minus `b`, the heads of two upstreams in the order of their seeds, on one test set.

    Raises UserError if the test sets differ or there are not as many heads.
    """
    if len({summary.test for summary in [*a, *b]}) > 1:
        raise UserError("the two were tested on different utterances, references or speakers")
    if len(a) != len(b):
        raise UserError(f"{len(a)} head seeds against {len(b)}")
    return minus(stacked(a, metric), stacked(b, metric))


def minus(a: Sample, b: Sample) -> Interval:
    """The same of heads side by side."""
    return interval(Sample(a.whole - b.whole, a.without - b.without))


def stacked(summaries: Sequence[Summary], metric: str) -> Sample:
    """The heads of several seeds side by side."""
    samples = [summary.samples[metric] for summary in summaries]
    return Sample(*map(np.hstack, zip(*samples)))


def interval(sample: Sample) -> Interval:
    """The mean over heads and its interval.

    The seeds' component is the two-way analysis of variance of the same movements: var(seed means)
    minus the part that cluster-by-seed noise explains already, never negative.
    """
    clusters, seeds = sample.without.shape
    value = float(sample.whole.mean())
    moves = sample.without - sample.whole
    if clusters < 2 or not np.isfinite(moves).all():
        reason = (
            "nothing to score without one speaker or fold: how far another moves it is not known"
        )
        return Interval(value, reason=reason)
    shrink = (clusters - 1) / clusters
    mean_moves = moves.mean(1)
    by_cluster = variance = shrink * float((mean_moves**2).sum())
    df = float(clusters - 1)
    if seeds > 1:
        by_seed = float(sample.whole.var(ddof=1)) / seeds
        noise = shrink * float(((moves - mean_moves[:, None]) ** 2).sum()) / (seeds * (seeds - 1))
        if by_seed > noise:
            variance += by_seed - noise
            parts = by_cluster**2 / (clusters - 1) + by_seed**2 / (seeds - 1)
            df = variance**2 / (parts + noise**2 / ((clusters - 1) * (seeds - 1)))
            # Satterthwaite's formula with a subtraction can fall below either sample's own freedom
            df = max(df, min(clusters, seeds) - 1)
    error = math.sqrt(variance)
    if not sample.whole.any() and not moves.any():  # one result twice, or two perfect ones
        return Interval(value, p=1.0, reason="the same errors everywhere: no spread to go by")
    if error <= 1e-9 * abs(value):
        return Interval(value, reason="the same for every speaker or fold: no spread to go by")
    return from_error(value, error, df)


def from_error(value: float, error: float, df: float) -> Interval:
    """Student's t interval around `value` from its standard error and degrees of freedom."""
    half = float(stdtrit(df, 0.975)) * error
    p = 2 * float(stdtr(df, -abs(value) / error))
    return Interval(value, value - half, value + half, p, error, df)


def pooled(tuned: Sequence[Sequence[Summary]], base: Sequence[Summary], metric: str) -> Interval:
    """The mean of upstreams that differ in their fine-tuning seed, minus the base.

    An upstream is one draw of a way of making it: another fine-tuning seed gives other weights. The
    difference is the mean over K fine-tuning seeds, each the mean over its head seeds, minus the
    mean over the base's H head seeds. Its variance has three parts. Clusters: each speaker (or
    fold) left out in turn from the whole difference. Fine-tuning seeds: the variance of the K means
    over K, less what the clusters alone would make them differ by (`interval` takes the K means as
    it takes heads). The base's heads, common to all rows: their variance over H. Degrees of freedom
    are Satterthwaite's. With one fine-tuning seed nothing is known of another one: the interval is
    over speakers and head seeds.

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


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of several (Holm 1979), in the given order; NaN stays NaN."""
    adjusted = [math.nan] * len(ps)
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _sample(metric: Metric, records: Sequence[Record], clusters: Sequence[str]) -> Sample:
    """The score of one head, and without each cluster in turn.

    Ratios of sums have a closed form; whatever else is counted again without the cluster. With
    folds, which are the clusters, the score is their unweighted mean. What two speakers share, a
    trial or a mixture, goes with either: left out with its first speaker alone, it would show half
    of what a speaker moves.
    """
    score = metric.score
    if records[0].fold:
        alone = np.array([score([r for r in records if r.fold == c]) for c in clusters])
        whole, without = alone.mean(), _rest(alone) / (len(alone) - 1 or math.nan)
        return Sample(np.array([whole]), without[:, None])
    if counts := [r for r in records if isinstance(r, Count)]:
        sums = {cluster: np.zeros(2) for cluster in clusters}
        for count in counts:
            for cluster in count.clusters:
                sums[cluster] += count.errors, count.total
        whole = np.sum([(count.errors, count.total) for count in counts], axis=0)
        errors, total = (whole - [*sums.values()]).T
        rest = 100 * errors / np.where(total > 1e-9 * whole[1], total, math.nan)
        without = rest if metric.better == "lower" else 100 - rest
    else:
        again = metric.kept(records) if metric.kept else lambda k: score([*compress(records, k)])
        without = np.array([_or_nan(again, keep) for keep in _others(records, clusters)])
    return Sample(np.array([score(records)]), without[:, None])


def _views(
    metric: Metric, records: Sequence[Record], clusters: Sequence[str]
) -> tuple[dict[str, float], dict[str, Sample]]:
    """The score of every group of utterances (all folds together), and the VIEWS on them."""
    by_group: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_group[record.group].append(record._replace(fold="", speaker=AND.join(record.clusters)))
    parts = [_sample(metric, by_group[group], clusters) for group in sorted(by_group)]
    scores = Sample(*(np.stack(each)[..., 0] for each in zip(*parts)))  # [G], [G, C]
    worst = np.max if metric.better == "lower" else np.min
    views = {
        "macro": Sample(*(np.mean(x, 0, keepdims=True).T for x in scores)),
        "worst": Sample(*(worst(x, 0, keepdims=True).T for x in scores)),
        "spread": Sample(*(np.ptp(x, 0, keepdims=True).T for x in scores)),
    }
    return dict(zip(sorted(by_group), scores.whole.tolist())), views


def _rest(parts: Array) -> Array:
    """Of each part, the sum of all others."""
    return parts.sum() - parts


def _others(records: Sequence[Record], clusters: Sequence[str]) -> Iterator[NDArray[np.bool_]]:
    """For each cluster a mask of the records without it."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        for cluster in record.clusters:
            members[cluster].append(index)
    for cluster in clusters:
        keep = np.ones(len(records), dtype=bool)
        keep[members[cluster]] = False
        yield keep


def _or_nan(score: Callable[[Any], float], kept: Any) -> float:
    """NaN where what is kept has no score, such as an EER without impostors."""
    try:
        return score(kept)
    except UserError:
        return math.nan
