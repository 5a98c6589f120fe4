"""A pre-trained upstream in, a new upstream out: stable fine-tuning and weight merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def merge(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str = "linear",
    **params: Any,
) -> dict[str, Tensor]:
    """`merging.merge(base, [tuned], alpha=0.25)`: merged weights; see `engine.merge`."""
    from merging.weights.engine import merge as interpolate  # torch is imported on the first use

    return interpolate(base, tuned, method, **params)
