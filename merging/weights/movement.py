"""How far weights moved, module by module: cnn, projection, pos_conv, layer 1, ..."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from upstream.checkpoints.tensor_names import module_of

Weights = Mapping[str, Tensor]

# values; their buffers stay in a core's cache, and torch starts no threads for them
CHUNK = 1 << 15


def movement(
    base: Weights, tuned: Weights, place: Callable[[str], str] = module_of
) -> dict[str, float]:
    """Per module, or other `place` of a tensor's name, |tuned - base| / |base|."""
    change: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for name, tensor in base.items():
        if tensor.is_floating_point():
            module = place(name)
            change[module] += float((tuned[name].double() - tensor.double()).square().sum())
            size[module] += float(tensor.double().square().sum())
    return {m: (change[m] / size[m]) ** 0.5 if size[m] else 0.0 for m in size}


class EffectiveAlpha:
    """Per module: how far a merge went along the mean task vector, <m - b, t - b> / |t - b|^2.

    And how far in all, as `movement` has it.

    Tensors pass one by one. Products are float32 within a chunk and float64 from chunk to chunk,
    which is right to about 1e-6 and costs one pass through the cache.
    """

    def __init__(self) -> None:
        self.along: dict[str, float] = defaultdict(float)
        self.length: dict[str, float] = defaultdict(float)
        self.change: dict[str, float] = defaultdict(float)
        self.size: dict[str, float] = defaultdict(float)

    def add(self, module: str, base: Tensor, tuned: Sequence[Tensor], merged: Tensor) -> None:
        """Count one tensor of a module: base, tuned and merged of one shape, float32."""
        flat = [tensor.reshape(-1) for tensor in (base, merged, *tuned)]
        along = length = change = 0.0
        for start in range(0, base.numel(), CHUNK):
            origin, result, *models = (tensor[start : start + CHUNK] for tensor in flat)
            vectors = (model - origin for model in models)
            vector = reduce(torch.add, vectors).div_(len(models))
            # no torch.dot: it starts threads for any size, which wait for each other when busy
            step = result - origin
            change += float(step.square().sum())
            along += float(step.mul_(vector).sum())
            length += float(vector.square_().sum())
        self.along[module] += along
        self.length[module] += length
        self.change[module] += change
        self.keep(module, base)

    def keep(self, module: str, base: Tensor) -> None:
        """Count one tensor of a module that stays as it is."""
        chunks = base.reshape(-1).split(CHUNK)
        self.size[module] += sum(float(chunk.square().sum()) for chunk in chunks)

    def moved(self) -> dict[str, float]:
        """|merged - base| / |base|, of what was counted."""
        share = {m: (self.change[m] / v) ** 0.5 if v else 0.0 for m, v in self.size.items()}
        return {module: share[module] for module in sorted(share, key=_way)}

    def result(self) -> dict[str, float]:
        """NaN where fine-tuning changed nothing (the frozen CNN)."""
        ratio = {m: self.along[m] / v if v else float("nan") for m, v in self.length.items()}
        return {module: ratio[module] for module in sorted(ratio, key=_way)}


def _way(module: str) -> tuple[int, int, str]:
    """The order in which sound passes the modules."""
    kind, _, number = module.partition(" ")
    first = ("cnn", "projection", "pos_conv", "layer")
    return (first.index(kind) if kind in first else len(first)), int(number or 0), module
