"""Metrics: s3prl's own numbers, and the two directions."""

from __future__ import annotations

import pytest

from downstream.base import METRICS, Count, Tally, Trial
from downstream.tasks.metrics import accuracy, cer, per, wer
from upstream.common.errors import UserError

# Values from s3prl's downstream/ctc/metric.py; the slot markers count as words and characters.
SLOTS = [
    (
        "ADD B-track THE HOLY E-track TO B-playlist MY LIST E-playlist",
        "ADD B-track THE HOLE E-track TO B-artist MY LIST E-artist",
    ),
    ("PLAY B-artist ABBA E-artist", "PLAY ABBA"),
    ("WHAT TIME IS IT", "WHAT TIME B-city IS E-city IT"),
    (
        "BOOK B-city ROME E-city AND B-city OSLO E-city",
        "BOOK B-city ROMA E-city AND OSLO",
    ),
]


def corpus_score(name: str, pairs: list[tuple[str, str]]) -> float:
    metric = METRICS[name]
    assert metric.count is not None
    return metric.score([Count("", "", *pair, *metric.count(*pair)) for pair in pairs])


@pytest.mark.parametrize(
    ("name", "expected"), [("wer", 0.38461538461538464), ("cer", 0.37583892617449666)]
)
def test_edit_rates_agree_with_s3prl(name: str, expected: float) -> None:
    assert corpus_score(name, SLOTS) == pytest.approx(100 * expected, abs=1e-12)


def test_phone_error_rate_agrees_with_s3prl() -> None:
    assert corpus_score("per", [("SIL", ""), ("AA B C", "AA B")]) == 50.0


def test_words_split_at_any_space_but_phones_at_each() -> None:
    assert wer("A  B", "A B") == Tally(0, 2)
    assert per("", "") == Tally(0, 1)
    assert per("", "AA") == Tally(1, 1)
    assert cer("A B", "AB") == Tally(1, 3)


def test_accuracy_counts_errors_but_shows_successes() -> None:
    assert accuracy("happy", "sad") == Tally(1, 1)
    assert corpus_score("accuracy", [("a", "a"), ("a", "a"), ("a", "a"), ("b", "a")]) == 75.0
    assert METRICS["accuracy"].arrow == "↑"


def test_more_errors_than_words_is_more_than_100() -> None:
    assert corpus_score("wer", [("A", "B C D")]) == 300.0


def test_a_score_of_nothing_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="nothing to score"):
        corpus_score("wer", [("", "A")])


def trials(scores: list[float], labels: list[int]) -> list[Trial]:
    return [Trial(f"t{i}", "a", "b", *pair, "s") for i, pair in enumerate(zip(scores, labels))]


def test_equal_error_rate_agrees_with_s3prl() -> None:
    """The golden values of the specification (6.4), in any order of the trials."""
    scores = [0.9, 0.8, 0.7, 0.35, 0.6, 0.5, 0.3, 0.2, 0.1, 0.55]
    labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    eer = METRICS["eer"].score
    assert eer(trials(scores, labels)) == pytest.approx(20, abs=1e-12)
    assert eer(trials(scores[::-1], labels[::-1])) == pytest.approx(20, abs=1e-12)
    assert eer(trials([2.0, 1.0], [1, 0])) == 0 and eer(trials([1.0, 2.0], [1, 0])) == 100
    assert eer(trials([1.0, 1.0, 1.0], [1, 0, 0])) == pytest.approx(50)  # ties say nothing


def test_an_equal_error_rate_needs_both_labels() -> None:
    with pytest.raises(UserError, match="check the labels"):
        METRICS["eer"].score(trials([0.5, 0.1], [1, 1]))
