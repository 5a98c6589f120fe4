"""How sure a score, or the difference between two, is: t intervals over speakers and head seeds.

One method everywhere. Utterances of one speaker are alike, so the speaker is the unit that was
drawn: each speaker is left out in turn (the jackknife of a ratio of sums) and the score's movement
gives the variance. Heads trained from several seeds are a second sample, crossed with the speakers:
their variance component is added and the degrees of freedom are Satterthwaite's. The interval is
Student's t, with S - 1 degrees of freedom for S speakers when there is one seed. A percentile
bootstrap over speakers covers too little with few of them (IEMOCAP has 10), and with many it agrees
with t, so there is no second method. Simulated coverage is 93-97 % (tests/test_statistics.py), and
92 % when nearly all variation comes from three seeds. With one seed the interval is about these
heads only: what another seed would have given is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from upstream.common.errors import UserError

# One row per utterance and seed; columns id, speaker, errors, total, seed and, for tasks scored in
# folds, fold (the score is then the unweighted mean of the folds' scores).
Rows: TypeAlias = pd.DataFrame
Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """An error rate, or a difference of two, with its 95 % interval, in percentage points.

    `interval` returns one too: the difference from making no error, whose p means nothing (NaN).
    Where no interval can be had, low, high and p are NaN and `reason` says why.
    """

    estimate: float
    low: float
    high: float
    speakers: int
    p: float  # two-sided, from the same t as the interval
    utterances: int
    seeds: int
    df: float
    reason: str = ""

    def __neg__(self) -> Difference:
        """The same, seen from the other side."""
        return replace(self, estimate=-self.estimate, low=-self.high, high=-self.low)


class Spread(NamedTuple):
    """What `jackknife` returns; rates are fractions, not per cent."""

    estimate: float
    variance: float
    df: float
    speakers: int


def paired(a: Rows, b: Rows) -> Difference:
    """Error rate of `a` minus that of `b`, paired by utterance and seed.

    Negative means that `a` makes fewer errors; turn the sign (`-d`) to show a metric for which
    higher is better. Raises UserError if the two do not cover the same utterances and seeds.
    """
    x, y = _wide(a), _wide(b)
    _require_same("utterances", x.facts.index, y.facts.index)
    _require_same("head seeds", x.seeds, y.seeds)
    for column in ("total", "speaker", "fold"):
        differs = x.facts.index[(x.facts[column] != y.facts[column]).to_numpy()]
        if len(differs):
            raise UserError(
                f"the two results disagree on the {column} of {len(differs)} utterances "
                f"({_some(differs)}); score both on the same corpus"
            )
    return _interval(x.errors - y.errors, x.facts)


def interval(rows: Rows) -> Difference:
    """The error rate of one result with its 95 % interval."""
    wide = _wide(rows)
    return replace(_interval(wide.errors, wide.facts), p=math.nan)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of several (Holm 1979), in the given order; NaN stays NaN."""
    adjusted = [math.nan] * len(ps)
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def jackknife(errors: Array, total: Array, speaker: NDArray, fold: NDArray) -> Spread:
    """The rate sum(errors) / sum(total), averaged over seeds and folds, and its variance.

    errors [N, K] (utterances, seeds), or differences of two results' errors; total, speaker and
    fold [N]. Leaving speaker s out moves the rate by exactly -influence / (1 - share), so no loop
    is needed. The seeds' component is the two-way analysis of variance of the same movements:
    var(seed means) minus the part that speaker-by-seed noise explains already, never negative.
    """
    _, folds = np.unique(fold, return_inverse=True)
    fold_total = np.bincount(folds, total)
    if not fold_total.all():
        raise UserError("all references are empty; check the labels of the test set")
    # each fold weighs the same, whatever its length; weight @ total is 1
    weight = 1 / (fold_total[folds] * len(fold_total))
    _, speakers = np.unique(speaker, return_inverse=True)
    share = np.bincount(speakers, weight * total)  # [S]
    rates = weight @ errors  # [K], one per seed
    size, seeds = len(share), len(rates)
    if size < 2 or math.isclose(share.max(), 1):
        return Spread(float(rates.mean()), math.nan, math.nan, size)

    influence = np.zeros((size, seeds))
    np.add.at(influence, speakers, weight[:, None] * (errors - total[:, None] * rates))
    moves = influence / (1 - share)[:, None]  # [S, K]
    mean_moves = moves.mean(1)
    shrink = (size - 1) / size
    by_speaker = shrink * float((mean_moves**2).sum())
    if seeds == 1:
        return Spread(float(rates[0]), by_speaker, size - 1, size)

    by_seed = float(rates.var(ddof=1)) / seeds
    noise = shrink * float(((moves - mean_moves[:, None]) ** 2).sum()) / (seeds * (seeds - 1))
    variance, df = by_speaker, float(size - 1)
    if by_seed > noise:
        variance += by_seed - noise
        parts = by_speaker**2 / (size - 1) + by_seed**2 / (seeds - 1)
        df = variance**2 / (parts + noise**2 / ((size - 1) * (seeds - 1)))
        # Satterthwaite's formula with a subtraction can fall below either sample's own freedom
        df = max(df, min(size, seeds) - 1)
    return Spread(float(rates.mean()), variance, df, size)


class _Wide(NamedTuple):
    errors: Array  # [N, K]
    seeds: pd.Index  # [K]
    facts: pd.DataFrame  # index id [N], sorted; columns total, speaker, fold


def _wide(rows: Rows) -> _Wide:
    if rows.empty:
        raise UserError("there are no predictions to compare; run the benchmark first")
    rows = rows if "fold" in rows else rows.assign(fold="")
    twice = rows.duplicated(["id", "seed"])
    if twice.any():
        raise UserError(
            f"utterances are predicted twice ({_some(rows.id[twice])}); ids must differ"
        )
    errors = rows.pivot(index="id", columns="seed", values="errors")
    if errors.isna().any(axis=None):
        gaps = errors.index[errors.isna().any(axis=1)]
        raise UserError(f"{len(gaps)} utterances are missing for some seeds ({_some(gaps)})")
    by_id = rows.groupby("id")[["total", "speaker", "fold"]]
    varies = (by_id.nunique() > 1).any(axis=1)
    if varies.any():
        raise UserError(
            f"total, speaker or fold changes between seeds ({_some(varies.index[varies])}); "
            "the seeds were scored on different corpora: delete the older results"
        )
    return _Wide(errors.to_numpy(float), errors.columns, by_id.first())


def _interval(errors: Array, facts: pd.DataFrame) -> Difference:
    total, speaker, fold = (facts[c].to_numpy() for c in ("total", "speaker", "fold"))
    spread = jackknife(errors, total.astype(float), speaker, fold)
    estimate, se = spread.estimate, math.sqrt(spread.variance)
    low = high = p = math.nan
    reason = ""
    if math.isnan(se):
        reason = "one speaker: how far the score would move with another cannot be known"
    elif not errors.any():  # two perfect results, or one result twice: a tie, of unknown width
        p, reason = 1.0, "the same errors in every utterance: no spread to estimate from"
    elif se <= 1e-9 * abs(estimate):
        reason = "the same score for every speaker: no spread to estimate from"
    else:
        half = float(stdtrit(spread.df, 0.975)) * se
        low, high = 100 * (estimate - half), 100 * (estimate + half)
        p = 2 * float(stdtr(spread.df, -abs(estimate) / se))
    return Difference(
        100 * estimate,
        low,
        high,
        spread.speakers,
        p,
        len(total),
        errors.shape[1],
        spread.df,
        reason,
    )


def _require_same(what: str, a: pd.Index, b: pd.Index) -> None:
    only_a, only_b = a.difference(b), b.difference(a)
    if len(only_a) or len(only_b):
        parts = [
            f"{len(only)} only in the {which} ({_some(only)})"
            for only, which in ((only_a, "first"), (only_b, "second"))
            if len(only)
        ]
        raise UserError(f"the two results have different {what}: {', '.join(parts)}")


def _some(names: pd.Index | pd.Series) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
