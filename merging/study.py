"""A study: ways of fine-tuning, each on every base, with every seed and alpha, as one upstream.

`--upstream study.yaml` stands for all of them. Each way becomes a merge recipe in the results
folder, so that its rows can be run alone, and what is finished is kept as in any other run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from merging.recipe import YAML, load_recipe, made
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.common.schema import Natural, build, read_yaml
from upstream.resolve import canonical, parse, split_specs

KIND = "study"


@dataclass(frozen=True)
class Way:
    """A merge recipe without its base; `seeds` and `alphas` of its own replace the study's."""

    tuned: list[str]  # as in a merge recipe: finetune.yaml/early-0.2, finetune.yaml:strategy=lora
    method: str = "linear"
    params: dict[str, Any] = field(default_factory=dict)
    after: str | None = None  # another way, whose merge with its first alpha is the base of this
    seeds: list[Natural] | None = None
    alphas: list[float] | None = None


@dataclass(frozen=True)
class Study:
    """What to compare: ways x bases x seeds x alphas. Alpha 1 is the fine-tuned upstream alone."""

    kind: Literal["study"]
    bases: list[str]  # upstreams
    ways: dict[str, Way]
    seeds: list[Natural]  # of the fine-tuning
    alphas: list[float]


def load(path: Path) -> Study:
    """Read and check a study. Raises UserError."""
    study = build(Study, read_yaml(path), str(path))
    study = replace(study, bases=[canonical(base) for base in study.bases])
    for key in ("bases", "ways", "seeds", "alphas"):
        if not getattr(study, key):
            raise UserError(f"{path}: {key}: name at least one")
    for base in study.bases:
        if parse(base)[1]:
            raise UserError(f"{path}: bases: {base!r}: goes without options")
    for name, way in study.ways.items():
        where = f"{path}: ways: {name}"
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{where}: is no name of a file")
        for tuned in way.tuned:
            if not (of := made(tuned)) or not (path.parent / of.recipe).is_file():
                raise UserError(f"{where}: tuned: {tuned!r} is no fine-tuning recipe beside it")
        earlier = list(study.ways)[: list(study.ways).index(name)]
        if way.after is not None and way.after not in earlier:
            fault = f"after: no way {way.after!r} before this one"
            raise UserError(f"{where}: {fault}{near_miss(way.after, earlier)}")
    return study


def expand(specs: str, results: Path) -> tuple[str, list[str]]:
    """The names on the command line with every study as what it stands for, and the studies' bases.

    Writes the merge recipes of the studies to `results / "studies"`. Raises UserError.
    """
    names, bases = list[str](), list[str]()
    for spec in split_specs(specs):
        path = Path(parse(spec)[0])
        if not _is_study(path):
            names.append(spec)
            continue
        study = load(path)
        bases += [base for base in study.bases if base not in bases]
        folder = results / "studies" / f"{path.parent.name}-{path.stem}"
        names += [base for base in study.bases if base not in names]
        names += _upstreams(study, path, folder)
    return (",".join(names), bases) if bases else (specs, [])


def _is_study(path: Path) -> bool:
    return path.name.endswith(YAML) and path.is_file() and read_yaml(path).get("kind") == KIND


def _upstreams(study: Study, path: Path, folder: Path) -> list[str]:
    """A name for each upstream but the bases; their recipes are written."""
    names = []
    for number, base in enumerate(study.bases):
        place = folder if len(study.bases) == 1 else folder / str(number)
        for name, way in study.ways.items():
            recipe = place / f"{name}.yaml"
            _write_recipe(study, way, base, path, recipe)
            for alpha in _alphas(study, way):
                for seed in study.seeds if way.seeds is None else way.seeds:
                    names.append(f"{recipe}:alpha={alpha:g}:seed={seed}")
    return names


def _alphas(study: Study, way: Way) -> Sequence[float]:
    return study.alphas if way.alphas is None else way.alphas


def _write_recipe(study: Study, way: Way, base: str, path: Path, recipe: Path) -> None:
    """The merge recipe of a way; whatever it names is found from where it is written."""
    tuned = []
    for name in way.tuned:
        of = made(name)
        assert of is not None, "load has looked"
        source = path.parent / of.recipe
        start = base
        if way.after is not None:
            start = os.path.relpath(recipe.with_name(f"{way.after}.yaml"), source.parent)
        rest = name.removeprefix(of.recipe)
        tuned.append(f"{os.path.relpath(source, recipe.parent)}{rest}:upstream={start}")
    content = {
        "kind": "merge",
        "base": base if way.after is None else f"{way.after}.yaml",
        "tuned": tuned,
        "method": way.method,
        "params": {**way.params, "alpha": _alphas(study, way)[0]},
    }
    disk.write(recipe, yaml.safe_dump(content, sort_keys=False))
    load_recipe(recipe)  # a mistake is told before anything is fine-tuned
