"""One cell: heads of one upstream, recipe and seed are trained, selected and tested."""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from downstream.base import AND, METRICS, Part, Record
from downstream.report.results import Cell, Score, finished, provenance, read_cell, save
from downstream.run import heads
from downstream.run.prepare import Prepared
from downstream.run.train import Bare, Data, drained, fitting, predict
from downstream.run.window import Block
from downstream.tasks.heads import Head
from upstream.common import disk
from upstream.features.codec import Features
from upstream.features.window import Window


class Identity(NamedTuple):
    """An upstream as tables and folders show it."""

    name: str
    fingerprint: str
    source: str
    frame: float = 0.02  # seconds from one frame to the next


def cell(identity: Identity, prepared: Prepared, seed: int) -> Cell:
    """The unit that is computed, stored, resumed and compared."""
    suite, task = prepared.recipe.suite, prepared.recipe.name
    return Cell(identity.name, identity.fingerprint, suite, task, prepared.revision, seed)


def run(
    identity: Identity, prepared: Prepared, seed: int, features: Features, results: Path,
    device: str = "cpu", seen: int = 0,
) -> Score:  # fmt: skip
    """`running` without a stop."""
    return drained(running(identity, prepared, seed, features, results, device, seen))


def running(
    identity: Identity,
    prepared: Prepared,
    seed: int,
    features: Features,
    results: Path,
    device: str = "cpu",
    seen: int = 0,
    window: Window | None = None,
) -> Generator[Block, None, Score]:
    """Train, select and test the heads of one cell (of every fold) and save it.

    `seen`: how many of the test utterances the upstream was fine-tuned on. `window`: where training
    frames are; whoever drives this fills it with every block that is yielded.
    """
    begun = time.monotonic()
    recipe, task = prepared.recipe, prepared.recipe.kind_of_task()
    place = cell(identity, prepared, seed)
    folder = place.folder(results)
    records: list[Record] = []
    lr: dict[str, float] = {}
    dev: dict[str, dict[str, float]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    states = {fold: folder / f"state{fold and '-' + fold}.pt" for fold in prepared.splits}
    for fold, split in prepared.splits.items():
        labels = prepared.labels(fold, identity.frame)
        training = window.view(prepared.clips) if window else None
        data = Data(features, prepared.items, labels, prepared.windows, prepared.clips, training)
        head = None
        if task.head:
            what = f"{identity.name} {recipe.name}{fold and ' ' + fold} seed {seed}"
            fitted = yield from fitting(
                recipe, data, split, seed=seed, device=device, state=states[fold], what=what
            )
            head, lr[fold], dev[fold] = fitted.head, fitted.lr, fitted.dev
            heads.keep(folder, fold, head, data.labels)
        part = functools.partial(_part, head, data, split, device)
        calibration = task.calibrate(part, data.labels)
        chosen |= {fold: calibration.chosen} if calibration.chosen else {}
        items, outputs = part("test")
        tested = task.records(items, calibration.use(items, outputs), data.labels)
        records += [record._replace(fold=fold) for record in tested]
    score = task.score(records)[task.metrics[0]]
    warnings = [*_edges(recipe.train.lr if recipe.train else [], lr), *prepared.warnings]
    if features.error:
        compared = replace(prepared, recipe=replace(recipe, frames="float16"))
        other = cell(identity, compared, seed).folder(results) / "score.json"
        warnings.insert(0, _eight_bit(features.error, score, other))
    result = Score(
        metric=task.metrics[0],
        better=task.metric.better,
        score=score,
        lr=lr,
        dev=dev,
        n=len({record.id for record in records}),
        speakers=len({name for record in records for name in record.speaker.split(AND)}),
        steps=recipe.train.steps if recipe.train else 0,
        seconds=time.monotonic() - begun,
        device=device,
        recipe=recipe.as_dict(),
        source=identity.source,
        features="float32 means" if prepared.kind == "mean" else f"{prepared.kind} frames",
        clusters=prepared.clusters,
        seen=seen,
        chosen=chosen,
        metrics={name: METRICS.named(name).better for name in task.metrics[1:]},
        warnings=warnings,
        **provenance(),
    )
    save(results, place, result, records)
    for state in states.values():
        disk.remove_file(state)
    return result


def _part(
    head: Head | None, data: Data, split: Mapping[str, list[int]], device: str, name: str
) -> Part:
    """A split with its predictions, or without a head its features, read one by one."""
    indices = split[name]
    outputs = predict(head, data, indices) if head else Bare(data.features, indices, device)
    return Part([data.items[i] for i in indices], outputs)


def _eight_bit(error: float, score: float, other: Path) -> str:
    """What 8-bit frames cost: in the features, and in the score if there is one to compare with."""
    line = f"int8 frames: relative RMS error {error:.4f}"
    if not other.is_file():
        return f"{line}; no score with float16 frames to compare with"
    whole = read_cell(other).score.score
    return f"{line}; score {score - whole:+.2f} against float16 frames ({whole:.2f})"


def _edges(tried: Sequence[float], best: Mapping[str, float]) -> list[str]:
    """A best learning rate at the edge of the list may lie beyond it."""
    edges = {min(tried): "smallest", max(tried): "largest"} if len(tried) > 1 else {}
    return [
        f"{fold and fold + ': '}the best learning rate, {rate:g}, is the {edges[rate]} one tried"
        for fold, rate in best.items()
        if rate in edges
    ]


def missing(identity: Identity, prepared: Prepared, seeds: int, results: Path) -> list[int]:
    """Seeds whose cell is not done."""
    cells = (cell(identity, prepared, seed) for seed in range(seeds))
    return [wanted.seed for wanted in cells if not done(wanted, prepared, results)]


def done(wanted: Cell, prepared: Prepared, results: Path) -> bool:
    """Whether the cell is finished and names the speakers that the corpus names today."""
    if not finished(results, wanted):
        return False
    clusters = read_cell(wanted.folder(results) / "score.json").score.clusters
    return clusters in ("", prepared.clusters)  # "": from before they were recorded
