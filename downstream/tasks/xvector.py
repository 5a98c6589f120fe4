"""The head of ASV: an x-vector (TDNN and statistics over time), trained with AM-softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.tasks.heads import Head, Width
from upstream.base import valid
from upstream.common.schema import Amount, Share
from upstream.features.device import moved

CONTEXT = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))  # frames seen and their distance, layer by layer
LOST = sum((size - 1) * dilation for size, dilation in CONTEXT)  # 14 frames
LEAST = LOST + 2  # frames, for a standard deviation


class XVector(Head):
    """Linear(D -> width), five TDNN layers with ReLU, mean and standard deviation, two layers.

    The embedding is the first layer's output, of unit length; the second serves training alone
    (s3prl downstream/sv_voxceleb1/model.py: XVector, SP, UtteranceExtractor, AMSoftmaxLoss).
    `stats: plus_one` takes one frame of padding into the statistics of all but the longest of a
    batch, as s3prl does. Utterances of fewer than 16 frames are repeated until they have as many.
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        classes: int,
        *,
        width: Width = 512,
        pooled: Width = 1500,
        scale: Amount = 30.0,
        margin: Share = 0.4,
        stats: Literal["exact", "plus_one"] = "exact",
    ) -> None:
        super().__init__(layers)
        self.projector = nn.Linear(dim, width)
        widths = [width] * len(CONTEXT) + [pooled]
        self.tdnn = nn.ModuleList(
            nn.Conv1d(a, b, size, dilation=dilation)
            for a, b, (size, dilation) in zip(widths, widths[1:], CONTEXT)
        )
        self.embed = nn.Linear(2 * pooled, width)
        self.last = nn.Linear(width, width)
        self.speakers = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, classes)))
        self.scale, self.margin, self.extra = scale, margin, int(stats == "plus_one")

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """[B, T, D] -> embeddings [B, width], not yet of unit length."""
        if int(lens.min()) < LEAST:
            steps = torch.arange(max(features.shape[1], LEAST), device=lens.device)
            again = steps[None, :] % lens[:, None].clamp(min=1)
            features = features.gather(1, again[:, :, None].expand(-1, -1, features.shape[2]))
            lens = lens.clamp(min=LEAST)
        if self.extra:  # padding is heard: it must be what s3prl pads with
            features = features * valid(lens, features.shape[1])[:, :, None]
        hidden = self.projector(features).transpose(1, 2)
        for layer in self.tdnn:
            hidden = layer(hidden).relu()
        frames = (lens - LOST + self.extra).clamp(max=hidden.shape[2])
        mask = valid(frames, hidden.shape[2])[:, None, :]
        mean = (hidden * mask).sum(2) / frames[:, None]
        squares = ((hidden - mean[:, :, None]) * mask).square().sum(2)
        # a channel that never changes has no slope at 0; the bound gives it the slope 0
        deviation = (squares / (frames[:, None] - 1)).clamp(min=1e-12).sqrt()
        return self.embed(torch.cat([mean, deviation], 1)).relu()

    def loss(self, logits: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy of scaled cosines to the speakers' weights, the right one less `margin`."""
        right = moved(torch.tensor(targets), logits.device).flatten()
        vectors = F.normalize(self.last(logits).relu(), dim=1)
        cosines = vectors @ F.normalize(self.speakers, dim=0)
        margins = self.margin * F.one_hot(right, cosines.shape[1])
        return F.cross_entropy(self.scale * (cosines - margins), right)

    def predict(self, logits: Tensor, lens: Tensor) -> list[Any]:
        """Embeddings [width] of unit length, NumPy."""
        return list(F.normalize(logits.detach(), dim=1).cpu().numpy())
