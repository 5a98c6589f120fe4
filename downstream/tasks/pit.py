"""The head of SD: an LSTM whose outputs say who speaks in each frame, in whichever order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.tasks.heads import Depth, Head, Width
from upstream.base import valid
from upstream.features.device import moved


class RecurrentPIT(Head):
    """LSTM(D -> hidden) forwards in time, Linear(hidden -> speakers) on every frame.

    Trained with the permutation-invariant loss (s3prl downstream/diarization/model.py, utils.py).
    """

    def __init__(
        self, layers: int, dim: int, classes: int, *, hidden: Width = 512, depth: Depth = 1
    ) -> None:
        super().__init__(layers)
        self.lstm = nn.LSTM(dim, hidden, depth, batch_first=True)
        self.linear = nn.Linear(hidden, classes)

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, speakers]; padding comes last, where no valid frame hears it."""
        return self.linear(self.lstm(features)[0])

    def loss(self, logits: Tensor, lens: Tensor, targets: Sequence[Sequence[Any]]) -> Tensor:
        """Binary cross-entropy of the best order of speakers, per valid frame and speaker.

        targets: for each utterance (speaker, first frame, frame after the last). The features
        decide how many frames there are: what a target says beyond them is cut. s3prl repeats the
        last feature frame instead, which differs by one frame at the end at most.
        """
        active = torch.zeros(logits.shape)
        for row, target in zip(active, targets):
            for speaker, first, end in target:
                row[first:end, speaker] = 1
        active = moved(active, logits.device)
        lens = moved(lens, logits.device)
        mask = valid(lens, logits.shape[1])
        each = [  # s3prl's orders: every permutation of the labels
            F.binary_cross_entropy_with_logits(logits, active[:, :, order], reduction="none")
            for order in map(list, itertools.permutations(range(logits.shape[2])))
        ]
        sums = torch.stack([(loss.mean(2) * mask).sum(1) for loss in each])
        return sums.min(0).values.sum() / lens.sum()

    def counts(self, frames: int, target: Sequence[Any]) -> float:
        """Its frames."""
        return frames

    def predict(self, logits: Tensor, lens: Tensor) -> list[Any]:
        """How sure it is of each speaker in each frame: [T, speakers] in 0..1, NumPy."""
        rows = logits.detach().sigmoid().cpu().numpy()
        return [row[:n] for row, n in zip(rows, lens.tolist())]
