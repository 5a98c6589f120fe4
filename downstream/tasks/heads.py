"""The featurizer and the three heads of SUPERB. A head owns its loss and its decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstream.base import valid
from upstream.common.schema import Bound, Dropout
from upstream.features.device import moved

Width = Annotated[int, Bound(1, 2**16)]  # of a layer
Depth = Annotated[int, Bound(1, 64)]  # layers


class Head(nn.Module):
    """A featurizer and a body: features x [L, B, T, D] (or time means [L, B, D]) -> logits.

    The featurizer is a softmax-weighted sum over layers, one scalar each, starting uniform
    (s3prl upstream/interfaces.py, Featurizer). One layer has no weight.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.sizes: tuple[int, ...] = ()  # of several questions, the classes of each
        self.layer_weights = nn.Parameter(torch.zeros(layers), requires_grad=layers > 1)

    def weighted_sum(self, x: Tensor) -> Tensor:
        """[L, ...] -> [...]."""
        if len(x) == 1:
            return x[0]
        return torch.tensordot(self.layer_weights.softmax(0), x, dims=1)

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """Logits of a batch; lens [B] in frames."""
        return self.body(self.weighted_sum(x), lens)

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """Logits from weighted features [B, T, D] (or [B, D])."""
        raise NotImplementedError

    def loss(self, logits: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Scalar training loss; targets are class indices per utterance.

        lens may be on the CPU where logits are on a GPU, which then need not be waited for.
        """
        raise NotImplementedError

    def counts(self, frames: int, target: Sequence[Any]) -> float:
        """How much an utterance counts in `loss`, a mean over the utterances of a batch."""
        return 1.0

    def predict(self, logits: Tensor, lens: Tensor) -> list[Any]:
        """Class indices per utterance, or whatever else the task makes its records from."""
        raise NotImplementedError


class Utterance(Head):
    """Linear(D -> projector), mean over valid frames, Linear(projector -> classes).

    No activation anywhere (s3prl downstream/model.py, UtteranceLevel), so it may be given the time
    means themselves and returns the same logits.
    """

    def __init__(self, layers: int, dim: int, classes: int, *, projector: Width = 256) -> None:
        super().__init__(layers)
        self.projector = nn.Linear(dim, projector)
        self.linear = nn.Linear(projector, classes)

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """[B, D] means or [B, T, D] frames -> [B, classes]."""
        hidden = self.projector(features)
        if hidden.dim() == 3:
            mask = valid(lens, hidden.shape[1])[:, :, None].to(hidden.dtype)
            hidden = (hidden * mask).sum(1) / lens[:, None].to(hidden.dtype)
        return self.linear(hidden)

    def loss(self, logits: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """The cross-entropies of all questions, summed (s3prl downstream/fluent_commands)."""
        right = moved(torch.tensor(targets), logits.device).T
        parts = zip(self._parts(logits), right)
        return torch.stack([F.cross_entropy(x, y - first) for (x, first), y in parts]).sum()

    def predict(self, logits: Tensor, lens: Tensor) -> list[list[int]]:
        best = [x.argmax(-1) + first for x, first in self._parts(logits)]
        return torch.stack(best, -1).tolist()

    def _parts(self, logits: Tensor) -> list[tuple[Tensor, int]]:
        """The logits of each question, and its first class."""
        parts = logits.split(self.sizes or logits.shape[-1], -1)
        return list(zip(parts, itertools.accumulate(self.sizes, initial=0)))


class CTC(Head):
    """Frame logits [B, T, classes] with blank 0: mean CTC loss and greedy decoding.

    Each utterance's loss is divided by its target length, then averaged; impossible alignments
    count zero (s3prl downstream/asr, downstream/ctc).
    """

    def loss(self, logits: Tensor, lens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            moved(torch.tensor([i for t in targets for i in t]), logits.device),
            lens,
            torch.tensor([len(t) for t in targets], device=lens.device),
            zero_infinity=True,
        )

    def predict(self, logits: Tensor, lens: Tensor) -> list[list[int]]:
        best = logits.argmax(-1).cpu()
        return [
            [i for i in torch.unique_consecutive(row[:n]).tolist() if i != 0]
            for row, n in zip(best, lens.tolist())
        ]


class FrameCTC(CTC):
    """Linear(D -> projector), Linear(projector -> classes) on every frame (FrameLevel in s3prl)."""

    def __init__(self, layers: int, dim: int, classes: int, *, projector: Width = 256) -> None:
        super().__init__(layers)
        self.projector = nn.Linear(dim, projector)
        self.linear = nn.Linear(projector, classes)

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, classes]."""
        # With no activation between them the two layers are one: multiplying the weights first is
        # the same function with the same gradients, and several times cheaper for many frames.
        weight = self.linear.weight @ self.projector.weight
        bias = self.linear.weight @ self.projector.bias + self.linear.bias
        return F.linear(features, weight, bias)


class RecurrentCTC(CTC):
    """Linear(D -> projector), bidirectional LSTMs with dropout after each, Linear to classes.

    Same parameters and function as s3prl's packed nn.LSTM (downstream/asr/model.py, RNNs). Each
    direction is a unidirectional LSTM on the padded batch, the backward one on utterances reversed
    in time: exact, and on a CPU several times faster than the backward pass of packed sequences.
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        classes: int,
        *,
        projector: Width = 1024,
        hidden: Width = 1024,
        depth: Depth = 2,
        dropout: Dropout = 0.2,
    ) -> None:
        super().__init__(layers)
        self.projector = nn.Linear(dim, projector)
        sizes = [projector] + [2 * hidden] * (depth - 1)
        self.ahead = nn.ModuleList(nn.LSTM(n, hidden, batch_first=True) for n in sizes)
        self.back = nn.ModuleList(nn.LSTM(n, hidden, batch_first=True) for n in sizes)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * hidden, classes)

    def body(self, features: Tensor, lens: Tensor) -> Tensor:
        """[B, T, D] zero-padded -> [B, T, classes]."""
        x = self.projector(features)
        steps = torch.arange(x.shape[1], device=x.device)[None, :]
        # position t reads lens-1-t; padding stays where it is, behind the reversed utterance
        reverse = torch.where(steps < lens[:, None], lens[:, None] - 1 - steps, steps)[:, :, None]
        for ahead, back in zip(self.ahead, self.back):
            mirrored = back(x.gather(1, reverse.expand(-1, -1, x.shape[2])))[0]
            mirrored = mirrored.gather(1, reverse.expand(-1, -1, mirrored.shape[2]))
            x = self.dropout(torch.cat([ahead(x)[0], mirrored], -1))
        return self.linear(x)
