"""SID as SUPERB does it: one linear projection, mean over time, one linear layer, accuracy.

Source: s3prl downstream/voxceleb1. There is no activation, so the head is affine in the time mean
and one mean per layer and utterance is all it needs (exact). Training crops of 8 seconds are the
recipe's `crop`. `CLASSIFY` is the same task for any other label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from downstream.base import Labels, Task


def labels(_tokens: str, targets: Sequence[str]) -> Labels:
    """One class for each label of the training set, in sorted order."""
    refusal = "label {!r} is in dev or test but not in train: add utterances or drop the rows"
    return Labels(tuple(sorted(set(targets))), refusal=refusal)


TASK = Task("sid", "mean", "utterance", ("accuracy",), labels)
CLASSIFY = replace(TASK, name="classify")
