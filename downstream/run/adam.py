"""Adam without `torch.optim`, whose first use imports torch's compiler (seconds per process)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WEIGHT_DECAY = {"Adam": 0.0, "AdamW": 0.01}  # torch.optim's defaults
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """Adam with decoupled weight decay (AdamW, arXiv 1711.05101); with a decay of 0 it is Adam.

    The numbers of torch.optim.Adam and AdamW at their defaults, by the same fused kernel: one pass
    over all parameters. They are of one dtype on one device, and each has a gradient at every step.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        self.parameters, self.lr, self.weight_decay = list(parameters), lr, weight_decay
        self.first = [torch.zeros_like(p) for p in self.parameters]  # running mean of gradients
        self.second = [torch.zeros_like(p) for p in self.parameters]  # and of their squares
        self.steps = torch.zeros((), device=self.parameters[0].device)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        self.steps += 1
        torch._fused_adamw_(
            self.parameters,
            [p.grad for p in self.parameters if p.grad is not None],
            self.first,
            self.second,
            [],
            [self.steps] * len(self.parameters),
            lr=self.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `step` remembers, for torch.save."""
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, on this optimizer's device."""
        with torch.no_grad():
            for ours, theirs in zip(self.first + self.second, state["first"] + state["second"]):
                ours.copy_(theirs)
            self.steps.copy_(state["steps"])
