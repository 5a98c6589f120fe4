"""One head that learns, and several side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from downstream.base import Metric
from downstream.recipe import Train
from downstream.run.adam import Adam
from downstream.tasks.heads import Head
from downstream.tasks.specaug import specaug
from upstream.features.device import moved


class Batch(NamedTuple):
    """Training features on the heads' device, read once for all of them."""

    x: Tensor  # [L, B, T, D] (or [L, B, D]), contiguous: the sum over layers is then one product
    lens: Tensor  # [B] frames, of the CPU: a GPU would have to be waited for
    targets: list[list[int]]


class Learner:
    """One head, its optimizer, and its best weights so far."""

    def __init__(self, train: Train, lr: float, head: Head) -> None:
        self.train, self.lr, self.head = train, lr, head
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        self.optimizer = Adam(self.parameters, lr, train.optimizer == "AdamW")
        self.best = float("nan")
        self.weights = copy.deepcopy(head.state_dict())

    def forward(self, batch: Batch) -> Tensor:
        """Logits of one micro-batch."""
        self.head.train()
        features = self.head.weighted_sum(batch.x)
        if self.train.specaug:
            features = specaug(features, batch.lens)
        return self.head.body(features, moved(batch.lens, features.device))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Its loss, divided by how many micro-batches make an update (s3prl runner)."""
        return self.head.loss(logits, batch.lens, batch.targets) / self.train.accumulate

    def update(self) -> None:
        """One step with clipped gradients; s3prl leaves it out if they are not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip)
        self.optimizer.step(unless=~torch.isfinite(norm))
        for parameter in self.parameters:
            parameter.grad = None

    def keep(self, dev: float, metric: Metric) -> None:
        """Remember the weights if `dev` is strictly better than ever before."""
        if metric.improves(dev, self.best):
            self.best, self.weights = dev, copy.deepcopy(self.head.state_dict())

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        heads = {"head": self.head.state_dict(), "weights": self.weights}
        return {**heads, "optimizer": self.optimizer.state_dict(), "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises RuntimeError, TypeError or KeyError for that of another."""
        self.head.load_state_dict(state["weights"])  # raises for what is no state of this head
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.weights = float(state["best"]), state["weights"]


class Lanes:
    """Learners side by side on a GPU, each on a stream of its own; one by one on a CPU.

    A small head leaves most of a GPU idle, so that five together may take little longer than one.
    Those on a GPU go forward together before any has its loss: CTC waits for its own stream.
    """

    def __init__(self, learners: Sequence[Learner], device: torch.device | str) -> None:
        self.device = torch.device(device)
        gpu = self.device.type == "cuda"
        self.groups = [list(learners)] if gpu else [[each] for each in learners]
        self.streams = [torch.cuda.Stream(self.device) for _ in learners] if gpu else []

    def backward(self, batch: Batch, seed: int) -> None:
        """Add one micro-batch's gradients; all have the same dropout and SpecAugment."""
        for group in self.groups:
            logits = [self._seeded(seed, each, batch) for each in self._each(group)]
            losses = [each.loss(x, batch) for each, x in zip(self._each(group), logits)]
            for _, loss in zip(self._each(group), losses):
                loss.backward()
        self._join()

    def update(self) -> None:
        """A step of every learner."""
        for group in self.groups:
            for each in self._each(group):
                each.update()
        self._join()

    def _seeded(self, seed: int, learner: Learner, batch: Batch) -> Tensor:
        # torch.manual_seed, less the stack trace that it formats (0.1 ms) while CUDA is unused
        torch.default_generator.manual_seed(seed)
        if self.streams:
            torch.cuda.manual_seed(seed)
        return learner.forward(batch)

    def _each(self, group: list[Learner]) -> Iterator[Learner]:
        """Each with its stream current, which has waited for what the main one did before."""
        if not self.streams:
            yield from group
            return
        for learner, stream in zip(group, self.streams):
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                yield learner

    def _join(self) -> None:
        """What was used may be freed, and what was learnt be read, by the main stream again."""
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)
