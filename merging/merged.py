"""Stage 2 of Speech-FT: a pre-trained and fine-tuned upstreams in, a merged upstream out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

import upstream
from downstream import recipe as task_recipes
from downstream.recipe import RECIPES
from downstream.report.results import finite, provenance, write_atomic
from downstream.run.cell import Prepared, prepare
from merging import choose as choosing
from merging.card import write_card
from merging.choose import Choice
from merging.methods import STATISTICS
from merging.recipe import (
    YAML,
    MergeRecipe,
    altered,
    command,
    load_recipe,
    tuned_on,
    with_alpha,
    with_members,
)
from merging.tuning import build_tuned
from merging.weights.calibration import calibrated
from merging.weights.compatibility import recorded_base, require_origin
from merging.weights.engine import Report, ahead, merge, merge_tensors
from merging.weights.rule import Weights
from upstream.base import UPSTREAMS, Upstream, fingerprint
from upstream.checkpoints import containers as container
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints import write as export
from upstream.checkpoints.read import Checkpoint
from upstream.checkpoints.tensor_names import without_pretraining
from upstream.common.errors import UserError, near_miss
from upstream.encoder.encoder import Encoder

__all__ = ["MergeRecipe", "load_recipe", "merge", "merged", "write"]

DEMO = str(RECIPES / "demo" / "merged.yaml")
Form = Literal["hf", "s3prl", "fairseq", "same"]


def as_encoder(found: Upstream, name: str) -> Encoder:
    """`found` if it has weights to merge. Raises UserError."""
    if not isinstance(found, Encoder):
        raise UserError(f"{name}: has no weights to merge; use a HuBERT, WavLM, ... encoder")
    return found


def base_of(plan: MergeRecipe) -> Encoder:
    """The recipe's pre-trained upstream."""
    return as_encoder(upstream.load(plan.base), plan.base)


def tuned_names(plan: MergeRecipe, recipe: Path, results: Path) -> list[str]:
    """The recipe's fine-tuned upstreams; what is missing is fine-tuned now."""
    return [
        str(build_tuned(recipe.parent / n, results)) if n.endswith(YAML) else n for n in plan.tuned
    ]


def tuned_of(plan: MergeRecipe, recipe: Path, results: Path) -> list[Encoder]:
    """The same, loaded."""
    names = tuned_names(plan, recipe, results)
    return [as_encoder(upstream.load(name), name) for name in names]


def combine(
    base: Encoder,
    tuned: Sequence[Encoder],
    plan: MergeRecipe,
    recipe: Path,
    results: Path,
    report: Report | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The merged weights of encoders, one by one. Raises UserError for models that do not match."""
    require_related(base, tuned, plan)
    stats: Sequence[Weights] | None = None
    if (kind := STATISTICS.get(plan.method)) and plan.calibrate:
        stats = calibrated(kind, [base, *tuned], plan.calibrate, recipe.parent, results)
    weights, *others = (one.model.state_dict() for one in (base, *tuned))
    settings = (plan.method, plan.params, plan.options, stats, report)
    return merge_tensors(weights, others, *settings)


def require_related(base: Encoder, tuned: Sequence[Encoder], plan: MergeRecipe) -> None:
    """UserError unless all are of one architecture and, if it is to be checked, of one origin."""
    for number, other in enumerate(tuned, 1):
        if other.identity() != base.identity():
            ours, theirs = base.identity(), other.identity()
            wrong = [f"{k} {theirs.get(k)}, not {v}" for k, v in ours.items() if theirs.get(k) != v]
            raise UserError(f"{other.source}: is not like {base.source}: {'; '.join(wrong[:3])}")
        if plan.origin == "checked":
            # a later model of a sequence may have been fine-tuned from the merge before it
            first = plan.several != "sequential" or number == 1
            recorded = recorded_base(Path(other.source)) if first else None
            own = base.fingerprint() if recorded else None
            weights = (base.model.state_dict(), other.model.state_dict())
            require_origin(*weights, f"tuned model {number} ({other.source})", recorded, own)


def choice_tasks(plan: MergeRecipe, recipe: Path, results: Path) -> list[Prepared]:
    """The held-out tasks beside the recipe whose dev scores choose. Raises UserError."""
    assert plan.choose is not None
    choosing.require_held_out(plan.choose, tuned_on(plan, recipe), str(recipe))
    suite = task_recipes.suite(str(recipe.parent))
    for task in plan.choose.tasks:
        if task not in suite:
            raise UserError(f"{recipe}: choose: tasks: no {task!r}{near_miss(task, suite)}")
    return [prepare(task_recipes.load(suite[task]), results) for task in plan.choose.tasks]


def choice_place(
    plan: MergeRecipe, models: Sequence[Encoder], tasks: Sequence[Prepared], results: Path
) -> Path:
    """Where what a recipe chooses for [base, *tuned] is kept."""
    rule = dataclasses.asdict(replace(plan, base="", tuned=[], compare=[]))
    prints = [one.fingerprint() for one in models]
    return choosing.place(results, choosing.key([rule, prints], tasks))


def settled(
    plan: MergeRecipe, recipe: Path, models: Sequence[Encoder], results: Path, chosen: str = ""
) -> tuple[MergeRecipe, list[Encoder], Choice | None]:
    """The recipe with the alpha or members that it chooses, these members, and the choice.

    `models`: [base, *tuned]. Raises UserError if there is no choice yet.
    """
    if plan.choose is None:
        return plan, list(models[1:]), None
    what = plan.choose.what
    tasks = [] if chosen else choice_tasks(plan, recipe, results)
    place = Path(chosen) if chosen else choice_place(plan, models, tasks, results)
    if not chosen and not place.is_file():
        raise UserError(
            f"{recipe}: chooses its {what}, which is not done yet: run benchmark.py --upstream "
            f"{recipe} first, or give {what}"
        )
    choice = choosing.read(place)
    if what == "alpha":
        return with_alpha(plan, float(choice.chosen)), list(models[1:]), choice
    kept = choosing.apart(choice.chosen, len(plan.tuned), str(place))
    plan = with_members(plan, choice.chosen, str(place))
    return plan, [models[1 + number] for number in kept], choice


@UPSTREAMS.register("merged", about="a merge recipe's upstream, built when it is first asked for")
def merged(
    recipe: str = DEMO,
    *,
    results: str = "results",
    method: str | None = None,
    alpha: float | None = None,
    members: str | None = None,
    chosen: str = "",
) -> Encoder:
    """Stage 2 on the recipe's base and fine-tuned upstreams; `alpha` and `method` override it.

    `members`: which of the fine-tuned ones, numbered from 0, as in `0+2`. `chosen`: the file with
    the alpha or members of a recipe that chooses them; looked up if not given.
    """
    path = Path(recipe)
    plan = altered(path, method, alpha, members)
    base, *tuned = base_of(plan), *tuned_of(plan, path, Path(results))
    plan, tuned, choice = settled(plan, path, [base, *tuned], Path(results), chosen)
    weights = dict(combine(base, tuned, plan, path, Path(results)))
    base.model.load_state_dict(weights, assign=True)
    if choice and choice.what == "members":
        members = choice.chosen
    facts = {**plan.params, **({"members": members} if members else {})}
    shown = ", ".join(f"{key} {value}" for key, value in facts.items())
    why = f" (chosen on {', '.join(choice.dev)})" if choice else ""
    base.source = f"{path}: {plan.method} {shown}{why}"
    return base


@UPSTREAMS.register("finetuned", about="the fine-tuned upstream of a merge recipe (alpha = 1)")
def finetuned(recipe: str = DEMO, *, results: str = "results", member: int = 0) -> Encoder:
    """Stage 1 alone: the recipe's fine-tuned upstream number `member`."""
    plan = load_recipe(Path(recipe))
    if not 0 <= member < len(plan.tuned):
        raise UserError(f"{recipe}: member={member}: it has {len(plan.tuned)} fine-tuned upstreams")
    return tuned_of(plan, Path(recipe), Path(results))[member]


class Written(NamedTuple):
    """What a merge wrote down about itself."""

    effective_alpha: dict[str, float]
    record: dict[str, Any]

    def lines(self) -> list[str]:
        """To print: the effective alpha per module and what else was measured."""
        rows = [
            f"  {m:<12} " + ("fine-tuning left it alone" if a != a else f"effective alpha {a:.4f}")
            for m, a in self.effective_alpha.items()  # a != a: NaN, there was nowhere to go
        ]
        if (moved := self.record["pos_conv_difference"]) is not None:
            rows.append(f"  kernel of pos_conv: factors or kernel, {100 * moved:.3g} % apart")
        if (count := self.record["slerp_fallbacks"]) is not None:
            rows.append(f"  slerp was linear in {count} of {self.record['tensors']} tensors")
        return rows


def write(
    plan: MergeRecipe, recipe: Path, output: Path, results: Path, form: Form = "hf"
) -> Written:
    """Merge, and write weights, config, merge.json and README.md to the folder `output`.

    `form`: `hf`, a `model.pt` of `s3prl` or `fairseq`, or `same`: the base's own kind of file,
    whatever the architecture. Weights and config are the same, byte by byte, from run to run.
    """
    output.mkdir(parents=True, exist_ok=True)
    report = Report()
    if form == "same":
        record = _write_same(plan, recipe, output, results, report)
    else:
        record = _write_encoder(plan, recipe, output, results, form, report)
    record = {
        "recipe": dataclasses.asdict(plan),
        "command": command(plan, recipe, output, form),
        "method": plan.method,
        "params": plan.params,
        **record,
        **report.record(),
        **provenance(),
    }
    write_atomic(output / "merge.json", json.dumps(finite(record), indent=1) + "\n")
    write_card(output, record)
    return Written(report.effective.result(), record)


def _write_encoder(
    plan: MergeRecipe, recipe: Path, output: Path, results: Path, form: Form, report: Report
) -> dict[str, Any]:
    base = base_of(plan)
    file = "" if form == "hf" else "model.pt"
    config = base.config.to_dict()
    found = Checkpoint(base.family, config, base.model.state_dict(), base.normalize, base.source)
    with ThreadPoolExecutor(1) as pool:  # digests do not wait for merging, nor merging for them
        prints = [pool.submit(base.fingerprint)]
        tuned = tuned_of(plan, recipe, results)
        plan, tuned, choice = settled(plan, recipe, [base, *tuned], results)
        prints += [pool.submit(one.fingerprint) for one in tuned]
        stream = ahead(combine(base, tuned, plan, recipe, results, report))
        if form == "hf":
            export.to_folder(found, output, stream)
            state: Weights = files.load(output / export.WEIGHTS)[0]
        else:
            state = dict(stream)
            export.write(found._replace(state=state), form, output / file)
        last = fingerprint(base.identity(), {f"model.{name}": t for name, t in state.items()})
        first, *others = (one.result() for one in prints)
    return {
        "base": base.source,
        "tuned": [one.source for one in tuned],
        "family": base.family,
        "file": file,
        "licence": base.licence,
        "params": plan.params,
        "base_fingerprint": first,
        "fingerprints": {"base": first, "tuned": others, "merged": last},
        "choose": dataclasses.asdict(choice) if choice else None,
    }


def _write_same(
    plan: MergeRecipe, recipe: Path, output: Path, results: Path, report: Report
) -> dict[str, Any]:
    """Merge files as they are: any architecture, if its tensors have the same names."""
    if plan.choose or plan.calibrate:
        raise UserError(f"{recipe}: choose and calibrate need --format hf: they run the encoder")
    names = [plan.base, *tuned_names(plan, recipe, results)]
    states = [without_pretraining(container.open_container(name).state) for name in names]
    base, *tuned = states
    if plan.origin == "checked":
        for number, other in enumerate(tuned, 1):
            require_origin(base, other, f"tuned model {number} ({names[number]})", None, None)
    weights = dict(merge_tensors(base, tuned, plan.method, plan.params, plan.options, None, report))
    source = Path(plan.base)
    container.write(source, weights, output if source.is_dir() else output / source.name)
    with ThreadPoolExecutor() as pool:
        prints = list(pool.map(partial(fingerprint, {}), (*states, weights)))
    return {
        "base": plan.base,
        "tuned": names[1:],
        "file": "" if source.is_dir() else source.name,
        "fingerprints": {"base": prints[0], "tuned": prints[1:-1], "merged": prints[-1]},
    }
