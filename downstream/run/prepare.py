"""A recipe with its corpus read: what to extract, and what trains, selects and tests the heads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from downstream.base import Example, Item, Labels, Task
from downstream.recipe import Crop, Recipe, examples
from downstream.run import data_checks
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.schema import build
from upstream.features import clips as audiofiles
from upstream.features.clips import Clip

if TYPE_CHECKING:  # a corpus is read without torch, which takes seconds to import
    from downstream.run.window import Blocks
    from upstream.features.codec import Kind

ONE_WORD, LONG_WORD = 0.9, 7  # share of the targets, characters: more is no text of words
Split = dict[str, list[int]]  # train, dev, test -> indices of items and clips
Piece = tuple[Example, Clip]


@dataclass(frozen=True)
class Prepared:
    """What a recipe and its corpus amount to. `items` and `clips` run in parallel.

    A long utterance that the recipe crops stands once in `splits`; `windows` has the indices of
    its crops, one of which is drawn for each epoch of training.
    """

    recipe: Recipe
    items: list[Item]
    clips: list[Clip]
    splits: dict[str, Split]  # by fold, "" if there are none
    windows: dict[int, list[int]]
    content: str  # hash of targets, splits and audio
    warnings: list[str]

    @property
    def revision(self) -> str:
        """12 hex digits over all that can change a score."""
        return _digest(self.recipe.hash + self.content)

    @property
    def clusters(self) -> str:
        """12 hex digits over who speaks, in which group: intervals rest on it, scores do not."""
        rows = {"\t".join(filter(None, (i.id, i.speaker, i.group))) + "\n" for i in self.items}
        return _digest("".join(sorted(rows)))

    @property
    def kind(self) -> Kind:
        """What the head needs of every utterance."""
        return self.recipe.features

    @property
    def seconds(self) -> float:
        """Audio that one pass takes."""
        return sum(clip.seconds for clip in self.clips)

    @cached_property
    def targets(self) -> list[str]:
        """What each item should be recognised as."""
        return [item.target for item in self.items]

    @property
    def evaluated(self) -> list[Clip]:
        """The utterances of all folds that heads are selected or tested on."""
        parts = [split[part] for split in self.splits.values() for part in ("dev", "test")]
        return [self.clips[i] for i in sorted({i for part in parts for i in part})]

    @property
    def tested(self) -> list[Clip]:
        """The test utterances of all folds."""
        return [self.clips[i] for split in self.splits.values() for i in split["test"]]

    @cached_property
    def blocks(self) -> Blocks | None:
        """Of the training set, if the recipe has a window (and so no folds)."""
        minutes, (split, *_) = self.recipe.window, self.splits.values()
        if not minutes:
            return None
        from downstream.run.window import Blocks

        return Blocks(self.clips, split["train"], minutes, self.windows)

    @cached_property
    def sharing(self) -> str:
        """Tasks in which this is the same train on the same frames in the same order; "": alone."""
        blocks = self.blocks
        return _digest(f"{self.kind} {blocks.count} {blocks.keys}") if blocks else ""

    def labels(self, fold: str, frame: float = 0.02) -> Labels:
        """The classes of a fold's training targets; `frame`: seconds of a frame."""
        targets = [self.targets[i] for i in self.splits[fold]["train"]]
        labels = self.recipe.kind_of_task().labels(self.recipe.tokens, targets)
        return dataclasses.replace(labels, frame=frame)

    def audio(self, indices: Iterable[int]) -> list[Clip]:
        """All that training on `indices` may hear."""
        return [self.clips[j] for i in indices for j in self.windows.get(i, [i])]

    def save(self, folder: Path) -> Path:
        """Write it for worker processes into a file named by its content. Raises UserError."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        text = json.dumps({**fields, "recipe": dataclasses.asdict(self.recipe)})
        path = folder / f"{_digest(text)}.json"
        try:
            known = disk.read(path, disk.TABLE_BYTES).decode()
        except ValueError:
            known = ""
        if known != text:  # nothing is believed because of its name
            disk.write(path, text)
        return path

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Read what `save` wrote: its name is its content's, so that no other can stand there, for
        it names Python that runs. Raises UserError."""
        try:
            text = disk.read(path, disk.TABLE_BYTES).decode()
            if _digest(text) != path.stem:
                raise ValueError("was changed")
            data = json.loads(text)
            data["recipe"] = build(Recipe, data["recipe"], str(path))
            data["items"] = [Item(*item) for item in data["items"]]
            data["clips"] = [Clip(*clip) for clip in data["clips"]]
            data["windows"] = {int(index): crops for index, crops in data["windows"].items()}
            return cls(**data)
        except disk.Unreadable:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and run again") from error


def prepare(recipe: Recipe, results: Path) -> Prepared:
    """Read the recipe's corpus, fix splits and crops, and check every target against the labels.

    What is doubtful is a warning, on stderr too: characters that the labels do not know, audio that
    train and test share, and what else `data_checks` finds. Raises UserError for a corpus that
    cannot be used.
    """
    with without_collection():
        return _prepare(recipe, results)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage is collected in the block: among a million new tuples the search is in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _prepare(recipe: Recipe, results: Path) -> Prepared:
    task, corpus = recipe.kind_of_task(), examples(recipe, results)
    parts = ("train", "dev", "test")
    splits = folds(corpus) if recipe.folds else {"": {p: _of(corpus, p) for p in parts}}
    for fold, part in itertools.product(splits, task.needs):
        if not splits[fold][part]:
            where = f"fold {fold}: " if fold else ""
            raise UserError(f"{recipe.path}: corpus: {where}no utterances in split {part!r}")
    cache = results / "cache"
    places = [(e.path, e.start, e.end, e.channel) for e in corpus]
    clips = audiofiles.clips(places, cache / audiofiles.INDEX)
    doubts = data_checks.shared_audio(corpus, clips, splits)
    doubts += data_checks.channels_and_silence(corpus, clips, cache)
    pieces = [(_normalised(task, example), clip) for example, clip in zip(corpus, clips)]
    for example, clip in pieces:
        try:
            data_checks.require_times_inside(task, example, clip.seconds)
        except UserError as error:
            raise UserError(f"{recipe.path}: {example.split}: {error}") from error
    windows: dict[int, list[int]] = {}
    if recipe.crop:
        pieces, splits, windows = _cropped(recipe.crop, task, pieces, splits)
    lines = [f"{e.id} {e.target} {e.split} {clip.key}\n" for e, clip in pieces]
    if windows:
        lines.append(json.dumps(sorted(windows.items())))
    content = hashlib.sha256("".join(lines).encode()).hexdigest()
    items = [Item(e.id, e.speaker, e.target, clip.seconds, e.group) for e, clip in pieces]
    clips = [clip for _, clip in pieces]
    prepared = Prepared(recipe, items, clips, splits, windows, content, [])
    _require_batches(prepared)
    prepared.warnings.extend(_unknown_symbols(prepared) + _without_spaces(prepared))
    prepared.warnings.extend(doubts + data_checks.doubtful_targets(prepared))
    for (fold, split), part in itertools.product(splits.items(), task.needs):
        if part != "train":
            try:
                task.check([items[i] for i in split[part]])
            except UserError as error:
                raise UserError(f"{recipe.path}: {fold or part}: {error}") from error
    for warning in prepared.warnings:
        _say(f"{recipe.path}: {warning}")
    return prepared


def _normalised(task: Task, example: Example) -> Example:
    target = task.normalised(example.target)
    return example if target == example.target else example._replace(target=target)


def _require_batches(prepared: Prepared) -> None:
    """Raises UserError for a window that holds less than a batch."""
    blocks, train = prepared.blocks, prepared.recipe.train
    if blocks and train and blocks.count > 1 and blocks.size(-1) < train.batch:
        least = math.ceil(train.batch * blocks.seconds / len(blocks.crops) / 6 + 0.5) / 10
        raise UserError(
            f"{prepared.recipe.path}: train: window: {train.window:g} minutes hold "
            f"{blocks.size(-1)} utterances, less than a batch of {train.batch}; "
            f"{least:g} minutes hold one"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _of(corpus: Sequence[Example], part: str) -> list[int]:
    having = {split for split in {e.split for e in corpus} if part in split.split()}
    return [i for i, e in enumerate(corpus) if e.split in having]


def folds(corpus: Sequence[Example]) -> dict[str, Split]:
    """Fold -> {train, dev, test} indices: test on the fold, 80/20 of the rest train/dev.

    The random 80/20 split is drawn with seed 0 in every fold, as in s3prl's downstream/emotion
    (speakers overlap).
    """
    import torch

    splits = {}
    for fold in sorted({e.split for e in corpus}):
        pool = [i for i, e in enumerate(corpus) if e.split != fold]
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
        cut = int(0.8 * len(pool))
        train, dev = [pool[i] for i in order[:cut]], [pool[i] for i in order[cut:]]
        splits[fold] = {"train": train, "dev": dev, "test": _of(corpus, fold)}
    return splits


def _cropped(
    crop: Crop, task: Task, utterances: Sequence[Piece], splits: dict[str, Split]
) -> tuple[list[Piece], dict[str, Split], dict[int, list[int]]]:
    """Pieces, splits and windows with crops of long training utterances.

    Whole, such an utterance stays only where a split selects or tests on it.
    """
    import torch

    generator = torch.Generator().manual_seed(crop.seed)
    whole = {i for split in splits.values() for part in ("dev", "test") for i in split[part]}
    training = {i for split in splits.values() for i in split["train"]}
    pieces: list[Piece] = []
    windows: dict[int, list[int]] = {}
    place: list[int] = []  # index before -> after, of the utterance or its first window
    for i, (example, clip) in enumerate(utterances):
        place.append(len(pieces))
        long = i in training and clip.seconds > crop.seconds
        if i in whole or not long:
            pieces.append((example, clip))
        if long:
            windows[place[i]] = list(range(len(pieces), len(pieces) + crop.per_utterance))
            for share in torch.rand(crop.per_utterance, generator=generator).tolist():
                first = share * (clip.seconds - crop.seconds)
                target = task.excerpt(example.target, first, first + crop.seconds)
                start = (example.start or 0.0) + first
                part = clip.part(start, start + crop.seconds)
                pieces.append((example._replace(target=target), part))
    moved = {
        fold: {part: [place[i] for i in indices] for part, indices in split.items()}
        for fold, split in splits.items()
    }
    return pieces, moved, windows


def _unknown_symbols(prepared: Prepared) -> list[str]:
    """A warning, if any. Raises UserError for a target that the labels cannot express at all."""
    unknown: dict[int, list[str]] = {}
    for fold, split in prepared.splits.items():
        where = prepared.recipe.path
        try:
            labels = prepared.labels(fold)
            symbols: dict[str, list[str]] = {}  # by target: many are the same label
            for i in sorted(set(itertools.chain(*split.values()))):
                target = prepared.targets[i]
                if target not in symbols:
                    where = f"{prepared.recipe.path}: {prepared.items[i].id}"
                    symbols[target] = labels.unknown(target)
                if symbols[target]:
                    unknown[i] = symbols[target]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    counts = Counter(itertools.chain(*unknown.values()))
    most = ", ".join(f"{symbol} ({count})" for symbol, count in counts.most_common(8))
    advice = "; `tokens: train` takes them from the training targets"
    are = "symbol of {} is" if counts.total() == 1 else "symbols of {} are"
    targets = f"{len(unknown)} target{'s' * (len(unknown) != 1)}"
    warning = (
        f"{counts.total()} {are.format(targets)} outside the vocabulary and cannot be recognised: "
        f"{most}{advice * (prepared.recipe.tokens == 'superb')}"
    )
    return [warning] * bool(unknown)


def _without_spaces(prepared: Prepared) -> list[str]:
    """A warning where the word error rate would count whole sentences."""
    if prepared.recipe.kind_of_task().metrics[0] != "wer":
        return []
    texts = [target for target in prepared.targets if target]
    single = [text for text in texts if " " not in text]
    length = sum(map(len, single)) / max(1, len(single))
    if len(single) <= ONE_WORD * len(texts) or length < LONG_WORD:
        return []
    return [
        f"{len(single)} of {len(texts)} targets are one word, of {length:.0f} characters on "
        "average: is this a script without spaces? `metric: [cer]` counts characters"
    ]
