"""One stream of features, one head per learning rate; the best on dev is kept.

s3prl runs the upstream at every step and for every learning rate (downstream/runner.py); here the
features come from `upstream.features.provide` and every head sees the same batches.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from downstream.base import Item, Labels, Task
from downstream.recipe import Recipe, Train
from downstream.run.learner import Batch, Lanes, Learner
from downstream.run.order import Stream, drawn
from downstream.run.window import Block, Blocks, Dealt
from downstream.tasks.heads import Head
from upstream.checkpoints.tensor_files import load_state, save_state
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.features.clips import Clip
from upstream.features.codec import Features
from upstream.features.provide import in_order

T = TypeVar("T")
SAVE_SECONDS = 300.0  # at most this much training is lost when the process is killed
PREDICT_BATCH = 32  # utterances
PREDICT_FLOATS = 1.6e8  # 640 MB of features: of HuBERT Base, 32 utterances of ten seconds


class Data(NamedTuple):
    """Features and targets of the same utterances."""

    features: Features
    items: Sequence[Item]
    labels: Labels
    windows: Mapping[int, Sequence[int]] = {}  # utterance -> its crops, for training
    clips: Sequence[Clip] = ()  # for recipes with a window
    training: Features | None = None  # where the block has been announced; else `features` too


def dev_score(task: Task, data: Data, indices: Sequence[int], outputs: Sequence[Any]) -> float:
    """The selecting metric over `indices` in per cent."""
    records = task.records([data.items[i] for i in indices], outputs, data.labels)
    return task.score(records)[task.metrics[0]]


class Fitted(NamedTuple):
    """The head that is best on dev, and how every learning rate did."""

    head: Head
    lr: float
    dev: dict[str, float]  # learning rate -> best dev score in per cent


class Bare(Sequence[Tensor]):
    """The features of some utterances, each read when it is asked for: [L, D], or [L, T, D]."""

    def __init__(self, features: Features, indices: Sequence[int], device: str) -> None:
        self.features, self.indices, self.device = features, indices, device

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: Any) -> Any:
        return self.features.batch([self.indices[number]])[0][:, 0].to(self.device)


def predict(head: Head, data: Data, indices: Sequence[int]) -> list[Any]:
    """What one head makes of `indices`, in their order."""
    return predictions([head], data, indices)[0]


def predictions(heads: Sequence[Head], data: Data, indices: Sequence[int]) -> list[list[Any]]:
    """What every head makes of `indices`, in their order; features are read once for all."""
    features, device = data.features, heads[0].layer_weights.device
    outputs: list[dict[int, Any]] = [{} for _ in heads]
    for head in heads:
        head.eval()
    with torch.inference_mode():
        for chosen, x, lens in in_order(features, _by_length(set(indices), features), device):
            x, lens = x.contiguous(), lens.to(device)
            for head, known in zip(heads, outputs):
                known.update(zip(chosen, head.predict(head(x, lens), lens)))
    return [[known[i] for i in indices] for known in outputs]


def _by_length(indices: Iterable[int], features: Features) -> list[list[int]]:
    """Batches of similar length, longest first, within PREDICT_FLOATS of padded features."""
    lens = features.lens.tolist()
    frames = PREDICT_FLOATS / (features.layers * features.dim)
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lens[i], i)):
        size = len(batches[-1]) if batches else PREDICT_BATCH
        if size == PREDICT_BATCH or (size + 1) * lens[batches[-1][0]] > frames:
            batches.append([])
        batches[-1].append(i)
    return batches


def fit(recipe: Recipe, data: Data, split: dict[str, list[int]], **options: Any) -> Fitted:
    """`fitting` without a stop."""
    return drained(fitting(recipe, data, split, **options))


def drained(steps: Generator[Any, None, T]) -> T:
    """What a generator returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def fitting(
    recipe: Recipe,
    data: Data,
    split: dict[str, list[int]],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    state: Path | None = None,
    what: str = "heads",
) -> Generator[Block, None, Fitted]:
    """Train one head per learning rate on `split["train"]`, choose step and rate on `split["dev"]`
    (with `train.balanced`, on a draw from it in which all classes are as likely).

    All heads start from the same weights and see the same batches, dropout and SpecAugment: random
    numbers depend on (seed, step) alone, so a run resumed from `state` repeats an unbroken one.
    With `train.window` every block is yielded before its first batch is asked for.
    """
    task, train = recipe.kind_of_task(), recipe.train
    assert train is not None
    torch.manual_seed(seed)
    first = recipe.new_head(data.features.layers, data.features.dim, data.labels)
    runs, begun = _begin(train, first, device, state)
    lanes = Lanes(runs, device)
    frames, lens = task.features == "frames", data.features.lens
    weigh = [data.items[i].target for i in split["train"]] if train.balanced else None
    stream: Stream | Dealt
    if train.window is None:
        stream = Stream(split["train"], lens, train.batch, seed, frames, data.windows, weigh)
    else:
        blocks = Blocks(data.clips, split["train"], train.window, data.windows)
        stream = Dealt(blocks, train.batch, seed)
    dev = drawn(data.items, split["dev"]) if train.balanced else split["dev"]
    crops = [j for i in split["train"] for j in data.windows.get(i, [i])]
    encoded = {j: data.labels.encode(data.items[j].target) for j in crops}
    saved = time.monotonic()
    numbers = range(begun * train.accumulate, train.steps * train.accumulate)
    order = (stream[number] for number in numbers)
    batches = in_order(data.training or data.features, order, device)
    block = -1
    for step in progress(range(begun, train.steps), what, train.steps, begun):
        for number in range(step * train.accumulate, (step + 1) * train.accumulate):
            if isinstance(stream, Dealt) and stream.block(number) != block:
                block = stream.block(number)
                yield stream.blocks.block(block)
            indices, x, lens = next(batches)
            targets = [encoded[i] for i in indices]
            lanes.backward(Batch(x.contiguous(), lens, targets), seed * 1_000_003 + number)
        lanes.update()
        last = step + 1 == train.steps  # of this fold, perhaps
        if (step + 1) % train.eval_every == 0 or last:
            for run, outputs in zip(runs, predictions([run.head for run in runs], data, dev)):
                run.keep(dev_score(task, data, dev, outputs), task.metric)
            if state and (last or time.monotonic() - saved > SAVE_SECONDS):
                _save(state, step + 1, runs)
                saved = time.monotonic()
    sign = 1 if task.metric.better == "higher" else -1
    best = max(runs, key=lambda run: sign * run.best)
    best.head.load_state_dict(best.weights)
    return Fitted(best.head, best.lr, {f"{run.lr:g}": run.best for run in runs})


def _begin(
    train: Train, first: Head, device: torch.device | str, state: Path | None
) -> tuple[list[Learner], int]:
    """Learners that start from the head `first`, and the step they are at: that of `state`, or 0.

    Raises Unreadable for a state that cannot be read for now; one that is not of this run, or
    damaged, is told and left.
    """

    def fresh() -> list[Learner]:
        return [Learner(train, lr, copy.deepcopy(first).to(device)) for lr in train.lr]

    if state is None or not os.path.lexists(state):
        return fresh(), 0
    runs = fresh()
    try:
        kept = load_state(state)
        step, facts = kept["step"], kept["runs"]
        if not isinstance(step, int) or not 0 <= step <= train.steps or len(facts) != len(runs):
            raise ValueError("is of another run")
        for run, fact in zip(runs, facts):
            run.restore(fact)
        return runs, step
    except disk.Unreadable:
        raise
    except FOREIGN as error:
        reason = " ".join(str(error).split())
        print(f"{state}: is no state of these heads ({reason:.100}); begun anew", file=sys.stderr)
        return fresh(), 0


FOREIGN = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


def _save(state: Path, step: int, runs: Sequence[Learner]) -> None:
    """Keep what an interruption would lose; where that cannot be written, the training goes on."""
    try:
        save_state({"step": step, "runs": [run.state() for run in runs]}, state)
    except UserError as error:
        print(f"no state is kept, an interruption would begin anew: {error}", file=sys.stderr)
