"""How weights are merged: one typed pure function of tensors per method.

A method takes one parameter tensor of the pre-trained upstream and the same tensor of each
fine-tuned one, all float32, and returns the merged tensor. Its keyword-only arguments are the keys
that a merge recipe may hold. A new method is one registered function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upstream.registry import Registry

Method = Callable[..., Tensor]
METHODS: Registry[Method] = Registry("merging method")


@METHODS.register("linear")
def linear(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25) -> Tensor:
    """base + alpha * mean of task vectors: Speech-FT's stage 2 (arXiv 2502.12672).

    `alpha` is the weight of the fine-tuned side: 0 gives the base, 1 the (mean) tuned model.
    """
    return base + alpha * torch.stack([t - base for t in tuned]).mean(0)
