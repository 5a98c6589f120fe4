"""The names in a recipe, checked before anything is read or made: torch is not needed for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import merging  # noqa: F401 - registers what is built here
from merging.built import is_built
from merging.methods import METHODS
from merging.strategies import STRATEGIES
from upstream.common import user_code
from upstream.common.errors import UserError, near_miss
from upstream.common.schema import read_yaml
from upstream.resolve import RECIPES, beside, parse, require


def require_finetune(path: Path, changes: Mapping[str, Any]) -> None:
    """Raises UserError for an upstream, strategy or task file that a fine-tuning recipe names
    and that there is not. Types and values are told when the recipe is built.
    """
    data = read_yaml(path, changes)
    strategy = data.get("strategy", "stable")
    if isinstance(strategy, str) and not user_code.NAME.fullmatch(strategy):
        _known(strategy, STRATEGIES, "strategy", path)
    if isinstance(data.get("upstream"), str):
        require_names([data["upstream"]], path.parent, f"{path}: upstream")
    also = data.get("also")
    for aim in [data, *(also if isinstance(also, list) else [])]:
        task = aim.get("task") if isinstance(aim, Mapping) else None
        if isinstance(task, str) and task:
            _require_file(path.parent / task, f"{path}: task")


def require_merge(path: Path, changes: Mapping[str, Any], method: str | None) -> None:
    """The same for a merge recipe: its method, base, tuned upstreams and what they are made by."""
    data = read_yaml(path)
    named = method or changes.get("method", data.get("method", "linear"))
    if isinstance(named, str):
        require_method(named, str(path))
    base, tuned = (changes.get(key, data.get(key)) for key in ("base", "tuned"))
    if isinstance(base, str):
        require_names([base], path.parent, f"{path}: base")
    for name in tuned if isinstance(tuned, list) else []:
        if isinstance(name, str):
            _require_tuned(name, path)


def require_method(name: str, where: str) -> None:
    """Raises UserError for a merging method that there is not."""
    if not user_code.NAME.fullmatch(name):
        _known(name, METHODS, "method", where)


def require_names(specs: Iterable[str], folder: Path | None, where: str) -> None:
    """Raises UserError for the name of an upstream that there is not."""
    for spec in specs:
        placed = beside(spec, folder) if folder else spec
        name, _ = parse(placed)
        try:
            if name.endswith(RECIPES) or not is_built(placed):
                require(placed)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def _require_tuned(name: str, path: Path) -> None:
    """Of a merge recipe: the name of an upstream, or FILE.yaml[/COLLECTED][:KEY=VALUE]."""
    head, _ = parse(name)
    for suffix in RECIPES:
        file, found, _ = head.partition(suffix)
        if found:
            place = path.parent / f"{file}{suffix}"
            _require_file(place, f"{path}: tuned")
            require_finetune(place, {})
            return
    require_names([name], path.parent, f"{path}: tuned")


def _require_file(path: Path, where: str) -> None:
    if not path.is_file():
        folder = path.parent
        names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
        yaml = [name for name in names if name.endswith(RECIPES)]
        raise UserError(f"{where}: {path}: no such file{near_miss(path.name, yaml)}")


def _known(name: str, registry: Iterable[str], kind: str, where: Path | str) -> None:
    names = list(registry)
    if name not in names:
        raise UserError(f"{where}: unknown {kind} {name!r}{near_miss(name, names)}")
