"""LoRA and DoRA as changes of the weights themselves, so that every encoder family feels them.

An adapter beside a layer's forward does nothing where attention reads `q_proj.weight` and never
calls `q_proj` (fairseq's way). Here the weight is a parametrization, whoever reads it, and the
result is an ordinary upstream: what was learnt is multiplied out.
"""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor, nn
from torch.nn.utils import parametrize

from merging.tuning.recipe import TuningRecipe
from merging.tuning.strategies import Stable
from upstream.checkpoints.tensor_names import State
from upstream.common.errors import UserError
from upstream.common.schema import Amount, Bound

Rank = Annotated[int, Bound(1, 4096)]
ADAPTER = ".parametrizations.weight.0."  # in the names of what learns
ORIGINAL = ".parametrizations.weight.original"


class LowRank(nn.Module):
    """W [out, in] -> W + scale B A, A [r, in] random, B [out, r] at first 0 (arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


class Sized(LowRank):
    """The same direction, rescaled row by row to a learnt size (DoRA, arXiv 2402.09353).

    The size of the sum is taken as a constant in the gradient, as the paper advises (4.3).
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__(weight, rank, scale)
        self.size = nn.Parameter(weight.detach().norm(dim=1, keepdim=True))

    def forward(self, weight: Tensor) -> Tensor:
        changed = super().forward(weight)
        return changed * (self.size / changed.detach().norm(dim=1, keepdim=True))


class LoRA(Stable):
    """Stable fine-tuning in which only low-rank changes of some linear layers learn.

    targets: the last words of the layers' names. Raises UserError if the encoder has none.
    """

    kind: type[LowRank] = LowRank

    def __init__(
        self,
        model: nn.Module,
        recipe: TuningRecipe,
        *,
        rank: Rank = 8,
        scale: Amount = 2.0,
        targets: list[str] = ["q_proj", "v_proj"],  # noqa: B006 - never changed
    ) -> None:
        super().__init__(model, recipe)
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.adapted = {n: m for n, m in linear.items() if n.rpartition(".")[2] in targets}
        if not self.adapted:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(f"params: targets: no layer is named so; there is: {', '.join(known)}")
        for module in self.adapted.values():
            weight = module.weight.detach()
            parametrize.register_parametrization(module, "weight", self.kind(weight, rank, scale))

    def trains(self, name: str, step: int) -> bool:
        return ADAPTER in name and super().trains(name, step)

    def weights(self) -> State:
        state = {n: t for n, t in super().weights().items() if ADAPTER not in n}
        for name, module in self.adapted.items():
            state[f"{name}.weight"] = module.weight.detach().clone()
            state.pop(name + ORIGINAL)
        return state


class DoRA(LoRA):
    """LoRA whose rows have a size of their own."""

    kind = Sized
