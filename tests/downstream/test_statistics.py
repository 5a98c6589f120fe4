import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import stdtrit

from downstream.report.statistics import holm, interval, jackknife, paired
from upstream.common.errors import UserError

REPEATS = 3000
TRUTH = 0.02


def made_up(seed: int = 0, speakers: int = 6, seeds: int = 3, shift: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": f"u{s}-{i}",
            "speaker": f"s{s}",
            "errors": float(rng.binomial(5 + i, min(0.9, 0.2 + 0.05 * s + shift))),
            "total": 5.0 + i,
            "seed": k,
            "fold": f"fold{s % 2}",
        }
        for s in range(speakers)
        for i in range(4 + s)
        for k in range(seeds)
    )


# --- what the numbers are ---------------------------------------------------------------------


def test_one_seed_is_the_jackknife_over_speakers() -> None:
    rows = made_up(seeds=1).assign(fold="")
    left_out = []
    for speaker in rows.speaker.unique():
        rest = rows[rows.speaker != speaker]
        left_out.append(rest.errors.sum() / rest.total.sum())
    rate = rows.errors.sum() / rows.total.sum()
    size = len(left_out)
    se = math.sqrt((size - 1) / size * sum((x - rate) ** 2 for x in left_out))
    half = stats.t.ppf(0.975, size - 1) * se
    found = interval(rows)
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (100 * rate, 100 * (rate - half), 100 * (rate + half))
    )
    assert (found.speakers, found.utterances, found.seeds) == (6, len(rows), 1)
    assert math.isnan(found.p)


def test_equal_totals_and_one_seed_are_a_paired_t_test_over_speakers() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(size=(2, 8))
    a, b = (
        pd.DataFrame({"id": range(8), "speaker": range(8), "errors": m, "total": 1.0, "seed": 0})
        for m in means
    )
    expected = stats.ttest_rel(*means)
    ends = expected.confidence_interval(0.95)
    found = paired(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((100 * ends.low, 100 * ends.high))


def test_folds_weigh_the_same_whatever_their_length() -> None:
    rows = made_up()
    by_fold = rows.groupby("fold")[["errors", "total"]].sum()
    assert by_fold.total.nunique() == 2
    expected = (by_fold.errors / by_fold.total).mean()
    assert interval(rows).estimate == pytest.approx(100 * expected)
    assert interval(rows.drop(columns="fold")).estimate != pytest.approx(100 * expected)


def test_a_result_does_not_differ_from_itself() -> None:
    rows = made_up()
    found = paired(rows, rows)
    assert (found.estimate, found.p) == (0, 1)
    assert math.isnan(found.low)
    assert "no spread" in found.reason


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_swapping_turns_the_sign_and_the_order_of_rows_is_nothing(seed: int) -> None:
    a, b = made_up(seed), made_up(seed + 1, shift=0.1)
    forward, backward = paired(a, b), paired(b, a)
    assert (-backward).estimate == pytest.approx(forward.estimate)
    assert ((-backward).low, (-backward).high) == pytest.approx((forward.low, forward.high))
    assert backward.p == pytest.approx(forward.p)
    shuffled = paired(a.sample(frac=1, random_state=seed % 1000), b.sample(frac=1, random_state=1))
    assert shuffled == forward


def test_seeds_that_disagree_widen_the_interval() -> None:
    rows = made_up(seeds=1)
    steady = pd.concat([rows.assign(seed=k) for k in range(3)])
    shaky = pd.concat([rows.assign(seed=k, errors=rows.errors + k * rows.total) for k in range(3)])
    alone, same, wide = interval(rows), interval(steady), interval(shaky)
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high))
    assert wide.high - wide.low > 5 * (same.high - same.low)
    assert wide.df < same.df


# --- what cannot be known, and mistakes ---------------------------------------------------------


def test_one_speaker_has_no_interval() -> None:
    found = interval(made_up(speakers=1))
    assert math.isfinite(found.estimate)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert "one speaker" in found.reason


def test_a_perfect_score_has_no_made_up_certainty() -> None:
    found = interval(made_up().assign(errors=0.0))
    assert found.estimate == 0
    assert math.isnan(found.low)
    assert found.reason


def test_different_utterances_are_refused_by_name() -> None:
    rows = made_up()
    with pytest.raises(UserError, match=r"different utterances: 1 only in the first \(u0-0\)"):
        paired(rows, rows[rows.id != "u0-0"])


def test_different_seeds_references_and_doubles_are_refused() -> None:
    rows = made_up()
    with pytest.raises(UserError, match="different head seeds"):
        paired(rows, rows.assign(seed=rows.seed + 1))
    with pytest.raises(UserError, match="disagree on the total"):
        paired(rows, rows.assign(total=rows.total + 1))
    with pytest.raises(UserError, match="predicted twice"):
        interval(pd.concat([rows, rows[:1]]))
    with pytest.raises(UserError, match="missing for some seeds"):
        interval(rows[1:])
    with pytest.raises(UserError, match="changes between seeds"):
        interval(rows.assign(total=rows.total + rows.seed))


# --- Holm ---------------------------------------------------------------------------------------


def test_holm_keeps_the_order_and_leaves_out_what_is_unknown() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    adjusted = holm([0.02, math.nan, 0.02])
    assert adjusted[0] == adjusted[2] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])


# --- coverage -----------------------------------------------------------------------------------


def worlds(speakers: int, seeds: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Differences of errors with true rate TRUTH: speakers, seeds, their meeting, and utterances
    all vary; speakers say 5 to 40 utterances of 5 to 30 words."""
    rng = np.random.default_rng(speakers * 10 + seeds)
    for _ in range(REPEATS):
        sizes = rng.integers(5, 41, speakers)
        who = np.repeat(np.arange(speakers), sizes)
        total = rng.integers(5, 31, len(who)).astype(float)
        rate = TRUTH + 0.05 * rng.normal(size=speakers)[who][:, None]
        if seeds > 1:
            rate = rate + 0.02 * rng.normal(size=seeds)
        rate = rate + 0.02 * rng.normal(size=(speakers, seeds))[who]
        yield total[:, None] * (rate + 0.2 * rng.normal(size=(len(who), seeds))), total, who


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("speakers", [10, 40])
def test_95_per_cent_intervals_cover_95_per_cent(speakers: int, seeds: int) -> None:
    ours = naive = 0
    for errors, total, who in worlds(speakers, seeds):
        found = jackknife(errors, total, who, np.zeros(len(who)))
        half = stats_t(found.df) * math.sqrt(found.variance)
        ours += abs(found.estimate - TRUTH) < half
        utterances = np.arange(len(who))  # as if every utterance were a speaker of its own
        plain = jackknife(errors.mean(1, keepdims=True), total, utterances, np.zeros(len(who)))
        naive += abs(plain.estimate - TRUTH) < stats_t(plain.df) * math.sqrt(plain.variance)
    assert 0.93 <= ours / REPEATS <= 0.97
    assert naive / REPEATS < 0.85


def stats_t(df: float) -> float:
    return float(stdtrit(df, 0.975))
