"""What stage 1 learns: data, a head on a hidden state, a loss, and a score on dev."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from downstream.base import Item, Metric
from downstream.tasks.heads import Head
from downstream.tasks.specaug import specaug
from merging.tuning import batches
from merging.tuning.recipe import Plan
from upstream.base import SAMPLE_RATE
from upstream.encoder.encoder import Encoder
from upstream.features.provide import provide
from upstream.features.store import Store


class Objective(Protocol):
    """What the loop asks of an objective; a mixture of several is one as well."""

    metric: Metric  # of dev
    heard: frozenset[str]  # keys of the clips whose labels are seen, on train and dev

    @property
    def head(self) -> nn.Module:
        """What is trained beside the encoder, and thrown away."""

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        """The mean loss of (our share of) micro-batch `number`, a function of nothing else."""

    def weights(self, numbers: Sequence[int]) -> list[float]:
        """How much the loss of each of an update's micro-batches counts; 0: we have no share of it.

        Over all micro-batches and shares they sum to 1, so that the update's loss is what it would
        be for one large batch.
        """

    def names(self, number: int) -> list[str]:
        """The utterances of micro-batch `number`."""

    def dev(self, encoder: Encoder) -> dict[str, float]:
        """The dev scores in per cent, by objective and metric; the first one selects."""

    def complete(self, first: int, end: int) -> bool:
        """Whether every objective is among the micro-batches from `first` to before `end`."""


class OnCorpus:
    """Batches of an aim's corpus, as outputs of the frozen CNN: scoring shares them."""

    def __init__(self, plan: Plan, store: Store, number: int = 0) -> None:
        """`number`: of the aim in the recipe."""
        recipe, encoder, self.prepared = plan.recipe, plan.encoder, plan.corpora[number]
        self.aim, self.share, self.seed = recipe.aims[number], plan.share, recipe.seed + number
        self.fold = self.aim.fold_of(self.prepared)
        self.heard = encoder.heard | self.aim.heard(self.prepared)
        self.device = next(encoder.parameters()).device
        split, clips = self.prepared.splits[self.fold], self.prepared.clips
        samples = torch.tensor([round(clip.seconds * SAMPLE_RATE) for clip in clips])
        self.frames = encoder.frames(samples).tolist()
        train, windows = split["train"], self.prepared.windows
        self.stream = batches.training(recipe, clips, train, windows, encoder.stride, self.seed)
        self.dev_batches = batches.scoring(recipe, clips, split["dev"])
        self.features = provide(encoder, clips, "cnn", store, name=recipe.upstream)

    def weights(self, numbers: Sequence[int]) -> list[float]:
        whole = {number: self.stream[number] for number in numbers}
        total = sum(self.size(number, indices) for number, indices in whole.items()) or 1.0
        return [self.size(n, self.share.of(indices)) / total for n, indices in whole.items()]

    def size(self, number: int, indices: Sequence[int]) -> float:
        """Of how much the loss of some utterances of a micro-batch is the mean."""
        raise NotImplementedError

    def names(self, number: int) -> list[str]:
        return [self.prepared.items[i].id for i in self.share.of(self.stream[number])]

    def complete(self, first: int, end: int) -> bool:
        return first < end

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Outputs of the CNN [B, T, C] and lens [B] in frames."""
        x, lens = (t.to(self.device) for t in self.features.batch(indices))
        return x[0], lens


class TaskObjective(OnCorpus):
    """A task: its head on one hidden state, its loss, its metric."""

    def __init__(self, plan: Plan, store: Store, number: int = 0) -> None:
        super().__init__(plan, store, number)
        recipe, frame = self.prepared.recipe, plan.encoder.stride / SAMPLE_RATE
        self.task = recipe.kind_of_task()
        self.metric, self.labels = self.task.metric, self.prepared.labels(self.fold, frame)
        torch.manual_seed(self.seed)
        head = recipe.new_head(1, plan.encoder.dim, self.labels, self.aim.head)
        self.head: Head = head.to(self.device)

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        indices = self.share.of(self.stream[number])
        x, lens = self._hidden(encoder, indices)
        if self.aim.specaug:
            x = specaug(x, lens)
        targets = [self.labels.encode(self.prepared.targets[i]) for i in indices]
        return self.head.loss(self.head.body(x, lens), lens, targets)

    def size(self, number: int, indices: Sequence[int]) -> float:
        targets = (self.labels.encode(self.prepared.targets[i]) for i in indices)
        return sum(self.head.counts(self.frames[i], t) for i, t in zip(indices, targets))

    def dev(self, encoder: Encoder) -> dict[str, float]:
        items, outputs = list[Item](), list[Any]()
        for indices in self.dev_batches:
            x, lens = self._hidden(encoder, indices)
            outputs += self.head.predict(self.head.body(x, lens), lens)
            items += [self.prepared.items[i] for i in indices]
        records = self.task.records(items, outputs, self.labels)  # trials are of a whole split
        return {f"{self.aim.name} {self.metric.name}": self.task.score(records)[self.metric.name]}

    def _hidden(self, encoder: Encoder, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The hidden state that feeds the head, [B, T, D], and lens [B] in frames."""
        x, lens = self.batch(indices)
        layer = -1 if self.aim.layer is None else self.aim.layer
        return encoder.contextual(x, lens, lens).layers[layer], lens
