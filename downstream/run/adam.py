"""Adam by torch.optim's function, since making its classes imports the compiler (seconds)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """Adam or AdamW (decoupled decay of 0.01) at torch.optim's defaults, in one fused kernel.

    The parameters are of one dtype on one device, and each has a gradient at every step.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, decoupled: bool = False) -> None:
        self.parameters, self.lr, self.decoupled = list(parameters), lr, decoupled
        self.first = [torch.zeros_like(p) for p in self.parameters]  # running mean of gradients
        self.second = [torch.zeros_like(p) for p in self.parameters]  # and of their squares
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, unless: Tensor | None = None) -> None:
        """Update every parameter from its gradient; `unless` that is true, which a GPU looks at."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        adam(
            self.parameters, grads, self.first, self.second, [], self.steps, fused=True,
            decoupled_weight_decay=self.decoupled, weight_decay=0.01 * self.decoupled, lr=self.lr,
            beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, maximize=False,
            found_inf=None if unless is None else unless.float(),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that `step` remembers, for torch.save."""
        return {"first": self.first, "second": self.second, "steps": self.steps[0]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, on this optimizer's device."""
        kept = [*state["first"], *state["second"], *[state["steps"]] * len(self.steps)]
        for ours, theirs in zip(self.first + self.second + self.steps, kept):
            ours.copy_(theirs)
