"""What stage 1 learns: data, a head on the last hidden state, a loss, and a score on dev."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from downstream.base import Metric, Record
from downstream.run.prepare import Prepared
from downstream.run.train import Stream
from downstream.tasks.heads import Head
from downstream.tasks.specaug import specaug
from merging.tuning.recipe import TuningRecipe
from upstream import audio
from upstream.base import SAMPLE_RATE
from upstream.common.disk import free_bytes
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder
from upstream.features import extract as cache
from upstream.features.store import Store

FREE_SHARE = 0.5  # of the free disk that the outputs of the frozen CNN may take


class Objective(Protocol):
    """What the loop asks of an objective; a mixture of several is one as well."""

    metric: Metric  # of dev
    heard: frozenset[str]  # keys of the clips whose labels are seen, on train and dev

    @property
    def head(self) -> nn.Module:
        """What is trained beside the encoder, and thrown away."""

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        """The loss of micro-batch `number`, a function of nothing else."""

    def dev(self, encoder: Encoder) -> float:
        """The dev score in per cent."""


class TaskObjective:
    """A downstream task (of one fold, the first if the recipe names none)."""

    def __init__(
        self, recipe: TuningRecipe, prepared: Prepared, encoder: Encoder, store: Store
    ) -> None:
        """Raises UserError for a fold that the corpus does not have."""
        self.recipe, self.prepared = recipe, prepared
        task = prepared.recipe.kind_of_task()
        fold = recipe.fold or next(iter(prepared.splits))
        if fold not in prepared.splits:
            raise UserError(f"fold {fold!r}: the corpus has {', '.join(prepared.splits) or 'none'}")
        split = prepared.splits[fold]
        self.task, self.metric, self.labels = task, task.metric, prepared.labels(fold)
        self.device = next(encoder.parameters()).device
        torch.manual_seed(recipe.seed)
        make = prepared.recipe.head_constructor(recipe.head)
        self.head: Head = make(1, encoder.dim, self.labels.size).to(self.device)
        heard = prepared.audio([*split["train"], *split["dev"]])
        self.heard = frozenset(clip.key for clip in heard)
        seconds = torch.tensor([clip.seconds for clip in prepared.clips])
        frames = (seconds * SAMPLE_RATE / encoder.stride).long()
        self.stream = Stream(
            split["train"], frames, recipe.batch, recipe.seed, True, prepared.windows
        )
        dev = sorted(split["dev"], key=lambda i: prepared.clips[i].seconds)
        self.dev_batches = [dev[i : i + recipe.batch] for i in range(0, len(dev), recipe.batch)]
        self.outputs = self._cnn_outputs(encoder, store)

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        """Of micro-batch `number`, a function of nothing else."""
        indices = self.stream[number]
        x, lens = self._last_hidden(encoder, indices)
        if self.recipe.specaug:
            x = specaug(x, lens)
        targets = [self.labels.encode(self.prepared.targets[i]) for i in indices]
        return self.head.loss(self.head.body(x, lens), lens, targets)

    def dev(self, encoder: Encoder) -> float:
        """The dev score in per cent."""
        records: list[Record] = []
        for indices in self.dev_batches:
            x, lens = self._last_hidden(encoder, indices)
            outputs = self.head.predict(self.head.body(x, lens), lens)
            items = [self.prepared.items[i] for i in indices]
            records += self.task.records(items, outputs, self.labels)
        return self.task.score(records)[self.metric.name]

    def _last_hidden(self, encoder: Encoder, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, T, D] and lens [B] in frames."""
        x, lens = (t.to(self.device) for t in self.outputs(indices))
        return encoder.contextual(x[0], lens, lens).layers[-1], lens

    def _cnn_outputs(
        self, encoder: Encoder, store: Store
    ) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
        """Outputs of the frozen CNN: from disk, shared with scoring, if there is room for them."""
        clips, cnn = self.prepared.clips, encoder.cnn_fingerprint()
        size = cache.bytes_of(encoder, "cnn", self.prepared.seconds)
        if cnn is not None and size <= FREE_SHARE * free_bytes(store.root):
            missing = store.missing(cnn, "cnn", clips)
            cache.extract(encoder, missing, ["cnn"], store, name=self.recipe.upstream)
            return store.open(cnn, "cnn", clips).batch

        def convolve(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
            batch, lens = audio.pad([clips[i].load() for i in indices])
            with torch.no_grad():
                x, kept, _ = encoder.convolve(batch.to(self.device), lens.to(self.device))
            return x[None], kept

        return convolve
