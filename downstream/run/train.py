"""One stream of features, one head per learning rate; the best on dev is kept.

s3prl runs the upstream at every step and for every learning rate (downstream/runner.py); here the
features come from `upstream.features.provide` and every head sees the same batches.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from downstream.base import Item, Labels, Metric, Task
from downstream.recipe import Recipe, Train
from downstream.run.adam import Adam
from downstream.run.window import Block, Blocks, Dealt
from downstream.tasks.heads import Head
from downstream.tasks.specaug import specaug
from upstream.common import disk
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


class Batch(NamedTuple):
    """Training features on the heads' device, read once for all of them."""

    x: Tensor  # [L, B, T, D] (or [L, B, D]), contiguous: the sum over layers is then one product
    lens: Tensor  # [B]
    targets: list[list[int]]


class Fitted(NamedTuple):
    """The head that is best on dev, and how every learning rate did."""

    head: Head
    lr: float
    dev: dict[str, float]  # learning rate -> best dev score in per cent


class Stream:
    """Training batches as a pure function of (seed, number), so that a resumed run sees the same.

    An epoch has every utterance once; of one in `windows`, a crop, and in the next epoch the next.
    With `sort` batches are of similar length (no padding waste, as s3prl's sorted buckets). With
    `weigh`, the class of each of `indices`, an epoch is as many draws with replacement in which
    every class is as likely (PyTorch's WeightedRandomSampler, s3prl downstream/speech_commands).
    With `most`, in place of `batch`, a batch takes at most so much, padding included: `bounded`.
    """

    def __init__(
        self,
        indices: Sequence[int],
        lens: Tensor,
        batch: int | None,
        seed: int,
        sort: bool,
        windows: Mapping[int, Sequence[int]] = {},
        weigh: Sequence[str] | None = None,
        most: float | None = None,
    ) -> None:
        sort = sort and weigh is None
        self.indices = sorted(indices, key=lambda i: (-int(lens[i]), i)) if sort else list(indices)
        self.weights = balanced(weigh) if weigh else None
        self.seed, self.sort, self.windows = seed, sort, windows
        if batch is None:
            assert sort and most is not None
            self.groups = bounded([float(lens[i]) for i in self.indices], most)
        else:
            count = len(self.indices)
            self.groups = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, number: int) -> list[int]:
        epoch, position = divmod(number, len(self.groups))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            size = len(self.groups) if self.sort else len(self.indices)
            self.order = (
                torch.randperm(size, generator=generator)
                if self.weights is None
                else torch.multinomial(self.weights, size, True, generator=generator)
            ).tolist()
            self.epoch = epoch
        places = self.groups[self.order[position] if self.sort else position]
        chosen = [self.indices[place if self.sort else self.order[place]] for place in places]
        crops = [self.windows.get(i, [i]) for i in chosen]
        return [crop[(self.seed + epoch) % len(crop)] for crop in crops]


def bounded(lens: Sequence[float], most: float) -> list[range]:
    """Places in `lens`, longest first: batches of at most `most` with padding, or of one."""
    groups, first = list[range](), 0
    for place in range(1, len(lens)):
        if (place + 1 - first) * lens[first] > most:
            groups.append(range(first, place))
            first = place
    return [*groups, range(first, len(lens))]


def balanced(classes: Sequence[str]) -> Tensor:
    """The weight of each utterance, by which every class is as likely to be drawn."""
    counts = Counter(classes)
    return torch.tensor([1 / counts[each] for each in classes], dtype=torch.float64)


def drawn(items: Sequence[Item], indices: Sequence[int]) -> list[int]:
    """As many of `indices`, with replacement, every class as likely; always the same draw.

    What s3prl downstream/speech_commands selects on: seeded again before each evaluation.
    """
    weights = balanced([items[i].target for i in indices])
    generator = torch.Generator().manual_seed(0)
    order = torch.multinomial(weights, len(indices), True, generator=generator)
    return [indices[place] for place in order.tolist()]


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
        for chosen, x, lens in in_order(features, _by_length(set(indices), features)):
            x, lens = x.to(device).contiguous(), lens.to(device)
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
    runs = [_Run(train, lr, copy.deepcopy(first).to(device)) for lr in train.lr]
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
    begun, saved = 0, time.monotonic()
    if state and state.exists():
        kept = torch.load(state, weights_only=True, map_location="cpu")
        begun = kept["step"]
        for run, facts in zip(runs, kept["runs"]):
            run.restore(facts)
    numbers = range(begun * train.accumulate, train.steps * train.accumulate)
    batches = in_order(data.training or data.features, (stream[number] for number in numbers))
    block = -1
    for step in progress(range(begun, train.steps), what, train.steps, begun):
        for number in range(step * train.accumulate, (step + 1) * train.accumulate):
            if isinstance(stream, Dealt) and stream.block(number) != block:
                block = stream.block(number)
                yield stream.blocks.block(block)
            indices, x, lens = next(batches)
            targets = [encoded[i] for i in indices]
            batch = Batch(x.to(device).contiguous(), lens.to(device), targets)
            for run in runs:
                _seed(seed * 1_000_003 + number, device)
                run.backward(batch)
        for run in runs:
            run.update()
        last = step + 1 == train.steps  # of this fold, perhaps
        if (step + 1) % train.eval_every == 0 or last:
            for run, outputs in zip(runs, predictions([run.head for run in runs], data, dev)):
                run.keep(dev_score(task, data, dev, outputs), task.metric)
            if state and (last or time.monotonic() - saved > SAVE_SECONDS):
                with disk.whole(state) as part:
                    torch.save({"step": step + 1, "runs": [run.state() for run in runs]}, part)
                saved = time.monotonic()
    sign = 1 if task.metric.better == "higher" else -1
    best = max(runs, key=lambda run: sign * run.best)
    best.head.load_state_dict(best.weights)
    return Fitted(best.head, best.lr, {f"{run.lr:g}": run.best for run in runs})


def _seed(number: int, device: torch.device | str) -> None:
    """torch.manual_seed, less the stack trace that it formats (0.1 ms) while CUDA is unused."""
    torch.default_generator.manual_seed(number)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed(number)


class _Run:
    """One head, its optimizer, and its best weights so far."""

    def __init__(self, train: Train, lr: float, head: Head) -> None:
        self.train, self.lr, self.head = train, lr, head
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        self.optimizer = Adam(self.parameters, lr, train.optimizer == "AdamW")
        self.best = float("nan")
        self.weights = copy.deepcopy(head.state_dict())

    def backward(self, batch: Batch) -> None:
        """Add one micro-batch's gradients, divided by how many make an update (s3prl runner)."""
        self.head.train()
        features = self.head.weighted_sum(batch.x)
        if self.train.specaug:
            features = specaug(features, batch.lens)
        logits = self.head.body(features, batch.lens)
        loss = self.head.loss(logits, batch.lens, batch.targets)
        (loss / self.train.accumulate).backward()

    def update(self) -> None:
        """One step with clipped gradients; s3prl leaves it out if they are not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
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
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.weights = state["best"], state["weights"]
