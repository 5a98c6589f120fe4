"""The folder of an upstream from stage 1: trained once, and what is written beside its weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from downstream.report.results import provenance
from merging.card import FIGURE, write_card
from merging.cost import cost
from merging.tuning.figure import draw
from merging.tuning.loop import Loop, states
from merging.tuning.mixture import objective_of
from merging.tuning.objectives import Objective
from merging.tuning.ranks import ALONE, Ranks
from merging.tuning.recipe import Plan, checkpoint, open_plan
from merging.weights.movement import movement
from upstream.checkpoints import HEARD
from upstream.checkpoints.write import WEIGHTS, to_folder
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.notice import notice
from upstream.common.text import portable
from upstream.encoder.encoder import Encoder
from upstream.features.store import Store

RECORD = "finetune.json"


def build_tuned(
    path: Path,
    results: Path,
    output: Path | None = None,
    ranks: Ranks = ALONE,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """The folder with the recipe's fine-tuned upstream; trained now if it is not there. UserError.

    `changes`: keys of the recipe with other values. Interrupted training goes on where it was;
    another process that trains it is waited for. All of `ranks` call this together, and see the
    same files.
    """
    disk.guard(results)
    with ranks.in_turn():
        plan = open_plan(path, results, changes)
    if ranks.tell(plan.key) != plan.key:
        raise UserError(f"{path}: is not the same on all hosts, or its corpus or upstream is not")
    folder = output or plan.folder(results)
    if ranks.tell(not (folder / WEIGHTS).exists()):
        with disk.lease(folder, wait=True) if ranks.first else contextlib.nullcontext():
            if ranks.tell(not (folder / WEIGHTS).exists()):
                train(plan, folder, Store(results / "cache"), ranks)
    try:
        record = disk.read_record(folder / RECORD)
    except disk.Unreadable:
        raise
    except UserError:
        record = {}
    if record.get("key") != plan.key:
        raise UserError(f"{folder}: holds another upstream; choose an empty folder")
    if not (folder / HEARD).exists():  # it was built before this was written down
        _write_heard(folder, plan)
    return folder


def _write_heard(folder: Path, trained: Plan | Objective) -> None:
    disk.write(folder / HEARD, "".join(f"{key}\n" for key in sorted(trained.heard)))


def train(plan: Plan, folder: Path, store: Store, ranks: Ranks = ALONE) -> None:
    """Fine-tune on what the recipe aims at, and write the folder."""
    encoder, recipe = plan.encoder, plan.recipe
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    _, portion = ranks.shares(recipe.accumulate)
    if recipe.batch is not None and portion.parts > recipe.batch:
        many = f"{ranks.world} processes cannot share {recipe.accumulate} x {recipe.batch}"
        raise UserError(f"{many} utterances an update; start fewer")
    plan = plan._replace(share=portion)
    with ranks.in_turn():
        objective = objective_of(plan, store)
    loop = Loop(plan, objective, folder / "state.pt", ranks)
    loop.run(f"fine-tuning {recipe.upstream} on {', '.join(aim.name for aim in recipe.aims)}")
    if not ranks.first:
        ranks.tell(None)
        return
    moved, frozen = movement(loop.base, loop.weights), loop.frozen()
    for module, share in moved.items():
        still = "" if share else "  (frozen)" if module in frozen else "  (never moved)"
        print(f"  {module:<12} moved {100 * share:7.3f} %{still}")
    for line in _warnings(loop, moved):
        print(f"  {line}")
    weights = checkpoint(encoder, loop.weights)
    record = {
        "key": plan.key,
        "recipe": recipe.facts(),
        "task": plan.prepared.recipe.as_dict(),
        "base": encoder.source,
        "base_fingerprint": plan.fingerprint,
        "fingerprint": Encoder(weights).fingerprint(),
        "family": encoder.family,
        "metric": objective.metric.name,
        "best_dev": loop.best,
        "history": loop.history,
        "moved": moved,
        "frozen": frozen,
        "skipped": loop.skipped,
        "warnings": _warnings(loop, moved),
        "collected": {each.name: movement(loop.base, each.weights) for each in loop.collected},
        "learned_parameters": loop.size(),
        "processes": ranks.world,
        **cost(loop.seconds, loop.peak, loop.weights),
        **provenance(),
    }
    record = portable(record, store.root.parent)
    disk.write(folder / RECORD, json.dumps(record, indent=1) + "\n")
    _write_heard(folder, objective)
    disk.remove_file(folder / FIGURE)
    write_card(folder, record)
    for each in loop.collected:
        _write_heard(folder / each.name, objective)
        to_folder(checkpoint(encoder, each.weights), folder / each.name)
    to_folder(weights, folder)  # the weights last: they say that the folder is complete
    for place in states(loop.place):
        disk.remove_file(place)
    _draw(folder, loop, record)
    ranks.tell(None)


def _warnings(loop: Loop, moved: Mapping[str, float]) -> list[str]:
    """What somebody who uses the weights should know of the run."""
    lines = []
    if loop.skipped:
        lines.append(
            f"{loop.skipped} of {loop.recipe.steps} updates were skipped: their gradient was not "
            "finite"
        )
    if not any(moved.values()):
        step = next((row["step"] for row in loop.history if row["dev"] == loop.best), 0)
        lines.append(
            f"these are the base's weights: dev was best after update {step}, when the encoder had "
            "not moved yet; a smaller head_only, other rates or more steps may help"
        )
    return lines


def _draw(folder: Path, loop: Loop, record: Mapping[str, Any]) -> None:
    """The picture of the log and the card that shows it, once all else is written."""
    try:
        if reason := draw(folder / FIGURE, loop.log.lines(), loop.history):
            print(f"  no figure of log.jsonl; {reason}")
            return
        write_card(folder, record)
    except UserError as error:
        notice(f"{folder / FIGURE}: {error}")
