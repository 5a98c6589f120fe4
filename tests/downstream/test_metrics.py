import pytest

from downstream.base import Tally
from downstream.tasks.metrics import METRICS, accuracy, cer, per, score, wer
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
    counts = [metric.count(reference, hypothesis) for reference, hypothesis in pairs]
    return score(metric, sum(c.errors for c in counts), sum(c.total for c in counts))


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
    with pytest.raises(UserError, match="WER of nothing"):
        corpus_score("wer", [("", "A")])
