"""Vocabularies: SUPERB's sizes, targets and decoded text."""

from __future__ import annotations

import pytest

from downstream.tasks import asr, pr, sid
from upstream.common.errors import UserError


def test_asr_vocabulary_is_superbs() -> None:
    labels = asr.labels("superb", [])
    assert labels.size == 32
    assert labels.encode("A CAT") == [7, 4, 18, 7, 6, 4, 2]  # A | C A T | </s>
    assert labels.decode(labels.encode("A CAT")) == "A CAT"


def test_asr_vocabulary_from_training_text_knows_unknown() -> None:
    labels = asr.labels("train", ["FÜR", "ES"])
    assert labels.decode(labels.encode("FÜR")) == "FÜR"
    assert labels.encode("X")[0] == asr.SPECIALS.index("<unk>")
    assert labels.unknown("EX FÜR X") == ["X", "X"] and labels.decode(labels.encode("X")) == ""


def test_targets_of_speech_ft_are_plain_characters() -> None:
    """No separator behind the last word and no end token; two words for the rest."""
    labels = asr.TED.labels("superb", [])
    assert labels.size == 32
    assert labels.encode("A CAT") == [7, 4, 18, 7, 6]  # A | C A T
    assert labels.decode(labels.encode("A CAT")) == "A CAT"


def test_text_is_compared_in_one_spelling() -> None:
    assert asr.normalised("für It's") == asr.normalised("FU\u0308R iT'S") == "FÜR IT'S"


def test_pr_vocabulary_is_superbs() -> None:
    labels = pr.labels("superb", [])
    assert labels.size == 74
    ids = labels.encode("HH AH0 L OW1")
    assert ids[-1] == 1 and 0 not in ids
    assert labels.decode(ids) == "HH AH0 L OW1"


def test_pr_refuses_a_foreign_phone() -> None:
    with pytest.raises(UserError, match="tokens: train"):
        pr.labels("superb", []).encode("HH @")


def test_a_run_around_eos_collapses_before_eos_is_removed() -> None:
    labels = pr.labels("train", ["A B"])
    a = labels.encode("A")[0]
    assert labels.decode([a, 1, a]) == "A A"


def test_classes_are_the_training_labels() -> None:
    labels = sid.TASK.labels("train", ["b", "a", "b"])
    assert labels.size == 2 and labels.encode("b") == [1] and labels.decode([0]) == "a"
    with pytest.raises(UserError, match="'c' is in dev or test but not in train"):
        labels.encode("c")
