"""Trained heads on disk, beside the score that they got, and what they say of other audio."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from downstream.base import Labels, Task
from downstream.recipe import Recipe
from downstream.report.results import Result, safe_name
from downstream.tasks.heads import Head
from upstream import audio
from upstream.base import Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.schema import build
from upstream.features.codec import Kind, decode, encode, require
from upstream.features.forward import forward


class Kept(NamedTuple):
    """A head that can be used."""

    head: Head
    labels: Labels
    task: Task
    kind: Kind  # of features that it takes
    chosen: dict[str, Any]  # settled on dev


def file(folder: Path, fold: str) -> Path:
    """Where the head of a fold ("": of the only one) is kept."""
    return folder / f"head{fold and '-' + safe_name(fold)}.safetensors"


def keep(folder: Path, fold: str, head: Head, labels: Labels) -> None:
    """Write a head with its layer weights and its classes. Raises UserError."""
    facts = {"symbols": labels.symbols, "sizes": labels.sizes, "frame": labels.frame}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
    path = file(folder, fold)
    with disk.writing(path), disk.whole(path) as part:
        save_file(tensors, part, {"labels": json.dumps(facts)})


def load(result: Result, upstream: Upstream) -> list[Kept]:
    """The heads of a finished cell, of each fold. Raises UserError if it has none."""
    stored = dict(result.score.recipe)
    given = {name: stored.pop(name, "") for name in ("name", "suite")}
    where = str(result.folder / "score.json")
    recipe = build(Recipe, stored, where, **given, path=where)
    task, folds = recipe.kind_of_task(), result.score.lr
    if not folds:
        raise UserError(f"task {recipe.name!r} trains no head: there is nothing to predict with")
    return [
        _load(file(result.folder, fold), recipe, task, upstream, result, fold) for fold in folds
    ]


def _load(
    path: Path, recipe: Recipe, task: Task, upstream: Upstream, result: Result, fold: str
) -> Kept:
    if not path.is_file():
        raise UserError(
            f"{path}: no such head; cells from before heads were kept have none: delete "
            f"{result.folder} and run the benchmark again"
        )
    try:
        with safe_open(path, "pt") as kept:
            facts = json.loads(kept.metadata()["labels"])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - no dictionary
        symbols, sizes = tuple(facts["symbols"]), tuple(facts["sizes"])
        plain = task.labels(recipe.tokens, [])
        labels = replace(plain, symbols=symbols, sizes=sizes, frame=facts["frame"])
        head = recipe.new_head(upstream.num_layers, upstream.dim, labels)
        head.load_state_dict(tensors)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason:.100}); delete its folder") from error
    return Kept(head.eval(), labels, task, recipe.features, result.score.chosen.get(fold, {}))


def predict(kept: Sequence[Kept], upstream: Upstream, path: str) -> list[str]:
    """What each head makes of an audio file, as text. Raises UserError."""
    hidden = forward(upstream, [audio.load(path)])
    texts = []
    for head, labels, task, kind, chosen in kept:
        if kind == "mean":
            x = hidden.mean()
        else:  # a frame is rounded as in training
            coded = encode(kind, hidden.layers, hidden.lens)
            require(coded.fits, [path])
            x = decode(coded.arrays)
        with torch.inference_mode():
            output = head.predict(head(x, hidden.lens), hidden.lens)[0]
        texts.append(task.say(output, labels, chosen))
    return texts


def agreed(texts: Sequence[str]) -> str:
    """What most heads say (the first of equals), with how many, where there are several."""
    text, count = Counter(texts).most_common(1)[0]
    return text if len(texts) == 1 else f"{text} ({count} of {len(texts)} heads)"
