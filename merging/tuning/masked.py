"""Masked prediction without labels: HuBERT's pre-training, continued on other audio.

Cross-lingual continued pre-training in Speech-FT. What is predicted are clusters of a hidden state
of the upstream as it was before, from frames that it cannot see; the head is thrown away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.base import Metric
from downstream.tasks.metrics import success_rate
from merging.pretraining import targets as kmeans
from merging.tuning.objectives import OnCorpus
from merging.tuning.recipe import Plan
from upstream.base import valid
from upstream.checkpoints.tensor_files import guarded, load_state, save_state
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.encoder.encoder import Encoder
from upstream.features.store import Store

VERSION = 1  # of how targets are made: another number, and all are made again
WIDTH, TEMPERATURE = 256, 0.1  # of HuBERT Base
DEV = 2**31  # the number of the micro-batch that dev's masks are drawn for


class Cosine(nn.Module):
    """Logits of clusters: cosines of a projected frame with their embeddings, over 0.1."""

    def __init__(self, dim: int, clusters: int) -> None:
        super().__init__()
        self.projector = nn.Linear(dim, WIDTH)
        self.codes = nn.Parameter(torch.rand(clusters, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., clusters]."""
        codes = F.normalize(self.codes, dim=-1)
        return F.normalize(self.projector(hidden), dim=-1) @ codes.T / TEMPERATURE


class MaskedObjective(OnCorpus):
    """Cross-entropy on the hidden frames; masks are a function of seed, micro-batch, utterance.

    The mean over frames, in which a seen one counts `unmasked_weight` times as much as a hidden
    one: so that an update is the same however it is cut.
    """

    metric = Metric("masked_accuracy", "MASKED ACC", "higher", success_rate)

    def __init__(self, plan: Plan, store: Store, number: int = 0) -> None:
        super().__init__(plan, store, number)
        assert self.aim.masked is not None
        self.masked = self.aim.masked
        torch.manual_seed(self.seed)
        self.head = Cosine(plan.encoder.dim, self.masked.clusters).to(self.device)
        self.targets = self._targets(plan, store)

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        indices = self.share.of(self.stream[number])
        logits, right, mask, seen = self._predicted(encoder, indices, number)
        if not self.masked.unmasked_weight:
            return F.cross_entropy(logits[mask], right[mask])
        heard = mask | seen
        weights = torch.where(mask[heard], 1.0, self.masked.unmasked_weight)
        each = F.cross_entropy(logits[heard], right[heard], reduction="none")
        return (weights * each).sum() / weights.sum()

    def size(self, number: int, indices: Sequence[int]) -> float:
        hidden = sum(float(self.mask(number, i, self.frames[i]).sum()) for i in indices)
        seen = sum(self.frames[i] for i in indices) - hidden
        return hidden + self.masked.unmasked_weight * seen

    def dev(self, encoder: Encoder) -> dict[str, float]:
        hits, total = 0, 0
        for indices in self.dev_batches:
            logits, right, mask, _ = self._predicted(encoder, indices, DEV)
            hits += int((logits.argmax(-1) == right)[mask].sum())
            total += int(mask.sum())
        return {self.metric.name: 100 * hits / total}

    def _predicted(
        self, encoder: Encoder, indices: Sequence[int], number: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, T, clusters], the right ones [B, T], hidden frames and seen ones [B, T]."""
        x, lens = self.batch(indices)
        rows = [self.targets[i].long() for i in indices]
        right = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row, i, n in zip(mask, indices, lens.tolist()):
            row[:n] = self.mask(number, i, n)
        mask = mask.to(self.device)
        hidden = encoder.contextual(x, lens, lens, mask).layers[-1]
        return self.head(hidden), right, mask, valid(lens, x.shape[1]) & ~mask

    def mask(self, number: int, index: int, frames: int) -> Tensor:
        """[frames] bool: what of an utterance is hidden in a micro-batch; at least one span."""
        rng = np.random.default_rng((self.seed, number, index))
        starts = torch.from_numpy(rng.random(frames) < self.masked.mask_start)
        starts[rng.integers(frames)] |= not starts.any()
        return kmeans.masked_spans(starts[None], self.masked.mask_span)[0]

    def _targets(self, plan: Plan, store: Store) -> list[Tensor]:
        """The cluster of every frame, [T_i] int16, by utterance: from disk if they were made."""
        split, clips = self.prepared.splits[self.fold], self.prepared.clips
        exact = [plan.fingerprint, plan.encoder.precision]
        facts = [VERSION, *exact, self.masked.layer, self.masked.clusters, self.seed]
        keys = [[clips[i].key for i in split[part]] for part in ("train", "dev")]
        digest = hashlib.sha256(json.dumps([facts, keys]).encode()).hexdigest()[:12]
        place = store.root / "clusters" / f"{digest}.pt"
        if not place.exists():
            made = self._clustered(plan.encoder, split["train"])
            save_state(made, place)
        return _read(place, len(clips))

    @torch.no_grad()
    def _clustered(self, encoder: Encoder, train: Sequence[int]) -> list[Tensor]:
        """K-means of train's frames, all of them or those of random utterances."""
        encoder.eval()
        order = np.random.default_rng(self.seed).permutation(train).tolist()
        sample, count = list[Tensor](), 0
        for i in order:
            if count < kmeans.SAMPLE:
                sample.append(self._state(encoder, i))
                count += len(sample[-1])
        if count < self.masked.clusters:
            fault = f"{count} frames of audio are too few for {self.masked.clusters} clusters"
            raise UserError(f"{self.prepared.recipe.path}: masked: {fault}")
        fitted = kmeans.means(torch.cat(sample).numpy(), self.masked.clusters, self.seed)
        every = progress(range(len(self.prepared.clips)), "clusters of frames")
        return [kmeans.nearest(fitted, self._state(encoder, i).numpy()) for i in every]

    def _state(self, encoder: Encoder, index: int) -> Tensor:
        """The hidden state of one utterance that is clustered, [T, D]."""
        x, lens = self.batch([index])
        return encoder.contextual(x, lens, lens).layers[self.masked.layer, 0].cpu()


def _read(place: Path, count: int) -> list[Tensor]:
    """The clusters of so many utterances. Raises UserError."""
    with guarded(place, "damaged; delete it and run again"):
        made: list[Tensor] = load_state(place, reason="damaged; delete it and run again")
        if len(made) != count or any(x.ndim != 1 or x.is_floating_point() for x in made):
            raise ValueError(place)
    return made
