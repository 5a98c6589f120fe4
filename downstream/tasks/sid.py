"""SID as SUPERB does it: one linear projection, mean over time, one linear layer, accuracy.

Source: s3prl downstream/voxceleb1. There is no activation, so the head is affine in the time mean
and one mean per layer and utterance is all it needs (exact). Training crops of 8 seconds are the
recipe's `crop`. `CLASSIFY` is the same task for any other label.
"""

from __future__ import annotations

from dataclasses import replace

from downstream.base import Task
from downstream.tasks.labels import Classes

TASK = Task("sid", "mean", "utterance", ("accuracy",), Classes.of)
CLASSIFY = replace(TASK, name="classify")
