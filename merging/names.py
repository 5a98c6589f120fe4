"""Upstreams as the command line names them, the ones that are built on demand included."""

from __future__ import annotations

from pathlib import Path

import torch

import upstream
from downstream.jobs import Request
from merging.finetune import tuned_folder
from merging.interpolation import as_encoder, load_recipe
from upstream.base import Upstream
from upstream.errors import UserError
from upstream.export import WEIGHTS, to_s3prl
from upstream.resolve import parse, split_specs

BUILT = ("merged", "finetuned")


def request(spec: str, suite: Path, results: Path) -> Request:
    """What to load for a name; `merged` and `finetuned` are looked up in the suite. UserError."""
    name, options = parse(spec)
    if name.endswith((".yaml", ".yml")):
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


def requests(specs: str, suite: Path, results: Path) -> tuple[list[Request], str | None]:
    """The upstreams to score, and the one that differences are taken from.

    One `merged` alone brings its comparison along: what its recipe names under `compare`, the
    pre-trained base (the reference) and the fine-tuned upstream.
    """
    listed = [request(spec, suite, results) for spec in split_specs(specs)]
    reference = None
    recipe = _recipe(listed[0])
    if len(listed) == 1 and recipe and parse(specs)[0] != "finetuned":
        plan = load_recipe(recipe)
        reference = plan.base
        own = recipe != suite / "merged.yaml"
        tuned = f"finetuned:recipe={recipe}" if own else "finetuned"
        names = [*plan.compare, plan.base, tuned]
        listed = [*(request(name, suite, results) for name in names), *listed]
    shown = [one.spec for one in listed]
    twice = [name for name in shown if shown.count(name) > 1]
    if twice:
        raise UserError(f"--upstream names {twice[0]} twice")
    return listed, reference


def _recipe(one: Request) -> Path | None:
    """The merge recipe of an upstream that is built here."""
    name, options = parse(one.spec)
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return Path(options.get("recipe") or one.options["recipe"]) if name in BUILT else None


def unbuilt(one: Request, results: Path) -> str:
    """What must be trained before this upstream exists; empty if nothing."""
    recipe = _recipe(one)
    if recipe is None:
        return ""
    waiting = []
    for tuned in load_recipe(recipe).tuned:
        if tuned.endswith((".yaml", ".yml")):
            folder, plan = tuned_folder(recipe.parent / tuned, results)
            if not (folder / WEIGHTS).exists():
                waiting.append(f"{tuned}: {plan.steps} steps of fine-tuning")
    return ", ".join(waiting)


def export(one: Request, form: str, output: Path) -> Path:
    """Write an encoder as an HF folder or as s3prl's converted checkpoint. Raises UserError."""
    encoder = as_encoder(load(one), one.spec)
    if form == "hf":
        encoder.save(output)
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(to_s3prl(encoder), output)
    return output
