"""What a recipe of stage 1 aims at: tasks and masked prediction, one alone or several in turn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from downstream import recipe as task_recipes
from downstream.base import CORPORA, Item
from downstream.recipe import Recipe, examples, named
from downstream.run.prepare import Prepared, prepare
from upstream.common.errors import UserError
from upstream.common.schema import Amount, Bound, Natural, Positive, Share, bind
from upstream.encoder.encoder import Encoder
from upstream.features import clips as audiofiles

Clusters = Annotated[int, Bound(2, 30_000)]
Part = Annotated[float, Bound(0, 1, open_low=True, open_high=True)]  # of the micro-batches
MASKED = "masked"


@dataclass(frozen=True)
class Masked:
    """HuBERT's pre-training, continued on audio without labels (arXiv 2106.07447).

    Predicted are k-means clusters of a hidden state of the upstream before it is tuned.
    """

    corpus: dict[str, Any]  # any reader; `audio` takes a folder; only train and dev are used
    clusters: Clusters = 100
    layer: Natural = 6  # the hidden state that is clustered
    mask_start: Share = 0.08  # probability that a frame begins a masked span
    mask_span: Positive = 10  # frames
    unmasked_weight: Annotated[float, Bound(0, 1e9)] = 0.0  # of a seen frame; a hidden one's is 1
    seconds: Amount = 16.0  # longer utterances are taken in equal parts


@dataclass(frozen=True)
class Aim:
    """One objective: a task recipe beside the finetune recipe, or masked prediction."""

    share: Part  # of the micro-batches; the recipe's first objective has the rest
    task: str = ""
    masked: Masked | None = None
    weight: Amount = 1.0  # of its loss
    head: dict[str, Any] = field(default_factory=dict)
    specaug: bool = False
    fold: str | None = None  # of a task with folds; None: the first
    layer: Natural | None = None  # the hidden state that feeds the head; None: the last

    @property
    def name(self) -> str:
        """What messages and the history call it."""
        return Path(self.task).stem if self.task else MASKED

    def check(self, folder: Path, where: str) -> None:
        """Raises UserError for an aim that is none, or two, or has another's options."""
        if bool(self.task) == (self.masked is not None):
            raise UserError(f"{where}: needs a task (a file), or else masked: {{corpus: ...}}")
        if self.masked is None:
            task = task_recipes.load(folder / self.task)
            task.head_constructor(self.head, f"{where}: head")
            return
        options = {"head": {}, "specaug": False, "fold": None, "layer": None}
        for key, unset in options.items():
            if getattr(self, key) != unset:
                raise UserError(f"{where}: {key}: is for a task; masked prediction has none")
        corpus = dict(self.masked.corpus)
        place = f"{where}: masked: corpus"
        reader = named(CORPORA, corpus.pop("name", None), f"{place}: name")
        bind(reader, corpus, place, given=("results",))

    def fits(self, encoder: Encoder, where: str) -> None:
        """Raises UserError for a layer that the encoder does not have, or nothing to mask with."""
        masked = self.masked.layer if self.masked else None
        layers = {"layer": self.layer, "masked: layer": masked}
        for key, layer in layers.items():
            if layer is not None and layer >= encoder.num_layers:
                most = encoder.num_layers - 1
                raise UserError(f"{where}: {key}: {encoder.source} has hidden states 0 to {most}")
        if self.masked and not hasattr(encoder.model, "masked_spec_embed"):
            fault = f"{encoder.source} holds no masked_spec_embed, so no frame can be hidden"
            raise UserError(f"{where}: masked: {fault}")

    def prepared(self, recipe: Path, results: Path) -> Prepared:
        """Its corpus, read. Raises UserError."""
        if self.masked is None:
            return prepare(task_recipes.load(recipe.parent / self.task), results)
        return unlabelled(self.masked, recipe, results)

    def fold_of(self, prepared: Prepared) -> str:
        """The fold to train on. Raises UserError."""
        folds = prepared.splits
        fold = self.fold or next(iter(folds))
        if fold not in folds:
            raise UserError(f"fold {fold!r}: the corpus has {', '.join(folds) or 'none'}")
        return fold

    def heard(self, prepared: Prepared) -> set[str]:
        """Keys of the clips whose labels are seen on train and dev: of masked prediction none."""
        if self.masked:
            return set()
        split = prepared.splits[self.fold_of(prepared)]
        return {clip.key for clip in prepared.audio([*split["train"], *split["dev"]])}


def unlabelled(masked: Masked, path: Path, results: Path) -> Prepared:
    """The audio of train and dev, long utterances in parts, whatever is said there. UserError."""
    recipe = Recipe("task", MASKED, masked.corpus, name=MASKED, path=str(path))
    found = [e for e in examples(recipe, results) if {"train", "dev"} & set(e.split.split())]
    parts = [(e.path, e.start, e.end) for e in found]
    clips, items = [], []
    split: dict[str, list[int]] = {"train": [], "dev": [], "test": []}
    for example, clip in zip(
        found, audiofiles.clips(parts, results / "cache" / audiofiles.INDEX), strict=True
    ):
        count = max(1, -int(-clip.seconds // masked.seconds))
        for number in range(count):
            first, last = (clip.seconds * (number + k) / count for k in (0, 1))
            begin = clip.start or 0.0
            clips.append(clip if count == 1 else clip.part(begin + first, begin + last))
            name = example.id if count == 1 else f"{example.id}:{first:g}-{last:g}"
            items.append(Item(name, example.speaker, "", clips[-1].seconds))
            split["train" if "train" in example.split else "dev"].append(len(clips) - 1)
    for part in ("train", "dev"):
        if not split[part]:
            raise UserError(f"{path}: masked: corpus: no utterances in split {part!r}")
    kept = [f"{part} {clips[i].key}\n" for part in ("train", "dev") for i in split[part]]
    content = hashlib.sha256("".join(kept).encode()).hexdigest()
    return Prepared(recipe, items, clips, {"": split}, {}, content, [])
