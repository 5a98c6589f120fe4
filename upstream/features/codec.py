"""Features of utterances as a head sees them, and how a frame is written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

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


def encode(kind: Kind, x: Tensor, name: str = "") -> tuple[dict[str, Tensor], float]:
    """What `kind` keeps of x [..., D] float32, and the relative RMS error of doing so.

    The error is over frames and layers, each relative to its own size; it is measured for int8
    only, 0 otherwise. Raises UserError, naming `name`, for numbers too large for float16.
    """
    if kind == "float16":
        half = x.half()
        if not torch.isfinite(half).all():
            raise UserError(f"{name}: hidden states too large for float16; use frames: int8")
        return {"rows": half}, 0.0
    if kind != "int8":
        return {"rows": x}, 0.0
    scales = (x.abs().amax(-1) / 127).clamp(min=SMALLEST)
    arrays = {"rows": (x / scales[..., None]).round().to(torch.int8), "scales": scales}
    noise = (decode(arrays) - x).square().mean(-1)
    return arrays, float((noise / x.square().mean(-1).clamp(min=SMALLEST)).mean().sqrt())


def decode(arrays: dict[str, Tensor]) -> Tensor:
    """x [..., D] float32 as it comes back from what `encode` gave."""
    x = arrays["rows"].float()
    return x * arrays["scales"][..., None] if "scales" in arrays else x
