"""Which weights stage 1 trains, and what becomes of them: the paper's way and those beside it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from merging.tuning.recipe import TuningRecipe
from upstream.checkpoints.tensor_names import State, module_of
from upstream.common.schema import Amount

# The CNN is never trained; the embedding of masked frames (`other`) has no part where none is.
FROZEN = ("cnn", "other")


class Strategy:
    """Plain fine-tuning, and the hooks that other strategies replace.

    What a strategy's __init__ takes besides are the recipe's `params`.
    """

    def __init__(self, model: nn.Module, recipe: TuningRecipe) -> None:
        """`model`: under transformers' names. No optimizer saw it yet: adapters may be added."""
        self.model, self.recipe = model, recipe
        self.state: State = {}  # what must survive an interruption (averages, snapshots)
        self.unheard: list[str] = []  # modules above the layer that feeds the head

    def trains(self, name: str, step: int) -> bool:
        """Whether the model's parameter `name` learns in update `step`, counted from 0."""
        return module_of(name) not in (*FROZEN, *self.unheard)

    def penalty(self) -> Tensor | None:
        """What is added to the loss of every update."""
        return None

    def after_step(self, step: int) -> None:
        """Called when update `step` is done."""

    def weights(self) -> State:
        """The encoder's ordinary weights as they would be used now, as new tensors."""
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}


class Stable(Strategy):
    """Speech-FT's: at first the head alone learns, for the share `head_only` of the updates."""

    def trains(self, name: str, step: int) -> bool:
        alone = step < int(self.recipe.head_only * self.recipe.steps)
        return not alone and super().trains(name, step)


Norm = Literal["l2", "l1", "max"]


class Anchored(Stable):
    """Stable fine-tuning that is pulled back to the pre-trained weights theta_0 (L2-SP and kin).

    norm: `l2` adds strength/2 |theta - theta_0|^2 (L2-SP, arXiv 1802.01483), `l1` strength times
    the sum of absolute changes, `max` times the largest one (as in WTR, arXiv 2303.00264).
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: TuningRecipe,
        *,
        strength: Amount = 1e-2,
        norm: Norm = "l2",
    ) -> None:
        super().__init__(model, recipe)
        self.strength, self.norm = strength, norm
        self.origin = {name: p.detach().clone() for name, p in model.named_parameters()}

    def penalty(self) -> Tensor | None:
        named = self.model.named_parameters()
        moves = [p - self.origin[name] for name, p in named if p.requires_grad]
        if not moves:
            return None
        if self.norm == "l2":
            return 0.5 * self.strength * torch.stack([m.square().sum() for m in moves]).sum()
        sizes = torch.stack([m.abs().sum() if self.norm == "l1" else m.abs().max() for m in moves])
        return self.strength * (sizes.sum() if self.norm == "l1" else sizes.max())
