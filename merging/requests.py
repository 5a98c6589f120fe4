"""Upstreams as the command line names them, the ones that are built on demand included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import upstream
from downstream.run.cell import Prepared
from downstream.run.schedule import Request, Settings
from merging import choose as choosing
from merging.choose import BASE, Choice, Dev
from merging.merged import (
    as_encoder,
    base_of,
    choice_place,
    choice_tasks,
    tuned_of,
)
from merging.recipe import YAML, MergeRecipe, altered, load_recipe
from merging.tuning import tuned_folder
from upstream.base import Upstream
from upstream.checkpoints.write import WEIGHTS, write
from upstream.common.errors import UserError
from upstream.resolve import parse, split_specs

BUILT = ("merged", "finetuned")
NUMBER = r"[-+]?\.?\d[\d.eE+-]*"
# Commas part upstreams, but not the numbers of a curve: merged:alpha=0,0.25,1
CURVE = re.compile(rf"\balpha=\s*{NUMBER}(?:\s*,\s*{NUMBER})+(?=[,:]|\s*$)")


def request(spec: str, suite: Path, results: Path) -> Request:
    """What to load for a name; `merged` and `finetuned` are looked up in the suite. UserError."""
    name, options = parse(spec)
    if name.endswith(YAML):
        return Request(spec, {"results": str(results)})
    if name not in BUILT:
        return Request(spec, {})
    given = {"results": str(results)} if "results" not in options else {}
    if "recipe" not in options:
        given["recipe"] = str(suite / "merged.yaml")
        if not Path(given["recipe"]).is_file():
            raise UserError(f"{spec}: the suite has no {given['recipe']}; give {name}:recipe=FILE")
    return Request(spec, given)


def load(one: Request) -> Upstream:
    """Load an upstream, here or in a worker."""
    return upstream.load(one.spec, **one.options)


def curves(specs: str) -> list[list[str]]:
    """Names between commas; one with a list of alphas is one name per alpha.

    `"a,merged:alpha=0,0.5"` -> `[["a"], ["merged:alpha=0", "merged:alpha=0.5"]]`.
    """
    joined = CURVE.sub(lambda found: re.sub(r"\s*,\s*", ";", found[0]), specs)
    listed = []
    for spec in split_specs(joined):
        found = re.search(r"\balpha=([^:,;]+(?:;[^:,;]+)+)", spec)
        values = found[1].split(";") if found else []
        points = [spec.replace(found[0], f"alpha={v}") for v in values] if found else [spec]
        listed.append(points)
    return listed


def requests(
    specs: str, suite: Path, results: Path, settings: Settings | None = None
) -> tuple[list[Request], str | None]:
    """The upstreams to score, and the one that differences are taken from.

    One `merged` alone brings its comparison along: what its recipe names under `compare`, the
    pre-trained base (the reference) and the fine-tuned upstream. So does one curve, which has no
    need of the fine-tuned one. A recipe that chooses alpha or members is scored for it now, with
    `settings`; without them it is looked up, and the name stays open if that is not done yet.
    """
    groups = curves(specs)
    listed = [request(spec, suite, results) for group in groups for spec in group]
    reference = None
    recipe = _recipe(listed[0])
    if len(groups) == 1 and recipe and parse(specs)[0] != "finetuned":
        plan = load_recipe(recipe)
        reference = plan.base
        own = recipe != suite / "merged.yaml"
        tuned = [f"finetuned:recipe={recipe}" if own else "finetuned"] if len(listed) == 1 else []
        names = [*plan.compare, plan.base, *tuned]
        listed = [*(request(name, suite, results) for name in names), *listed]
    shown = [one.spec for one in listed]
    twice = [name for name in shown if shown.count(name) > 1]
    if twice:
        raise UserError(f"--upstream names {twice[0]} twice")
    return [_chosen(one, results, settings) for one in listed], reference


def _recipe(one: Request) -> Path | None:
    """The merge recipe of an upstream that is built here."""
    name, options = parse(one.spec)
    if name.endswith(YAML):
        return Path(name)
    return Path(options.get("recipe") or one.options["recipe"]) if name in BUILT else None


def _choosing(one: Request) -> tuple[Path, MergeRecipe] | None:
    """The recipe of an upstream whose alpha or members are chosen and not known yet."""
    name, options = parse(one.spec)
    recipe = _recipe(one)
    if recipe is None or name == "finetuned" or "chosen" in {*options, *one.options}:
        return None
    try:
        alpha = float(options["alpha"]) if "alpha" in options else None
    except ValueError:
        raise UserError(f"{one.spec}: alpha={options['alpha']}: not a number") from None
    plan = altered(recipe, options.get("method"), alpha, options.get("members"))
    return (recipe, plan) if plan.choose else None


def _chosen(one: Request, results: Path, settings: Settings | None) -> Request:
    """The same with its choice made; candidates are scored now if that was not done before."""
    found = _choosing(one)
    if found is None or (settings is None and _untrained(found[0], results)):
        return one
    recipe, plan = found
    tasks = choice_tasks(plan, recipe, results)
    models = [base_of(plan), *tuned_of(plan, recipe, results)]
    place = choice_place(plan, models, tasks, results)
    if not place.is_file():
        if settings is None:
            return one
        choosing.save(place, _choice(one, plan, tasks, settings))
    print("\n".join(choosing.read(place).lines()))
    return one._replace(options={**one.options, "chosen": str(place)})


def _choice(
    one: Request, plan: MergeRecipe, tasks: Sequence[Prepared], settings: Settings
) -> Choice:
    """Score what the recipe of `one` has to choose from, and choose."""
    choose = plan.choose
    assert choose is not None
    metrics = {task.recipe.name: task.recipe.kind_of_task().metric for task in tasks}

    def score(candidates: Sequence[str]) -> Dev:
        specs = {c: f"{one.spec}:{choose.what}={c}" for c in candidates}
        base = Request(plan.base, {})
        listed = {c: base if c == BASE else one._replace(spec=s) for c, s in specs.items()}
        return choosing.score(listed, tasks, load, settings)

    if choose.what == "members":
        return choosing.greedy(score, metrics, len(plan.tuned))
    return choosing.pick(score(choose.scored), metrics, choose.candidates)


def unbuilt(one: Request, results: Path) -> str:
    """What must be done before this upstream exists; empty if nothing."""
    recipe = _recipe(one)
    if recipe is None:
        return ""
    waiting = _untrained(recipe, results)
    if found := _choosing(one):
        plan = found[1]
        choose = plan.choose
        assert choose is not None
        count = len(choose.scored if choose.what == "alpha" else plan.tuned)
        waiting.append(f"{choose.what} to choose from {count} on {', '.join(choose.tasks)}")
    return ", ".join(waiting)


def _untrained(recipe: Path, results: Path) -> list[str]:
    """The fine-tuning that a merge recipe waits for."""
    waiting = []
    for tuned in load_recipe(recipe).tuned:
        if tuned.endswith(YAML):
            folder, plan = tuned_folder(recipe.parent / tuned, results)
            if not (folder / WEIGHTS).exists():
                waiting.append(f"{tuned}: {plan.steps} steps of fine-tuning")
    return waiting


def export(one: Request, form: str, output: Path) -> Path:
    """Write an encoder as an HF folder or as a file of s3prl or fairseq. Raises UserError."""
    return write(as_encoder(load(one), one.spec), form, output)
