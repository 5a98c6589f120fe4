"""How far weights moved, module by module: cnn, projection, pos_conv, layer 1, ..."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upstream.names import module_of

Weights = Mapping[str, Tensor]


def movement(base: Weights, tuned: Weights) -> dict[str, float]:
    """Per module |tuned - base| / |base|."""
    change: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for name, tensor in base.items():
        if tensor.is_floating_point():
            module = module_of(name)
            change[module] += float((tuned[name].double() - tensor.double()).square().sum())
            size[module] += float(tensor.double().square().sum())
    return {m: (change[m] / size[m]) ** 0.5 if size[m] else 0.0 for m in size}


def effective_alpha(base: Weights, tuned: Sequence[Weights], merged: Weights) -> dict[str, float]:
    """Per module: how far the merge went along the mean task vector, <m - b, t - b> / |t - b|^2.

    NaN where fine-tuning changed nothing (the frozen CNN).
    """
    along: dict[str, float] = defaultdict(float)
    length: dict[str, float] = defaultdict(float)
    for name, tensor in base.items():
        if tensor.is_floating_point():
            module, origin = module_of(name), tensor.double()
            vector = torch.stack([t[name].double() - origin for t in tuned]).mean(0)
            along[module] += float(((merged[name].double() - origin) * vector).sum())
            length[module] += float(vector.square().sum())
    return {m: along[m] / length[m] if length[m] else float("nan") for m in length}
