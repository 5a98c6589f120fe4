"""Trained heads on disk, beside the score that they got, and what they say of other audio."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from downstream.base import Labels, Task
from downstream.recipe import Recipe
from downstream.report.results import SPOILT, Result, safe_name
from downstream.report.unlike import flat
from downstream.tasks.heads import Head
from upstream import audio
from upstream.base import Upstream
from upstream.checkpoints.tensor_files import save_tensors
from upstream.common import disk, user_code
from upstream.common.errors import UserError
from upstream.common.schema import build
from upstream.common.text import portable
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
    save_tensors(tensors, file(folder, fold), {"labels": json.dumps(facts)})


def load(
    result: Result, upstream: Upstream, trusted: Callable[[], Recipe] | None = None
) -> list[Kept]:
    """The heads of a finished cell, of each fold. Raises UserError if it has none.

    trusted: reads the user's own recipe of the task. A record may name only what is registered:
    the Python of a task, head or metric runs if this recipe names it as well.
    """
    recipe = _recipe(result, trusted)
    task, folds = recipe.kind_of_task(), result.score.lr
    if not folds:
        raise UserError(f"task {recipe.name!r} trains no head: there is nothing to predict with")
    return [
        _load(file(result.folder, fold), recipe, task, upstream, result, fold) for fold in folds
    ]


def _recipe(result: Result, trusted: Callable[[], Recipe] | None) -> Recipe:
    stored = dict(result.score.recipe)
    where = str(result.folder / "score.json")
    theirs = _flat(stored)
    if code := next((text for text in theirs.values() if user_code.named_in(text)), None):
        if trusted is None:
            raise UserError(f"{where}: names {code!r:.100}; what a record names is not run")
        own = trusted()
        ours = _flat(own.as_dict())
        keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
        if keys:
            key = keys[0]
            raise UserError(
                f"{where}: names {code!r:.100}, which runs only if {own.path} is the same recipe; "
                f"{key} is {theirs.get(key)!r:.60} there, {ours.get(key)!r:.60} here"
                f"; --set {key}=VALUE changes it"
            )
        return own
    given = {name: stored.pop(name, "") for name in ("name", "suite")}
    return build(Recipe, stored, where, **given, path=where)


LOOSE = ("name", "suite", "corpus.root", "train.seeds")  # keys that change no head


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The leaves that matter, on whatever machine it was written."""
    leaves = flat(portable(recipe)).items()
    return {k: _bare(v) for k, v in leaves if k not in LOOSE and not k.startswith("expect")}


def _bare(value: Any) -> Any:
    """What names a user's file, without the file's folders."""
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return Path(value).name if user_code.named_in(value) else value


def _load(
    path: Path, recipe: Recipe, task: Task, upstream: Upstream, result: Result, fold: str
) -> Kept:
    if not path.is_file():
        raise UserError(
            f"{path}: no such head; cells from before heads were kept have none: delete "
            f"{result.folder} and run the benchmark again"
        )
    try:
        disk.require_file(path)
        with safe_open(path, "pt") as kept:
            facts = json.loads(kept.metadata()["labels"])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - no dictionary
        symbols, sizes = tuple(facts["symbols"]), tuple(facts["sizes"])
        if not all(isinstance(symbol, str) for symbol in symbols):
            raise TypeError("a class is no text")
        if not all(type(size) is int and size > 0 for size in sizes):
            raise TypeError("sizes of answers are no numbers")
        plain = task.labels(recipe.tokens, [])
        labels = replace(plain, symbols=symbols, sizes=sizes, frame=float(facts["frame"]))
        if not user_code.named_in(recipe.as_dict()):
            with torch.device("meta"):  # whatever sizes the record asks for, no memory is taken
                shapes = recipe.new_head(upstream.num_layers, upstream.dim, labels).state_dict()
            if {n: t.shape for n, t in shapes.items()} != {n: t.shape for n, t in tensors.items()}:
                raise ValueError("its tensors are not those of the recipe's head")
        head = recipe.new_head(upstream.num_layers, upstream.dim, labels)
        head.load_state_dict(tensors)
    except disk.Unreadable:
        raise
    except (SafetensorError, *SPOILT, RuntimeError) as error:
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
