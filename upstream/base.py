"""What an upstream is: 16 kHz waveforms in, a stack of hidden states out."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SAMPLE_RATE = 16_000


class Hidden(NamedTuple):
    """Hidden states of one padded batch."""

    layers: Tensor  # [L, B, T, D] float32
    lens: Tensor  # [B] valid frames, int64

    def mean(self) -> Tensor:
        """[L, B, D]: the mean over each item's valid frames."""
        if not self.layers.is_cuda:  # one by one: a sum rounds by how far its item is padded
            items = enumerate(self.lens.tolist())
            means = [self.layers[:, i, :n].contiguous().sum(1) / n for i, n in items]
            return torch.stack(means, 1)
        mask = valid(self.lens, self.layers.shape[2])[None, :, :, None]
        summed = torch.where(mask, self.layers, 0).sum(2)  # 0 * NaN would spoil the sum
        return summed / self.lens.to(summed.dtype)[None, :, None]


class Upstream(nn.Module):
    """A frozen speech encoder. Subclasses set `num_layers`, `dim`, `stride` and write `forward`.

    The promises every upstream keeps are in `upstream/check.py`.
    """

    sample_rate: int = SAMPLE_RATE
    num_layers: int
    dim: int
    stride: int  # samples per frame
    source: str = ""  # where the weights come from, for `describe` and for provenance
    licence: str = ""
    heard: frozenset[str] = frozenset()  # clips whose labels its training saw (features.clips)
    options: Mapping[str, Any] = {}  # how it was loaded
    padding_matters: bool = False  # what else is in a batch changes hidden states (s3prl's code)
    evidence: Mapping[str, Any] = {}  # of what a user's own class does (user_class)

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        """wavs [B, N] float32 zero-padded, lens [B] in samples."""
        raise NotImplementedError

    def frames(self, samples: Tensor) -> Tensor | None:
        """How many frames come of each length in samples [N], int64; None: a forward tells."""
        return None

    def identity(self) -> dict[str, Any]:
        """Whatever besides the weights changes the output: class, source text, options."""
        try:
            source = inspect.getsource(type(self))
        except (OSError, TypeError):
            source = ""
        return {"class": type(self).__qualname__, "source": source, "options": self.options}

    def fingerprint(self) -> str:
        """12 hex digits over `identity()`, `evidence` and every parameter and buffer."""
        return fingerprint({**self.identity(), **self.evidence}, self.state_dict())

    def cnn_fingerprint(self) -> str | None:
        """The same over the frozen CNN alone, for upstreams that share theirs; else None."""
        return None


class Digest:
    """A fingerprint in the making: facts that JSON can hold, then tensors, sorted by name."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.hash = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        self.last = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for one that is out of order."""
        if name <= self.last:
            raise ValueError(f"{name} after {self.last}")
        self.last = name
        tensor = tensor.detach().cpu().contiguous()
        self.hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self.hash.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def text(self) -> str:
        """12 hex digits."""
        return self.hash.hexdigest()[:12]


def fingerprint(facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """12 hex digits over facts that JSON can hold and tensors by name."""
    digest = Digest(facts)
    for name, tensor in sorted(state.items()):
        digest.add(name, tensor)
    return digest.text()


def valid(lens: Tensor, length: int) -> Tensor:
    """[B, length] bool: true where a frame (or sample) belongs to the utterance."""
    return torch.arange(length, device=lens.device)[None, :] < lens[:, None]
