"""Other upstreams from the same run, for free: early checkpoints and averages of its weights.

A recipe names them, `collect: [early-0.2, ema-0.999, swa-0.5]`, and each is written into a folder
of that name beside the best weights. None of them looks at dev.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from upstream.checkpoints.tensor_names import State
from upstream.common.errors import UserError

NAME = re.compile(r"(early|ema|swa)-(0\.\d+)")


class Collected:
    """`early-S`: the weights after a share S of the steps. `ema-D`: their exponential moving
    average with decay D, from the first step on. `swa-S`: their mean from a share S of the steps
    on (arXiv 1803.05407, without its cyclic rate).
    """

    def __init__(self, name: str, steps: int) -> None:
        self.name = name
        found = NAME.fullmatch(name)
        if not found or not 0 < float(found[2]) < 1:
            raise UserError(
                f"collect: {name!r} is none of early-0.2, ema-0.999, swa-0.5 or the like"
            )
        self.kind, self.number = found[1], float(found[2])
        self.first = 1 if self.kind == "ema" else max(1, int(self.number * steps))
        self.weights: State = {}

    def wants(self, done: int) -> bool:
        """Whether it looks at the weights after `done` steps."""
        return done == self.first if self.kind == "early" else done >= self.first

    def add(self, done: int, weights: State) -> None:
        """Take in the weights after `done` steps."""
        if not self.weights:
            self.weights = {name: tensor.clone() for name, tensor in weights.items()}
            return
        share = 1 - self.number if self.kind == "ema" else 1 / (done - self.first + 1)
        for name, mean in self.weights.items():
            if mean.is_floating_point():
                mean.lerp_(weights[name], share)


def collectors(names: Sequence[str], steps: int) -> list[Collected]:
    """Raises UserError for a name that is none, or that comes twice."""
    if len(set(names)) < len(names):
        raise UserError("collect: a name comes twice")
    return [Collected(name, steps) for name in names]
