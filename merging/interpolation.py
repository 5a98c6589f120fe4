"""Stage 2 of Speech-FT: a pre-trained and fine-tuned upstreams in, a merged upstream out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import upstream
from downstream.recipe import RECIPES
from downstream.results import finite, provenance, write_atomic
from merging.card import write_card
from merging.finetune import build_tuned
from merging.methods import METHODS
from merging.modules import effective_alpha
from upstream.base import UPSTREAMS, Upstream
from upstream.encoders import Encoder
from upstream.errors import UserError
from upstream.schema import bind, build, read_yaml

State = dict[str, Tensor]

DEMO = str(RECIPES / "demo" / "merged.yaml")
# The pre-training head keeps the base's values, as in the released code (merge_utils.py).
PRETRAINING_HEAD = ("final_proj", "label_embs_concat", "quantizer", "project_q", "project_hid")


@dataclass(frozen=True)
class MergeRecipe:
    """How to make a merged upstream."""

    kind: Literal["merge"]
    base: str  # an upstream name
    tuned: list[str]  # fine-tuning recipes beside this file, or upstream names
    method: str = "linear"
    params: dict[str, Any] = field(default_factory=dict)
    compare: list[str] = field(default_factory=list)  # scored together with the merged upstream


def merge(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str = "linear",
    **params: Any,
) -> State:
    """Merged weights, float32, tensor by tensor.

    Weight-normed kernels are merged as their factors g and v (the paper's released code); integer
    tensors and the pre-training head are the base's. Raises UserError for models that do not match
    (showing the first differences), a wrong parameter, and a result that is not finite.
    """
    combine = METHODS[method]
    params = bind(combine, params, f"merging method {method}", given=("base", "tuned"))
    if not tuned:
        raise UserError("nothing to merge: give at least one fine-tuned upstream")
    for number, other in enumerate(tuned, 1):
        _require_match(base, other, f"tuned model {number}")
    merged: State = {}
    for name, tensor in base.items():
        if name.startswith(PRETRAINING_HEAD) or not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        merged[name] = combine(tensor.float(), [t[name].float() for t in tuned], **params)
        if not torch.isfinite(merged[name]).all():
            raise UserError(f"the merge of {name} is not finite; look for NaN in the inputs")
    return merged


def _require_match(base: Mapping[str, Tensor], other: Mapping[str, Tensor], which: str) -> None:
    faults = [f"{k} is missing" for k in base if k not in other]
    faults += [f"{k} is not in the base" for k in other if k not in base]
    faults += [
        f"{k} is {tuple(other[k].shape)}, not {tuple(base[k].shape)}"
        for k in base
        if k in other and base[k].shape != other[k].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{which} does not match the base: {'; '.join(faults[:3])}{more}")


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRecipe:
    """Read and check a merge recipe."""
    recipe = build(MergeRecipe, read_yaml(path, overrides), str(path))
    where = f"{path}: params"
    bind(METHODS[recipe.method], recipe.params, where, given=("base", "tuned"))
    if not recipe.tuned:
        raise UserError(f"{path}: tuned: name at least one fine-tuning recipe or upstream")
    return recipe


def as_encoder(found: Upstream, name: str) -> Encoder:
    """`found` if it has weights to merge. Raises UserError."""
    if not isinstance(found, Encoder):
        raise UserError(f"{name}: has no weights to merge; use a HuBERT, WavLM, ... encoder")
    return found


def combine(base: Encoder, tuned: Sequence[Encoder], method: str, **params: Any) -> Encoder:
    """`base` with merged weights, in place; all must be of one architecture."""
    for other in tuned:
        if other.identity() != base.identity():
            ours, theirs = base.identity(), other.identity()
            wrong = [f"{k} {theirs.get(k)}, not {v}" for k, v in ours.items() if theirs.get(k) != v]
            raise UserError(f"{other.source}: is not like {base.source}: {'; '.join(wrong[:3])}")
    states = [other.model.state_dict() for other in tuned]
    base.model.load_state_dict(merge(base.model.state_dict(), states, method, **params))
    return base


def base_of(plan: MergeRecipe) -> Encoder:
    """The recipe's pre-trained upstream."""
    return as_encoder(upstream.load(plan.base), plan.base)


def tuned_of(plan: MergeRecipe, recipe: Path, results: Path) -> list[Encoder]:
    """The recipe's fine-tuned upstreams; what is missing is fine-tuned now."""
    names = [
        str(build_tuned(recipe.parent / n, results)) if n.endswith((".yaml", ".yml")) else n
        for n in plan.tuned
    ]
    return [as_encoder(upstream.load(name), name) for name in names]


@UPSTREAMS.register("merged", about="a merge recipe's upstream, built when it is first asked for")
def merged(
    recipe: str = DEMO,
    *,
    results: str = "results",
    method: str | None = None,
    alpha: float | None = None,
) -> Encoder:
    """Stage 2 on the recipe's base and fine-tuned upstreams; `alpha` and `method` override it."""
    path = Path(recipe)
    plan = load_recipe(path)
    if method is not None:
        plan = replace(plan, method=method)
    if alpha is not None:
        plan = replace(plan, params={**plan.params, "alpha": alpha})
    tuned = tuned_of(plan, path, Path(results))
    encoder = combine(base_of(plan), tuned, plan.method, **plan.params)
    settings = ", ".join(f"{k} {v}" for k, v in plan.params.items())
    encoder.source = f"{path}: {plan.method} {settings}"
    return encoder


@UPSTREAMS.register("finetuned", about="the fine-tuned upstream of a merge recipe (alpha = 1)")
def finetuned(recipe: str = DEMO, *, results: str = "results", member: int = 0) -> Encoder:
    """Stage 1 alone: the recipe's fine-tuned upstream number `member`."""
    plan = load_recipe(Path(recipe))
    if not 0 <= member < len(plan.tuned):
        raise UserError(f"{recipe}: member={member}: it has {len(plan.tuned)} fine-tuned upstreams")
    return tuned_of(plan, Path(recipe), Path(results))[member]


def write(plan: MergeRecipe, recipe: Path, output: Path, results: Path) -> dict[str, float]:
    """Merge and write weights, record and card to `output`; the effective alpha per module."""
    tuned = tuned_of(plan, recipe, results)
    before = base_of(plan)
    source, start = before.source, {k: v.clone() for k, v in before.model.state_dict().items()}
    prints = {"base": before.fingerprint(), "tuned": [t.fingerprint() for t in tuned]}
    encoder = combine(before, tuned, plan.method, **plan.params)
    states = [t.model.state_dict() for t in tuned]
    effective = effective_alpha(start, states, encoder.model.state_dict())
    record = {
        "base": source,
        "tuned": [t.source for t in tuned],
        "method": plan.method,
        "params": plan.params,
        "fingerprints": {**prints, "merged": encoder.fingerprint()},
        "effective_alpha": effective,
        **provenance(),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "merge.json", json.dumps(finite(record), indent=1) + "\n")
    write_card(output, record)
    encoder.save(output)
    return effective
