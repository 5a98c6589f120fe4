"""The recipe of a merged upstream: what is merged, how, and on what that is chosen."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from merging.choose import Choose, apart
from merging.methods import STATISTICS
from merging.weights import alphas
from merging.weights.calibration import Calibration
from merging.weights.rule import MergeOptions, PosConv, Several, check_params
from upstream.common.errors import UserError
from upstream.common.schema import build, override, read_value, read_yaml
from upstream.resolve import beside, parse

YAML = (".yaml", ".yml")
# of a recipe that is fine-tuned here: the file, what its run collects, and keys changed in it
MADE = re.compile(r"(.+?\.ya?ml)(?:/([\w.-]+))?((?::[A-Za-z_]\w*=.*)?)")


class Made(NamedTuple):
    """A fine-tuned upstream that is made here, as `tuned` names it."""

    recipe: str  # the file, beside the merge recipe
    collected: str  # one of the further upstreams that its run collects; "" is the run's own
    changes: Mapping[str, Any]  # keys of the recipe


def made(name: str) -> Made | None:
    """`finetune.yaml/ema-0.999:seed=1`; None for the name of an upstream. Raises UserError."""
    if not (parts := MADE.fullmatch(name)):
        return None
    _, texts = parse(parts[1] + parts[3])
    changes = {key: read_value(text, f"{name}: {key}") for key, text in texts.items()}
    return Made(parts[1], parts[2] or "", changes)


@dataclass(frozen=True)
class MergeRecipe:
    """How to make a merged upstream."""

    kind: Literal["merge"]
    base: str  # an upstream name, or a merge recipe beside this file
    tuned: list[str]  # fine-tuning recipes beside this file (see `made`), or upstream names
    method: str = "linear"
    params: dict[str, Any] = field(default_factory=dict)  # the method's keys; alpha: see alphas.py
    compare: list[str] = field(default_factory=list)  # scored together with the merged upstream
    only: list[str] | None = None  # the parts to merge; all else is the base's
    pos_conv: PosConv = "factors"
    several: Several = "mean"
    origin: Literal["checked", "unchecked"] = "checked"  # must all have grown from the base?
    calibrate: Calibration | None = None  # the audio for methods that need statistics
    choose: Choose | None = None  # alpha or members by dev scores

    @property
    def options(self) -> MergeOptions:
        return MergeOptions(self.only, self.pos_conv, self.several)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRecipe:
    """Read and check a merge recipe; `overrides` have dotted keys (`params.alpha`)."""
    recipe = build(MergeRecipe, read_yaml(path, overrides), str(path))
    if overrides and "params.alpha" in overrides:
        recipe = with_alpha(recipe, overrides["params.alpha"])
    _check(recipe, str(path))
    compare = [beside(name, path.parent) for name in recipe.compare]
    return replace(recipe, base=beside(recipe.base, path.parent), compare=compare)


def with_alpha(plan: MergeRecipe, alpha: Any) -> MergeRecipe:
    """The recipe with another alpha, which replaces a choice of alpha."""
    choose = plan.choose if plan.choose and plan.choose.what == "members" else None
    return replace(plan, params={**plan.params, "alpha": alpha}, choose=choose)


def with_members(plan: MergeRecipe, members: str, where: str) -> MergeRecipe:
    """The recipe with some of its tuned models (`0+2`), not to be chosen any more. UserError."""
    tuned = [plan.tuned[number] for number in apart(members, len(plan.tuned), where)]
    choose = plan.choose if plan.choose and plan.choose.what == "alpha" else None
    return replace(plan, tuned=tuned, choose=choose)


def with_seed(plan: MergeRecipe, seed: int, where: str) -> MergeRecipe:
    """The recipe with what it fine-tunes itself fine-tuned with another seed. Raises UserError."""

    def reseeded(name: str) -> str:
        if not (parts := MADE.fullmatch(name)):
            return name
        plain = re.sub(r":seed=\d+", "", parts[3])
        return name.removesuffix(parts[3]) + f"{plain}:seed={seed}"

    tuned = [reseeded(name) for name in plan.tuned]
    if not any(map(MADE.fullmatch, tuned)):
        raise UserError(
            f"{where}: seed={seed}: is for fine-tuning, and it only merges what is there"
        )
    if len(set(tuned)) < len(tuned):
        raise UserError(f"{where}: seed={seed}: its tuned models would all be one; leave seed out")
    return replace(plan, tuned=tuned)


def altered(
    recipe: Path,
    method: str | None = None,
    alpha: float | str | None = None,
    members: str | None = None,
    seed: int | None = None,
) -> MergeRecipe:
    """The recipe with another method, alpha, members or fine-tuning seed. UserError.

    What is given is not chosen.
    """
    plan = load_recipe(recipe)
    if seed is not None:
        plan = with_seed(plan, seed, str(recipe))
    if method is not None:
        plan = replace(plan, method=method)
    if alpha is not None:
        given = alphas.from_text(alpha, f"{recipe}: alpha") if isinstance(alpha, str) else alpha
        plan = with_alpha(plan, given)
    plan = plan if members is None else with_members(plan, members, str(recipe))
    _check(plan, str(recipe))
    return plan


def recipe_of(
    base: str, tuned: Sequence[str], method: str | None, overrides: Mapping[str, Any]
) -> MergeRecipe:
    """The recipe of a merge that is described on the command line. Raises UserError."""
    method = "linear" if method is None else method
    data = {"kind": "merge", "base": base, "tuned": list(tuned), "method": method}
    recipe = build(MergeRecipe, override(data, placed(overrides), "merge"), "merge")
    _check(recipe, "merge")
    return recipe


def placed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`--set` keys of a merge: `alpha` means `params.alpha`; the recipe's keys stay as they are."""
    keys = {field.name for field in dataclasses.fields(MergeRecipe)}
    return {k if k.split(".")[0] in keys else f"params.{k}": v for k, v in overrides.items()}


def command(plan: MergeRecipe, recipe: Path, output: Path, form: str) -> str:
    """The line that writes the same folder again."""
    if recipe.is_file():
        words, written = [str(recipe)], load_recipe(recipe)
    else:
        words = ["--base", plan.base, "--tuned", *plan.tuned]
        written = MergeRecipe("merge", plan.base, plan.tuned)
    wanted, there = dataclasses.asdict(plan), dataclasses.asdict(written)
    changed = {k: v for k, v in wanted.pop("params").items() if there["params"].get(k) != v}
    changed |= {key: value for key, value in wanted.items() if there[key] != value}
    if "alpha" in changed:
        changed.pop("choose", None)  # goes without saying
    for key, value in changed.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    words += ["--format", form] if form != "hf" else []
    return shlex.join(["benchmark.py", "merge", *words, "--output", str(output)])


def _check(recipe: MergeRecipe, where: str) -> None:
    check_params(recipe.method, recipe.params, f"{where}: params")
    if not recipe.tuned:
        raise UserError(f"{where}: tuned: name at least one fine-tuning recipe or upstream")
    if recipe.method in STATISTICS and recipe.calibrate is None:
        raise UserError(f"{where}: {recipe.method} needs calibrate: {{task: FILE}}")
    if recipe.choose:
        recipe.choose.check(where)
        if recipe.choose.what == "alpha" and "alpha" in recipe.params:
            raise UserError(f"{where}: give params: alpha or choose, not both")
        if recipe.choose.what == "members" and len(recipe.tuned) < 2:
            raise UserError(f"{where}: choose: members: needs two or more tuned models")
