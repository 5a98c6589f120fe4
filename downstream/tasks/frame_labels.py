"""The head of PC: one linear layer says what is heard in each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.tasks.heads import Head
from upstream.features.device import moved

UNLABELLED = -100  # frames that no segment covers: neither learnt nor counted


class FrameLabels(Head):
    """Linear(D -> classes) on every frame, cross-entropy (s3prl downstream/phone_linear)."""

    per_frame = True

    def __init__(self, layers: int, dim: int, classes: int) -> None:
        super().__init__(layers)
        self.linear = nn.Linear(dim, classes)

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, classes]."""
        return self.linear(features)

    def loss(self, logits: Tensor, lens: Tensor, targets: Sequence[Sequence[Any]]) -> Tensor:
        """The mean over all labelled frames of the batch; 0 if there are none.

        targets: for each utterance (class, first frame, frame after the last). What they say
        beyond the features is cut; s3prl repeats the last feature frame there instead.
        """
        right = torch.full(logits.shape[:2], UNLABELLED)
        for row, target, n in zip(right, targets, lens.tolist()):
            for number, first, end in target:
                row[first : min(end, n)] = number
        right = moved(right, logits.device)
        total = F.cross_entropy(logits.transpose(1, 2), right, reduction="sum")
        return total / (right != UNLABELLED).sum().clamp(min=1)

    def counts(self, frames: int, target: Sequence[Any]) -> float:
        """Its labelled frames."""
        return len({k for _, first, end in target for k in range(first, min(end, frames))})

    def predict(self, logits: Tensor, lens: Tensor) -> list[Any]:
        """The class of each frame: [T] NumPy."""
        best = logits.argmax(-1).cpu().numpy()
        return [row[:n] for row, n in zip(best, lens.tolist())]
