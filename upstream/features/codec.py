"""Features of utterances as a head sees them, and how a frame is written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from upstream.base import valid
from upstream.common.errors import UserError

# time means, float32 [L, D]; frames [T, L, D], in 8 bits with a scale per frame and layer; the
# outputs of the frozen CNN, float32 [T, C]
Kind = Literal["mean", "float16", "int8", "cnn"]
SMALLEST = torch.finfo(torch.float32).tiny  # a frame of zeros has no scale


class Features(Protocol):
    """Features of N utterances by index."""

    layers: int
    dim: int
    lens: Tensor  # [N] frames

    @property
    def error(self) -> float:
        """Relative RMS error of keeping 8 bits, so far as it was measured; 0 for other kinds."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D] zero-padded (or [L, B, D] for means) float32 and lens [B]."""


class Coded(NamedTuple):
    """What a kind keeps of a batch, where the batch is; nothing of it has been looked at."""

    arrays: dict[str, Tensor]  # rows [L, B, T, D], scales [L, B, T]
    error: Tensor  # [B] relative RMS error, 0 for all kinds but int8
    fits: Tensor  # [B] bool: whether its numbers are small enough


def encode(kind: Kind, x: Tensor, lens: Tensor) -> Coded:
    """What `kind` keeps of frames x [L, B, T, D] float32, with what that does to the valid ones.

    The error is over frames and layers, each relative to its own size; it is measured for int8
    only.
    """
    error, fits = torch.zeros(x.shape[1]), torch.ones(x.shape[1], dtype=torch.bool)
    padding = ~valid(lens, x.shape[2])[None, :, :, None]
    if kind == "float16":
        half = x.half()
        return Coded({"rows": half}, error, (torch.isfinite(half) | padding).all(-1).all(2).all(0))
    if kind != "int8":
        return Coded({"rows": x}, error, fits)
    scales = (x.abs().amax(-1) / 127).clamp(min=SMALLEST)
    arrays = {"rows": (x / scales[..., None]).round().to(torch.int8), "scales": scales}
    noise = (decode(arrays) - x).square().mean(-1) / x.square().mean(-1).clamp(min=SMALLEST)
    total = noise.masked_fill(padding[..., 0], 0).sum(2).mean(0)
    return Coded(arrays, (total / lens).sqrt(), fits)


def require(fits: Tensor, names: Sequence[str]) -> None:
    """Raises UserError, with the name, for an utterance whose numbers are too large for float16."""
    for name, one in zip(names, fits.tolist(), strict=True):
        if not one:
            raise UserError(f"{name}: hidden states too large for float16; use frames: int8")


def decode(arrays: dict[str, Tensor]) -> Tensor:
    """x [..., D] float32 as it comes back from what `encode` gave."""
    x = arrays["rows"].float()
    return x * arrays["scales"][..., None] if "scales" in arrays else x
