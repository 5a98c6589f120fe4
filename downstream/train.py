"""One stream of features, one head per learning rate; the best on dev is kept.

s3prl runs the upstream at every step and for every learning rate (downstream/runner.py); here the
features come from `upstream.cache` and every head sees the same batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from downstream.base import Labels, Task
from downstream.heads import HEADS, Head
from downstream.metrics import METRICS, Metric, score
from downstream.recipe import Recipe, Train
from downstream.specaug import specaug
from upstream.cache import Features
from upstream.progress import progress

SAVE_SECONDS = 300.0  # at most this much training is lost when the process is killed


class Data(NamedTuple):
    """Features and targets of the same utterances."""

    features: Features
    targets: list[str]
    labels: Labels


class Fitted(NamedTuple):
    """The head that is best on dev, and how every learning rate did."""

    head: Head
    lr: float
    dev: dict[str, float]  # learning rate -> best dev score in per cent


class Stream:
    """Training batches as a pure function of (seed, number), so that a resumed run sees the same.

    Frames come in batches of similar length (no padding waste, as s3prl's sorted buckets), time
    means in random batches.
    """

    def __init__(self, indices: Sequence[int], lens: Tensor, batch: int, seed: int, sort: bool):
        self.indices = sorted(indices, key=lambda i: (-int(lens[i]), i)) if sort else list(indices)
        self.batch, self.seed, self.sort = batch, seed, sort
        self.per_epoch = -(-len(self.indices) // batch)
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, number: int) -> list[int]:
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            items = self.per_epoch if self.sort else len(self.indices)
            self.order = torch.randperm(items, generator=generator).tolist()
            self.epoch = epoch
        if self.sort:
            first = self.order[position] * self.batch
            return self.indices[first : first + self.batch]
        chosen = self.order[position * self.batch : (position + 1) * self.batch]
        return [self.indices[i] for i in chosen]


def predict(head: Head, data: Data, indices: Sequence[int], batch: int = 32) -> list[str]:
    """Hypotheses for `indices`, in their order."""
    device = head.layer_weights.device
    order = sorted(indices, key=lambda i: (-int(data.features.lens[i]), i))
    found: dict[int, str] = {}
    head.eval()
    with torch.inference_mode():
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            x, lens = (t.to(device) for t in data.features.batch(chosen))
            ids = head.predict(head(x, lens), lens)
            found.update(zip(chosen, map(data.labels.decode, ids)))
    return [found[i] for i in indices]


def rate(metric: Metric, data: Data, indices: Sequence[int], hypotheses: Sequence[str]) -> float:
    """The metric over `indices` in per cent."""
    counts = [metric.count(data.targets[i], h) for i, h in zip(indices, hypotheses)]
    return score(metric, sum(c.errors for c in counts), sum(c.total for c in counts))


def fit(
    recipe: Recipe,
    data: Data,
    split: dict[str, list[int]],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    state: Path | None = None,
    what: str = "heads",
) -> Fitted:
    """Train one head per learning rate on `split["train"]`, choose step and rate on `split["dev"]`.

    All heads start from the same weights and see the same batches, dropout and SpecAugment: random
    numbers depend on (seed, step) alone, so a run resumed from `state` repeats an unbroken one.
    """
    task, train = recipe.kind_of_task(), recipe.train
    metric = METRICS[task.metric]
    torch.manual_seed(seed)
    shape = (data.features.layers, data.features.dim, data.labels.size)
    first = HEADS[task.head](*shape, **recipe.head)
    runs = [_Run(train, lr, first, shape, task, recipe.head, device) for lr in train.lr]
    encoded = {i: data.labels.encode(data.targets[i]) for i in split["train"]}
    stream = Stream(
        split["train"], data.features.lens, train.batch, seed, sort=task.reduce == "frames"
    )
    begun = _restore(state, runs)
    saved = time.monotonic()
    for step in progress(range(begun, train.steps), what, train.steps, begun):
        parts = [stream[step * train.accumulate + k] for k in range(train.accumulate)]
        batches = [(*data.features.batch(part), [encoded[i] for i in part]) for part in parts]
        for run in runs:
            torch.manual_seed(seed * 1_000_003 + step)
            run.step([(x.to(device), lens.to(device), y) for x, lens, y in batches])
        if (step + 1) % train.eval_every == 0 or step + 1 == train.steps:
            for run in runs:
                dev = rate(metric, data, split["dev"], predict(run.head, data, split["dev"]))
                run.keep(dev, metric)
            last = step + 1 == train.steps  # of this fold, perhaps
            if state and (last or time.monotonic() - saved > SAVE_SECONDS):
                _save(state, runs, step + 1)
                saved = time.monotonic()
    sign = 1 if metric.better == "higher" else -1
    best = max(runs, key=lambda run: sign * run.best)
    best.head.load_state_dict(best.weights)
    return Fitted(best.head, best.lr, {f"{run.lr:g}": run.best for run in runs})


class _Run:
    """One head, its optimizer, and its best weights so far."""

    def __init__(
        self,
        train: Train,
        lr: float,
        first: Head,
        shape: tuple[int, int, int],
        task: Task,
        options: dict[str, Any],
        device: torch.device | str,
    ) -> None:
        self.lr, self.train = lr, train
        self.head = HEADS[task.head](*shape, **options).to(device)
        self.head.load_state_dict(first.state_dict())
        self.parameters = [p for p in self.head.parameters() if p.requires_grad]
        self.optimizer = getattr(torch.optim, train.optimizer)(self.parameters, lr=lr)
        self.best = float("nan")
        self.weights = self.copy()

    def copy(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.head.state_dict().items()}

    def step(self, batches: list[tuple[Tensor, Tensor, list[list[int]]]]) -> None:
        """One update from all micro-batches, each divided by their number (spec: s3prl runner)."""
        self.head.train()
        self.optimizer.zero_grad()
        for x, lens, targets in batches:
            features = self.head.weighted_sum(x)
            if self.train.specaug:
                features = specaug(features, lens)
            logits = self.head.body(features, lens)
            (self.head.loss(logits, lens, targets) / len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip)
        if torch.isfinite(norm):  # s3prl skips the update otherwise
            self.optimizer.step()

    def keep(self, dev: float, metric: Metric) -> None:
        """Remember the weights if `dev` is strictly better than ever before."""
        if metric.improves(dev, self.best):
            self.best, self.weights = dev, self.copy()


def _save(path: Path, runs: list[_Run], step: int) -> None:
    content = {
        "step": step,
        "runs": [
            {
                "head": run.head.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "best": run.best,
                "weights": run.weights,
            }
            for run in runs
        ],
    }
    save_state(path, content)


def save_state(path: Path, content: Any) -> None:
    """torch.save that leaves the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _restore(path: Path | None, runs: list[_Run]) -> int:
    """Fill `runs` from a saved state; the step to go on from."""
    if path is None or not path.exists():
        return 0
    content = torch.load(path, weights_only=True, map_location="cpu")
    for run, kept in zip(runs, content["runs"]):
        run.head.load_state_dict(kept["head"])
        run.optimizer.load_state_dict(kept["optimizer"])
        run.best, run.weights = kept["best"], kept["weights"]
    return int(content["step"])
