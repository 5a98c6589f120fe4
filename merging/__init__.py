"""A pre-trained upstream in, a new upstream out: stable fine-tuning and weight merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from upstream.resolve import UPSTREAMS

if TYPE_CHECKING:
    from torch import Tensor

UPSTREAMS.add(
    "merged", "merging.merged:merged", "a merge recipe's upstream, built when it is first asked for"
)
UPSTREAMS.add(
    "finetuned", "merging.merged:finetuned", "the fine-tuned upstream of a merge recipe (alpha = 1)"
)


def merge(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str = "linear",
    **params: Any,
) -> dict[str, Tensor]:
    """`merging.merge(base, [tuned], alpha=0.25)`: merged weights; see `engine.merge`."""
    from merging.weights.engine import merge as interpolate  # torch is imported on the first use

    return interpolate(base, tuned, method, **params)
