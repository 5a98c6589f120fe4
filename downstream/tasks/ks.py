"""KS as SUPERB does it: ten words, any other word, silence; the head of SID, accuracy.

Source: s3prl downstream/speech_commands. With `train.balanced` the classes are drawn equally often,
in training and for the selection on dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from downstream.base import Labels
from downstream.tasks import sid

UNKNOWN, SILENCE = "_unknown_", "_silence_"
CLASSES = (*"yes no up down left right on off stop go".split(), UNKNOWN, SILENCE)


def labels(tokens: str, targets: Sequence[str]) -> Labels:
    """SUPERB's 12 classes in its order, or one for each label of the training set."""
    refusal = "{!r} is none of SUPERB's 12 classes; write tokens: train to take the labels of train"
    return Labels(CLASSES, refusal=refusal) if tokens == "superb" else sid.labels(tokens, targets)


TASK = replace(sid.TASK, name="ks", labels=labels)
