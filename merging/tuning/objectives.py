"""What stage 1 learns: data, a head on the last hidden state, a loss, and a score on dev."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from downstream.base import Item, Metric
from downstream.tasks.heads import Head
from downstream.tasks.specaug import specaug
from merging.tuning import batches
from merging.tuning.ranks import ALL, Share
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

    def dev(self, encoder: Encoder) -> float:
        """The dev score in per cent."""


class TaskObjective:
    """The task of a recipe, on the outputs of the frozen CNN: scoring shares them."""

    def __init__(self, plan: Plan, store: Store, share: Share = ALL) -> None:
        """`share`: of the utterances of every micro-batch."""
        recipe, encoder, self.prepared = plan.recipe, plan.encoder, plan.prepared
        self.share = share
        self.specaug, self.heard, self.layer = recipe.specaug, plan.heard, recipe.layer
        self.task = self.prepared.recipe.kind_of_task()
        self.metric, frame = self.task.metric, encoder.stride / SAMPLE_RATE
        self.labels = self.prepared.labels(plan.fold, frame)
        self.device = next(encoder.parameters()).device
        torch.manual_seed(recipe.seed)
        head = self.prepared.recipe.new_head(1, encoder.dim, self.labels, recipe.head)
        self.head: Head = head.to(self.device)
        split, clips = self.prepared.splits[plan.fold], self.prepared.clips
        samples = torch.tensor([round(clip.seconds * SAMPLE_RATE) for clip in clips])
        self.sizes = encoder.frames(samples) if head.per_frame else torch.ones(len(clips))
        windows = self.prepared.windows
        train, stride = split["train"], encoder.stride
        self.stream = batches.training(recipe, clips, train, windows, stride, recipe.seed)
        self.dev_batches = batches.scoring(recipe, clips, split["dev"])
        self.features = provide(encoder, clips, "cnn", store, name=recipe.upstream)

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        indices = self.share.of(self.stream[number])
        x, lens = self._last_hidden(encoder, indices)
        if self.specaug:
            x = specaug(x, lens)
        targets = [self.labels.encode(self.prepared.targets[i]) for i in indices]
        return self.head.loss(self.head.body(x, lens), lens, targets)

    def weights(self, numbers: Sequence[int]) -> list[float]:
        batches = [self.stream[number] for number in numbers]
        total = float(sum(self.sizes[batch].sum() for batch in batches))
        return [float(self.sizes[self.share.of(batch)].sum()) / total for batch in batches]

    def names(self, number: int) -> list[str]:
        return [self.prepared.items[i].id for i in self.share.of(self.stream[number])]

    def dev(self, encoder: Encoder) -> float:
        items, outputs = list[Item](), list[Any]()
        for indices in self.dev_batches:
            x, lens = self._last_hidden(encoder, indices)
            outputs += self.head.predict(self.head.body(x, lens), lens)
            items += [self.prepared.items[i] for i in indices]
        records = self.task.records(items, outputs, self.labels)  # trials are of a whole split
        return self.task.score(records)[self.metric.name]

    def _last_hidden(self, encoder: Encoder, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, T, D] and lens [B] in frames."""
        x, lens = (t.to(self.device) for t in self.features.batch(indices))
        layer = -1 if self.layer is None else self.layer
        return encoder.contextual(x[0], lens, lens).layers[layer], lens
