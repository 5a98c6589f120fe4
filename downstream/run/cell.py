"""From an upstream and a recipe to finished cells: extract once, then train and test heads."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from downstream.base import Count, Example, Labels
from downstream.recipe import Recipe, examples
from downstream.report.results import Cell, Score, finished, provenance, read_cell, save
from downstream.run.train import Data, fit, predict
from downstream.tasks import er
from downstream.tasks.metrics import METRICS, score
from upstream.common.errors import UserError
from upstream.features import clips as audiofiles
from upstream.features.clips import Clip
from upstream.features.extract import Features, Kind


@dataclass(frozen=True)
class Prepared:
    """A recipe with its corpus read: what to extract, and which indices train, select and test."""

    recipe: Recipe
    ids: list[str]
    speakers: list[str]
    targets: list[str]
    clips: list[Clip]
    splits: dict[str, dict[str, list[int]]]  # fold ("" if there are none) -> train, dev, test
    content: str  # hash of targets, splits and audio

    @property
    def revision(self) -> str:
        """12 hex digits over all that can change a score."""
        return hashlib.sha256((self.recipe.hash + self.content).encode()).hexdigest()[:12]

    @property
    def kind(self) -> Kind:
        """What the head needs of every utterance."""
        return "mean" if self.recipe.kind_of_task().reduce == "mean" else self.recipe.frames

    @property
    def seconds(self) -> float:
        """Audio that one pass takes."""
        return sum(clip.seconds for clip in self.clips)


class Identity(NamedTuple):
    """An upstream as tables and folders show it."""

    name: str
    fingerprint: str
    source: str


def prepare(recipe: Recipe, results: Path) -> Prepared:
    """Read the recipe's corpus and fix splits and crops. Raises UserError for an unusable one."""
    items = examples(recipe, results)
    if recipe.folds:
        splits = er.folds(items)
    else:
        parts = ("train", "dev", "test")
        splits = {"": {p: [i for i, e in enumerate(items) if e.split == p] for p in parts}}
    for fold, split in splits.items():
        for part, indices in split.items():
            if not indices:
                where = f"fold {fold}: " if fold else ""
                raise UserError(f"{recipe.path}: corpus: {where}no utterances in split {part!r}")
    clips = audiofiles.clips(
        [(e.path, e.start, e.end) for e in items], results / "cache" / audiofiles.INDEX
    )
    if recipe.crop:
        items, clips, splits = _cropped(recipe, items, clips, splits)
    digest = hashlib.sha256()
    for e, clip in zip(items, clips):
        digest.update(f"{e.id} {e.target} {e.split} {clip.key}\n".encode())
    return Prepared(
        recipe=recipe,
        ids=[e.id for e in items],
        speakers=[e.speaker for e in items],
        targets=[e.target for e in items],
        clips=clips,
        splits=splits,
        content=digest.hexdigest(),
    )


def _cropped(
    recipe: Recipe,
    items: list[Example],
    clips: list[Clip],
    splits: dict[str, dict[str, list[int]]],
) -> tuple[list[Example], list[Clip], dict[str, dict[str, list[int]]]]:
    """Long training utterances are replaced by windows at places drawn from the crop's seed."""
    crop = recipe.crop
    assert crop is not None
    generator = torch.Generator().manual_seed(crop.seed)
    whole = {i for split in splits.values() for part in ("dev", "test") for i in split[part]}
    training = {i for split in splits.values() for i in split["train"]}
    found: list[tuple[Example, Clip]] = []  # whole utterances that no split uses are left out
    windows: dict[int, list[int]] = {}  # index before -> indices of what it is trained on
    places: dict[int, int] = {}  # index before -> index of the whole utterance
    for i, (item, clip) in enumerate(zip(items, clips)):
        long = i in training and clip.seconds > crop.seconds
        if i in whole or not long:
            places[i] = len(found)
            windows[i] = [len(found)]
            found.append((item, clip))
        if long:
            windows[i] = list(range(len(found), len(found) + crop.per_utterance))
            for place in torch.rand(crop.per_utterance, generator=generator).tolist():
                start = (item.start or 0.0) + place * (clip.seconds - crop.seconds)
                found.append((item, clip.part(start, start + crop.seconds)))
    splits = {
        fold: {
            "train": [j for i in split["train"] for j in windows[i]],
            **{part: [places[i] for i in split[part]] for part in ("dev", "test")},
        }
        for fold, split in splits.items()
    }
    return [item for item, _ in found], [clip for _, clip in found], splits


def cell(identity: Identity, prepared: Prepared, seed: int) -> Cell:
    """The unit that is computed, stored, resumed and compared."""
    recipe = prepared.recipe
    names = (identity.name, identity.fingerprint, recipe.suite, recipe.name)
    return Cell(*names, prepared.revision, seed)


def run(
    identity: Identity,
    prepared: Prepared,
    seed: int,
    features: Features,
    results: Path,
    device: str = "cpu",
    error: float | None = None,
) -> Score:
    """Train, select and test the heads of one cell (of every fold) and save it.

    `error` is the relative RMS error of 8-bit features, to be reported beside their score.
    """
    begun = time.monotonic()
    recipe = prepared.recipe
    task = recipe.kind_of_task()
    metric = METRICS[task.metric]
    folder = cell(identity, prepared, seed).folder(results)
    predictions: list[Count] = []
    scores: list[float] = []
    lr: dict[str, float] = {}
    dev: dict[str, dict[str, float]] = {}
    for fold, split in prepared.splits.items():
        labels = task.labels(recipe.tokens, [prepared.targets[i] for i in split["train"]])
        _require_known(prepared, labels, split)
        data = Data(features, prepared.targets, labels)
        what = f"{identity.name} {recipe.name}{fold and ' ' + fold} seed {seed}"
        state = folder / f"state{fold and '-' + fold}.pt"
        fitted = fit(recipe, data, split, seed=seed, device=device, state=state, what=what)
        errors = total = 0.0
        for i, hypothesis in zip(split["test"], predict(fitted.head, data, split["test"])):
            count = metric.count(prepared.targets[i], hypothesis)
            errors, total = errors + count.errors, total + count.total
            who = (prepared.ids[i], prepared.speakers[i])
            predictions.append(Count(*who, prepared.targets[i], hypothesis, *count, fold))
        scores.append(score(metric, errors, total))
        lr[fold], dev[fold] = fitted.lr, fitted.dev
    mean = sum(scores) / len(scores)
    notes = [] if error is None else [_eight_bit(identity, prepared, seed, results, error, mean)]
    result = Score(
        metric=task.metric,
        better=metric.better,
        score=mean,
        lr=lr,
        dev=dev,
        n=len(predictions),
        speakers=len({p.speaker for p in predictions}),
        steps=recipe.train.steps,
        seconds=time.monotonic() - begun,
        device=device,
        recipe=recipe.as_dict(),
        source=identity.source,
        warnings=notes + _warnings(recipe, lr),
        **provenance(),
    )
    save(results, cell(identity, prepared, seed), result, predictions)
    for state in folder.glob("state*.pt"):
        state.unlink()
    return result


def _eight_bit(
    identity: Identity, prepared: Prepared, seed: int, results: Path, error: float, mean: float
) -> str:
    """What 8-bit frames cost: in the features, and in the score if there is one to compare with."""
    recipe = replace(prepared.recipe, frames="float16")
    folder = cell(identity, replace(prepared, recipe=recipe), seed).folder(results)
    line = f"int8 frames: relative RMS error {error:.4f}"
    if not (folder / "score.json").is_file():
        return f"{line}; no score with float16 frames to compare with"
    other = read_cell(folder / "score.json").score.score
    return f"{line}; score {mean - other:+.2f} against float16 frames ({other:.2f})"


def _warnings(recipe: Recipe, lr: dict[str, float]) -> list[str]:
    """A best learning rate at the edge of the list may lie beyond it."""
    tried = sorted(recipe.train.lr)
    edges = {tried[0]: "smallest", tried[-1]: "largest"} if len(tried) > 1 else {}
    return [
        f"{fold and fold + ': '}the best learning rate, {rate:g}, is the {edges[rate]} one tried"
        for fold, rate in lr.items()
        if rate in edges
    ]


def _require_known(prepared: Prepared, labels: Labels, split: dict[str, list[int]]) -> None:
    """A target that the labels cannot express is an error before any training."""
    for part in ("train", "dev", "test"):
        for i in split[part]:
            try:
                labels.encode(prepared.targets[i])
            except UserError as error:
                raise UserError(f"{prepared.recipe.path}: {prepared.ids[i]}: {error}") from error


def missing(identity: Identity, prepared: Prepared, seeds: int, results: Path) -> list[int]:
    """Seeds whose cell is not finished."""
    return [s for s in range(seeds) if not finished(results, cell(identity, prepared, s))]
