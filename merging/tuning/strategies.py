"""Which weights stage 1 trains, and what becomes of them: the paper's way and those beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from upstream.checkpoints.tensor_names import State, module_of
from upstream.common.registry import Registry

if TYPE_CHECKING:
    from merging.tuning.recipe import TuningRecipe

# The CNN is never trained; the embedding of masked frames (`other`) has no part where none is.
FROZEN = ("cnn", "other")


class Strategy:
    """Plain fine-tuning, and the hooks that other strategies replace."""

    def __init__(self, model: nn.Module, recipe: TuningRecipe) -> None:
        """`model`: under transformers' names. No optimizer saw it yet: adapters may be added."""
        self.model, self.recipe = model, recipe
        self.state: State = {}  # what must survive an interruption (averages, snapshots)

    def trains(self, name: str, step: int) -> bool:
        """Whether the model's parameter `name` learns in update `step`, counted from 0."""
        return module_of(name) not in FROZEN

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


STRATEGIES: Registry[type[Strategy]] = Registry("fine-tuning strategy")
STRATEGIES.add("stable", Stable, "Speech-FT: the head alone at first, the CNN frozen throughout")
STRATEGIES.add("regular", Strategy, "all but the CNN from the first update, as s3prl does")
