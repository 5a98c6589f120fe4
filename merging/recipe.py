"""The recipe of a merged upstream: what is merged, how, and on what its alpha is chosen."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from merging.calibrate import Calibration
from merging.choose import Choose, wanted
from merging.finetune import load_recipe as load_finetuning
from merging.methods import STATISTICS
from merging.rules import PosConv, Settings, Several, check_params
from upstream.errors import UserError
from upstream.schema import build, read_yaml

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class MergeRecipe:
    """How to make a merged upstream."""

    kind: Literal["merge"]
    base: str  # an upstream name
    tuned: list[str]  # fine-tuning recipes beside this file, or upstream names
    method: str = "linear"
    params: dict[str, Any] = field(default_factory=dict)  # the method's keys; alpha: see alphas.py
    compare: list[str] = field(default_factory=list)  # scored together with the merged upstream
    only: list[str] | None = None  # the parts to merge; all else is the base's
    pos_conv: PosConv = "factors"
    several: Several = "mean"
    origin: Literal["checked", "unchecked"] = "checked"  # must all have grown from the base?
    calibrate: Calibration | None = None  # the audio for methods that need statistics
    choose: Choose | None = None  # alpha by dev scores

    @property
    def settings(self) -> Settings:
        return Settings(self.only, self.pos_conv, self.several)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRecipe:
    """Read and check a merge recipe; `overrides` have dotted keys (`params.alpha`)."""
    recipe = build(MergeRecipe, read_yaml(path, overrides), str(path))
    _check(recipe, str(path))
    return recipe


def recipe_of(
    base: str, tuned: Sequence[str], method: str | None, overrides: Mapping[str, Any]
) -> MergeRecipe:
    """The recipe of a merge that is described on the command line. Raises UserError."""
    data: dict[str, Any] = {"kind": "merge", "base": base, "tuned": list(tuned)}
    if method is not None:
        data["method"] = method
    for dotted, value in placed(overrides).items():
        *parents, last = dotted.split(".")
        place = data
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    recipe = build(MergeRecipe, data, "merge")
    _check(recipe, "merge")
    return recipe


def placed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`--set` keys of a merge: `alpha` means `params.alpha`; `only` and its like stay as they are.

    An alpha that is given beside a recipe which chooses its own replaces the choice.
    """
    own = {one.name for one in dataclasses.fields(MergeRecipe)}
    keys = {
        key if key.split(".")[0] in own else f"params.{key}": value
        for key, value in overrides.items()
    }
    return {"choose": None, **keys} if "params.alpha" in keys else keys


def command(plan: MergeRecipe, recipe: Path, output: Path, form: str) -> str:
    """The line that writes the same folder again."""
    words = ["benchmark.py", "merge"]
    if recipe.is_file():
        words.append(str(recipe))
        written = load_recipe(recipe)
    else:
        words += ["--base", plan.base, "--tuned", *plan.tuned]
        written = MergeRecipe("merge", plan.base, plan.tuned)
    now, before = dataclasses.asdict(plan), dataclasses.asdict(written)
    changed = {k: v for k, v in now.pop("params").items() if before["params"].get(k) != v}
    changed |= {k: v for k, v in now.items() if before[k] != v}
    if "alpha" in changed:
        changed.pop("choose", None)  # goes without saying
    for key, value in changed.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    words += ["--format", form] if form != "hf" else []
    return shlex.join([*words, "--output", str(output)])


def _check(recipe: MergeRecipe, where: str) -> None:
    check_params(recipe.method, recipe.params, f"{where}: params")
    if not recipe.tuned:
        raise UserError(f"{where}: tuned: name at least one fine-tuning recipe or upstream")
    if recipe.method in STATISTICS and recipe.calibrate is None:
        raise UserError(f"{where}: {recipe.method} needs calibrate: {{task: FILE}}")
    if recipe.choose:
        wanted(recipe.choose, where)
        if "alpha" in recipe.params:
            raise UserError(f"{where}: give params: alpha or choose, not both")


def tuned_on(plan: MergeRecipe, recipe: Path) -> list[str]:
    """The tasks that the fine-tuned upstreams were trained on, as far as they say."""
    tasks = []
    for name in plan.tuned:
        record = Path(name.removeprefix("hf:")) / "finetune.json"
        if name.endswith(YAML):
            tasks.append(load_finetuning(recipe.parent / name).task)
        elif record.is_file():
            tasks.append(json.loads(record.read_text())["recipe"]["task"])
    return [Path(task).stem for task in tasks]
