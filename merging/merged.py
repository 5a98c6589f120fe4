"""Stage 2 of Speech-FT: a pre-trained and fine-tuned upstreams in, a merged upstream out.

A merge is settled once, into a folder of weights that is found by all that it is made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import upstream
from downstream import recipe as task_recipes
from downstream.recipe import RECIPES
from downstream.run.prepare import Prepared, prepare
from merging import choose as choosing
from merging.built import BUILT, is_built
from merging.choose import Choice
from merging.recipe import YAML, MergeRecipe, altered, made, with_alpha, with_members
from merging.tuning import build_tuned
from merging.tuning.recipe import load_base, opening
from merging.weights import alphas
from merging.weights.calibration import utterances
from merging.weights.rule import places_of
from merging.write import RECORD, Merge, Written, as_encoder, write_merge, write_same
from upstream.checkpoints.write import WEIGHTS
from upstream.common import disk, user_code
from upstream.common.errors import UserError, near_miss
from upstream.common.schema import Natural
from upstream.encoder.encoder import Encoder
from upstream.resolve import parse

DEMO = str(RECIPES / "demo" / "merged.yaml")
VERSION = 1  # of the arithmetic: another number, and every merge is made again
Chooser = Callable[[MergeRecipe, Sequence[Prepared]], Choice]  # scores what a recipe chooses from


class Undecided(UserError):
    """A recipe chooses its alpha or members, and that is not done yet."""


def tuned_names(plan: MergeRecipe, recipe: Path, results: Path) -> list[str]:
    """The recipe's fine-tuned upstreams; what is missing is fine-tuned now."""
    names = []
    for name in plan.tuned:
        if of := made(name):
            folder = build_tuned(recipe.parent / of.recipe, results, changes=of.changes)
            if of.collected and not (folder / of.collected / WEIGHTS).is_file():
                there = [path.name for path in folder.iterdir() if path.is_dir()]
                fault = f"{recipe}: tuned: {of.recipe} does not collect {of.collected!r}"
                raise UserError(fault + near_miss(of.collected, there))
            name = str(folder / of.collected)
        names.append(name if of else placed_spec(name, results, recipe))
    return names


def _folder(recipe: Path) -> Path | None:
    """Where the recipe of a merge lies; that of a command line lies nowhere."""
    return recipe.parent if recipe.is_file() else None


def placed_spec(spec: str, results: Path, recipe: Path) -> str:
    """What `upstream.load` takes for a name in a merge recipe, wherever that is done.

    What is built here becomes the folder of its weights: see `load_base`. Raises UserError.
    """
    if not is_built(spec) and parse(spec)[0] not in BUILT:
        return spec
    with opening(recipe):
        model = as_encoder(load_base(spec, results, _folder(recipe)), spec)
    return f"{model.source}:padding={model.padding}:precision={model.precision}"


def open_merge(
    plan: MergeRecipe, recipe: Path, results: Path, choose: Chooser | None = None
) -> Merge:
    """Load what a recipe merges, fine-tuning what is missing, and decide what it leaves open.

    What was not chosen before is chosen by `choose`. Raises Undecided without it, and UserError.
    """
    with opening(recipe):
        base = as_encoder(load_base(plan.base, results, _folder(recipe)), plan.base)
    names = tuned_names(plan, recipe, results)
    tuned = [as_encoder(upstream.load(name), name) for name in names]
    merge = Merge(plan, recipe, results, base, tuned)
    if plan.choose is None:
        return merge
    what, tasks = plan.choose.what, _choice_tasks(plan.choose.tasks, recipe, results)
    choosing.require_held_out(tasks, tuned, str(recipe))
    rule = dataclasses.asdict(replace(plan, base="", tuned=[], compare=[]))
    if plan.choose.depths is None:
        del rule["choose"]["depths"]  # what was chosen before there was such a key is still known
    else:
        places = places_of(base.model.state_dict())
        alphas.check([0.0] * plan.choose.depths, plan.only, places, f"{recipe}: choose: depths")
    digest = choosing.key([rule, merge.fingerprints()], tasks)
    place = results / "chosen" / f"{digest}.json"
    if not place.is_file():
        if choose is None:
            raise Undecided(
                f"{recipe}: chooses its {what}, which is not done yet: run benchmark.py --upstream "
                f"{recipe} first, or give {what}"
            )
        disk.write(place, json.dumps(dataclasses.asdict(choose(plan, tasks)), indent=1) + "\n")
    choice = choosing.read(place)
    if what == "alpha":
        alpha = alphas.from_text(choice.chosen, str(place))
        return merge._replace(plan=with_alpha(plan, alpha), choice=choice)
    kept = choosing.apart(choice.chosen, len(tuned), str(place))
    plan = with_members(plan, choice.chosen, str(place))
    return merge._replace(plan=plan, tuned=[tuned[i] for i in kept], choice=choice)


def _choice_tasks(tasks: Sequence[str], recipe: Path, results: Path) -> list[Prepared]:
    """The tasks beside the recipe whose dev scores choose. Raises UserError."""
    suite = task_recipes.suite(str(recipe.parent))
    for task in tasks:
        if task not in suite:
            raise UserError(f"{recipe}: choose: tasks: no {task!r}{near_miss(task, suite)}")
    return [prepare(task_recipes.load(suite[task]), results) for task in tasks]


def folder_of(merge: Merge) -> Path:
    """Where the weights of a merge are kept, under whatever name they were asked for."""
    method = user_code.identity(merge.plan.method)
    plan = replace(merge.plan, base="", tuned=[], compare=[], choose=None, method=method)
    clips = utterances(plan.calibrate, merge.recipe.parent, merge.results) if plan.calibrate else []
    facts = [VERSION, dataclasses.asdict(plan), [clip.key for clip in clips], merge.fingerprints()]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return merge.results / "upstreams" / f"{merge.recipe.stem}@{digest}"


def settled_spec(merge: Merge) -> str:
    """What `upstream.load` takes for a merge: its folder, made now, with the options of its base.

    A process that makes the same is waited for. Raises UserError for models that do not match and
    for a folder that cannot be written.
    """
    folder, base = folder_of(merge), merge.base
    with disk.lease(folder, wait=True):
        if not (folder / RECORD).is_file():
            write_merge(merge, folder)
    return f"{folder}:padding={base.padding}:precision={base.precision}"


def merged(
    recipe: str = DEMO,
    *,
    results: str = "results",
    method: str | None = None,
    alpha: float | str | None = None,
    members: str | None = None,
    seed: Natural | None = None,
) -> Encoder:
    """Stage 2 on the recipe's base and fine-tuned upstreams; `alpha` and `method` override it.

    `alpha`: a number, or several over depth, as in `0.1/0.5`. `members`: which of the fine-tuned
    ones, numbered from 0, as in `0+2`. `seed`: of the fine-tuning.
    """
    path = Path(recipe)
    merge = open_merge(altered(path, method, alpha, members, seed), path, Path(results))
    encoder = as_encoder(upstream.load(settled_spec(merge)), recipe)
    encoder.licence = merge.base.licence
    return encoder


def finetuned(
    recipe: str = DEMO, *, results: str = "results", member: int = 0, seed: Natural | None = None
) -> Encoder:
    """Stage 1 alone: the recipe's fine-tuned upstream number `member`, with another seed."""
    path = Path(recipe)
    name = tuned_spec(altered(path, seed=seed), path, Path(results), member)
    return as_encoder(upstream.load(name), name)


def tuned_spec(plan: MergeRecipe, recipe: Path, results: Path, member: int = 0) -> str:
    """What to load for a recipe's fine-tuned upstream, which is made now if it is not there."""
    if not 0 <= member < len(plan.tuned):
        raise UserError(f"{recipe}: member={member}: it has {len(plan.tuned)} fine-tuned upstreams")
    return tuned_names(replace(plan, tuned=[plan.tuned[member]]), recipe, results)[0]


def write(
    plan: MergeRecipe, recipe: Path, output: Path, results: Path, form: str = "hf"
) -> Written:
    """Merge, and write weights, config, merge.json and README.md to the folder `output`.

    `form`: `hf`, a `model.pt` of `s3prl` or `fairseq`, or `same`: the base's own kind of file,
    whatever the architecture. Weights and config are the same, byte by byte, from run to run.
    """
    if form != "same":
        return write_merge(open_merge(plan, recipe, results), output, form)
    if plan.choose or plan.calibrate:
        raise UserError(f"{recipe}: choose and calibrate need --format hf: they run the encoder")
    if plan.base.endswith(YAML):
        raise UserError(f"{recipe}: base: a merge recipe has no file of its own; use --format hf")
    base, _ = parse(placed_spec(plan.base, results, recipe))
    tuned = [parse(name)[0] for name in tuned_names(plan, recipe, results)]
    return write_same(replace(plan, base=base), recipe, tuned, output)
