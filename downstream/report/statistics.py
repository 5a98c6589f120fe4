"""How sure a score, or the difference between two, is: t intervals over clusters and head seeds.

One method everywhere. What was drawn is the cluster: a speaker, or where a task is scored in folds
the fold, whose speakers share one head. Each cluster is left out in turn (the delete-one jackknife)
and the movement of the score gives its variance. Heads trained from several seeds are a second
sample, crossed with the clusters: their variance component is added and the degrees of freedom are
Satterthwaite's. A percentile bootstrap covers too little with few clusters (IEMOCAP has 5 folds)
and agrees with t where there are many.

Three seeds say little of how much seeds matter: a variance of 2 degrees of freedom is anything
from 0.05 to 3 times the true one, and intervals from it are a lottery. So the seeds' variance is
pooled over all upstreams that were scored on the same task (`SeedSpread`): what changes with the
seed, first weights and order of batches, is the same for all of them, and how much a head minds is
a matter of head, recipe and training data first. What an interval then depends on is which
upstreams have results on the task: a further one moves it a little, and one whose heads are much
shakier than the others' widens theirs and has its own too narrow. Speakers are not pooled: between
pairs of upstreams the variance of their differences is known to vary sevenfold.

tests/downstream/test_coverage.py simulates coverage, false verdicts and how much widths vary; with
fewer than three seeds there is no verdict, with fewer than FEWEST clusters no interval.

All values are in per cent, or percentage points, of the metric as it is shown (accuracy: upwards).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from downstream.base import Direction
from downstream.report.summary import Array, Sample, Summary, stacked
from upstream.common.errors import UserError

FEWEST = 5  # clusters; with fewer, nine half-widths in ten differ by up to five times and more


class SeedSpread(NamedTuple):
    """How far heads of an upstream lie apart that only their seed tells apart, over upstreams.

    All heads of an upstream against its mean, so that upstreams may differ in their seeds. The
    difference of two upstreams has twice the variance; if the same seed is good or bad for both,
    less, and the interval is wider than it need be (in the demo no such effect is seen).
    """

    variance: float  # of one head's score, in points squared
    noise: float  # the part of it that chance on each speaker makes, which clusters show already
    df: int  # the sum over upstreams of their seeds - 1
    noise_df: int
    upstreams: int  # with at least two seeds

    @property
    def component(self) -> float:
        """What the seed itself makes of the variance."""
        return max(0.0, self.variance - self.noise)


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
    clusters: int = 0
    seeds: int = 0
    seed_variance: float = 0.0  # the part of standard_error ** 2 that more seeds make smaller

    def detectable(self, tests: int = 1) -> float:
        """The true difference that gets a verdict with a probability of 80 %, from noncentral t.

        tests: in the family that p is adjusted for; Holm's first step is at 0.05 / tests.
        """
        if not self.standard_error > 0:
            return math.nan
        critical = float(stdtrit(self.df, 1 - 0.025 / tests))
        return float(nctdtrinc(self.df, 0.2, critical)) * self.standard_error

    def p_kept(self, margin: float, better: Direction) -> float:
        """One-sided p of being worse by `margin` points or more; NaN where nothing is known."""
        if not self.standard_error > 0 or not margin > 0:
            return math.nan
        gain = -self.value if better == "lower" else self.value
        return float(stdtr(self.df, -(gain + margin) / self.standard_error))


def paired(
    a: Sequence[Summary], b: Sequence[Summary], metric: str, spread: SeedSpread | None = None
) -> Interval:
    """`a` minus `b`, the heads of two upstreams in the order of their seeds, on one test set.

    spread: of more upstreams than these two. Raises UserError if the test sets differ or there are
    not as many heads.
    """
    if len({summary.test for summary in [*a, *b]}) > 1:
        raise UserError("the two were tested on different utterances, references or speakers")
    if len(a) != len(b):
        raise UserError(f"{len(a)} head seeds against {len(b)}")
    return minus(stacked(a, metric), stacked(b, metric), spread)


def minus(a: Sample, b: Sample, spread: SeedSpread | None = None) -> Interval:
    """The same of heads side by side; without `spread` that of these two."""
    difference = Sample(a.whole - b.whole, a.without - b.without)
    return interval(difference, spread or seed_spread([a, b]), 2)


def seed_spread(upstreams: Sequence[Sample]) -> SeedSpread | None:
    """Pooled over upstreams on one test set; None if none of them has two heads."""
    several = [u for u in upstreams if len(u.whole) > 1 and np.isfinite(u.without).all()]
    if not several:
        return None
    clusters = len(several[0].without)
    df = sum(len(u.whole) - 1 for u in several)
    squares = sum(float(((u.whole - u.whole.mean()) ** 2).sum()) for u in several)
    chance = sum(float((_meeting(u) ** 2).sum()) for u in several)
    noise = (clusters - 1) / clusters * chance / df
    return SeedSpread(squares / df, noise, df, max(1, clusters - 1) * df, len(several))


def _meeting(sample: Sample) -> Array:
    """[C, K]: how leaving a cluster out moves a head, beyond how it moves all of them."""
    moves = sample.without - sample.whole
    rest: Array = moves - moves.mean(1, keepdims=True)
    return rest


def interval(sample: Sample, spread: SeedSpread | None = None, sides: int = 1) -> Interval:
    """The mean over K heads and its interval.

    spread: of the heads of one upstream, `sides` of which are in each head's value: 1 in a score,
    2 in a difference. Without it the heads at hand are all that is known. The variance is that of
    the clusters, from the mean over heads, plus the seeds' component over K.
    """
    clusters, seeds = sample.without.shape
    value = float(sample.whole.mean())
    moves = sample.without - sample.whole
    if clusters < FEWEST:
        return Interval(
            value, reason=f"too few speakers or folds ({clusters}): {FEWEST} are needed"
        )
    if not np.isfinite(moves).all():
        reason = (
            "nothing to score without one speaker or fold: how far another moves it is not known"
        )
        return Interval(value, reason=reason)
    if not sample.whole.any() and not moves.any():  # one result twice, or two perfect ones
        return Interval(value, p=1.0, reason="the same errors everywhere: no spread to go by")
    shrink = (clusters - 1) / clusters
    by_cluster = shrink * float((moves.mean(1) ** 2).sum())
    if spread is None:
        spread, sides = seed_spread([sample]), 1
    by_seed, df = 0.0, float(clusters - 1)
    if spread is not None:
        share = sides / seeds
        by_seed = share * spread.component
        parts = by_cluster**2 / (clusters - 1) + (share * spread.variance) ** 2 / spread.df
        parts += (share * spread.noise) ** 2 / spread.noise_df
        # Satterthwaite's formula with a subtraction can fall below either sample's own freedom
        df = max((by_cluster + by_seed) ** 2 / parts, min(clusters - 1, spread.df)) if parts else df
    error = math.sqrt(by_cluster + by_seed)
    if error <= 1e-9 * abs(value):
        return Interval(value, reason="the same for every speaker or fold: no spread to go by")
    found = from_error(value, error, df)
    return replace(found, clusters=clusters, seeds=seeds, seed_variance=by_seed)


def from_error(value: float, error: float, df: float) -> Interval:
    """Student's t interval around `value` from its standard error and degrees of freedom."""
    half = float(stdtrit(df, 0.975)) * error
    p = 2 * float(stdtr(df, -abs(value) / error))
    return Interval(value, value - half, value + half, p, error, df)


def pooled(
    tuned: Sequence[Sequence[Summary]],
    base: Sequence[Summary],
    metric: str,
    spread: SeedSpread | None = None,
) -> Interval:
    """The mean of upstreams that differ in their fine-tuning seed, minus the base.

    An upstream is one draw of a way of making it: another fine-tuning seed gives other weights. The
    difference is the mean over K fine-tuning seeds, each the mean over its head seeds, minus the
    mean over the base's H head seeds. Its variance has three parts. Clusters: each speaker (or
    fold) left out in turn from the whole difference. Fine-tuning seeds: the variance of the K means
    over K, less what the clusters alone would make them differ by (`interval` takes the K means as
    it takes heads). The base's heads, common to all rows: their variance over H. Degrees of freedom
    are Satterthwaite's. With one fine-tuning seed nothing is known of another one: the interval is
    over speakers and head seeds. `spread` tells of head seeds; that of fine-tuning seeds is known
    from this way of making alone.

    Raises UserError, as `paired` does, if the test sets differ.
    """
    first, heads = tuned[0], min(len(tuned[0]), len(base))
    if len(tuned) == 1:
        return paired(first[:heads], base[:heads], metric, spread)
    for each in tuned:
        paired(each[:1], base[:1], metric)  # refuses other test sets
    ours = [stacked(each, metric) for each in tuned]
    theirs = stacked(base, metric)
    whole = np.array([each.whole.mean() for each in ours]) - theirs.whole.mean()
    without = np.stack([each.without.mean(1) for each in ours], 1) - theirs.without.mean(1)[:, None]
    found = interval(Sample(whole, without))
    heads_spread = spread or seed_spread([theirs])
    if found.reason or heads_spread is None:
        return found
    ways, common = found.standard_error**2, heads_spread.variance / len(theirs.whole)
    variance = ways + common
    freedom = variance**2 / (ways**2 / found.df + common**2 / heads_spread.df)
    result = from_error(found.value, math.sqrt(variance), freedom)
    return replace(result, clusters=found.clusters, seeds=found.seeds,
                   seed_variance=found.seed_variance + common)  # fmt: skip


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of several (Holm 1979), in the given order; NaN stays NaN."""
    adjusted = [math.nan] * len(ps)
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted
