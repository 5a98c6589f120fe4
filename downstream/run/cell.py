"""One cell: heads of one upstream, recipe and seed are trained, selected and tested."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from downstream.base import Record
from downstream.recipe import Recipe
from downstream.report.results import Cell, Score, finished, provenance, read_cell, save
from downstream.run.prepare import Prepared
from downstream.run.train import Data, fit, predict
from upstream.features.codec import Features

FEATURES = {"mean": "float32 means"}  # what Score.features calls a kind; else "<kind> frames"


class Identity(NamedTuple):
    """An upstream as tables and folders show it."""

    name: str
    fingerprint: str
    source: str


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
    seen: int = 0,
) -> Score:
    """Train, select and test the heads of one cell (of every fold) and save it.

    `seen`: how many of the test utterances the upstream was fine-tuned on.
    """
    begun = time.monotonic()
    recipe = prepared.recipe
    task = recipe.kind_of_task()
    folder = cell(identity, prepared, seed).folder(results)
    records: list[Record] = []
    lr: dict[str, float] = {}
    dev: dict[str, dict[str, float]] = {}
    for fold, split in prepared.splits.items():
        data = Data(features, prepared.items, prepared.labels(fold), prepared.windows)
        head = None
        if task.head:
            what = f"{identity.name} {recipe.name}{fold and ' ' + fold} seed {seed}"
            state = folder / f"state{fold and '-' + fold}.pt"
            fitted = fit(recipe, data, split, seed=seed, device=device, state=state, what=what)
            head, lr[fold], dev[fold] = fitted.head, fitted.lr, fitted.dev
        outputs = predict(head, data, split["test"])
        tested = task.records([prepared.items[i] for i in split["test"]], outputs, data.labels)
        records += [record._replace(fold=fold) for record in tested]
    score = task.score(records)[task.metrics[0]]
    error = features.error
    notes = [_eight_bit(identity, prepared, seed, results, error, score)] if error else []
    result = Score(
        metric=task.metrics[0],
        better=task.metric.better,
        score=score,
        lr=lr,
        dev=dev,
        n=len({record.id for record in records}),
        speakers=len({record.speaker for record in records}),
        steps=recipe.train.steps,
        seconds=time.monotonic() - begun,
        device=device,
        recipe=recipe.as_dict(),
        source=identity.source,
        features=FEATURES.get(prepared.kind, f"{prepared.kind} frames"),
        clusters=prepared.clusters,
        seen=seen,
        warnings=notes + _warnings(recipe, lr) + prepared.warnings,
        **provenance(),
    )
    save(results, cell(identity, prepared, seed), result, records)
    for state in folder.glob("state*.pt"):
        state.unlink()
    return result


def _eight_bit(
    identity: Identity, prepared: Prepared, seed: int, results: Path, error: float, score: float
) -> str:
    """What 8-bit frames cost: in the features, and in the score if there is one to compare with."""
    recipe = replace(prepared.recipe, frames="float16")
    folder = cell(identity, replace(prepared, recipe=recipe), seed).folder(results)
    line = f"int8 frames: relative RMS error {error:.4f}"
    if not (folder / "score.json").is_file():
        return f"{line}; no score with float16 frames to compare with"
    other = read_cell(folder / "score.json").score.score
    return f"{line}; score {score - other:+.2f} against float16 frames ({other:.2f})"


def _warnings(recipe: Recipe, lr: dict[str, float]) -> list[str]:
    """A best learning rate at the edge of the list may lie beyond it."""
    tried = sorted(recipe.train.lr)
    edges = {tried[0]: "smallest", tried[-1]: "largest"} if len(tried) > 1 else {}
    return [
        f"{fold and fold + ': '}the best learning rate, {rate:g}, is the {edges[rate]} one tried"
        for fold, rate in lr.items()
        if rate in edges
    ]


def missing(identity: Identity, prepared: Prepared, seeds: int, results: Path) -> list[int]:
    """Seeds whose cell is not done."""
    cells = [cell(identity, prepared, seed) for seed in range(seeds)]
    return [each.seed for each in cells if not done(each, prepared, results)]


def done(wanted: Cell, prepared: Prepared, results: Path) -> bool:
    """Whether the cell is finished and names the speakers that the corpus names today."""
    if not finished(results, wanted):
        return False
    clusters = read_cell(wanted.folder(results) / "score.json").score.clusters
    return clusters in ("", prepared.clusters)  # "": from before they were recorded
