"""Upstreams as the command line names them; what is built here becomes a folder of weights."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from downstream.run.cluster import LOCAL, cluster
from downstream.run.estimate import Unbuilt
from downstream.run.execute import note
from downstream.run.prepare import Prepared
from downstream.run.schedule import Request, RunOptions
from merging import choose as choosing
from merging.built import BUILT, EXACT, find, hold, is_built
from merging.choose import BASE, Choice, Dev
from merging.cost import cost_text
from merging.merged import Undecided, folder_of, open_merge, settled_spec, tuned_spec
from merging.recipe import YAML, MergeRecipe, altered, made
from merging.tuning.build import RECORD as TUNED
from merging.tuning.recipe import TuningRecipe, open_plan, opening
from merging.tuning.recipe import load_recipe as load_tuning
from merging.write import RECORD, as_encoder
from upstream.checkpoints.write import WEIGHTS
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.encoder.export import export as write_encoder
from upstream.resolve import beside, call, canonical, parse, ready, split_specs

Untrained = tuple[TuningRecipe, tuple[Prepared, ...]]  # with the corpora of its objectives
RECORDS = (RECORD, TUNED)
NUMBER = r"[-+]?\.?\d[\d.eE+-]*"
# Commas part upstreams, but not the numbers of a curve: merged:alpha=0,0.25,1:seed=0,1
CURVE = re.compile(rf"\b(?:alpha|seed)=\s*{NUMBER}(?:\s*,\s*{NUMBER})+(?=\s*(?:[,:]|$))")


class Built(NamedTuple):
    """An upstream of a merge recipe, as a name describes it."""

    recipe: Path
    results: Path
    plan: MergeRecipe  # with what the name says
    member: int | None  # of the fine-tuned ones, if it is one of them and not the merge


def request(spec: str, suite: Path, results: Path, held: bool = False) -> Request:
    """What to load for a name; `merged` and `finetuned` are looked up in the suite.

    Where it has no merge recipe, and for NAME@FINGERPRINT, they are what `results` holds; with
    `held` that comes first. Raises UserError.
    """
    spec = canonical(spec)
    name, options = parse(spec)
    if is_built(spec):
        exact = EXACT.fullmatch(spec)
        stored = find(spec, results, suite.name) if exact else None
        if held and not exact:
            stored = hold(spec, results, suite.name)
        recipe = suite / "merged.yaml"
        if stored is None and name in BUILT and not recipe.is_file():
            stored = hold(spec, results)
            if stored is None:
                fault = f"the suite has no {recipe}, and {results} holds no upstream of that name"
                raise UserError(f"{spec}: {fault}; give {name}:recipe=FILE")
        if stored is not None:
            return Request(stored.name, stored.spec)
    given = with_results(spec, results)
    if name in BUILT and "recipe" not in options:
        given["recipe"] = str(suite / "merged.yaml")
    return Request(spec, spec, given)


def with_results(spec: str, results: Path) -> dict[str, str]:
    """The option of what is built here that says where, unless the name says it."""
    name, options = parse(spec)
    ours = (name in BUILT or name.endswith(YAML)) and "results" not in options
    return {"results": str(results)} if ours else {}


def curves(specs: str) -> list[list[str]]:
    """Names between commas; one with a list of alphas or seeds is one name for each.

    `"a,merged:alpha=0,0.5"` -> `[["a"], ["merged:alpha=0", "merged:alpha=0.5"]]`.
    """
    groups = []
    for spec in split_specs(CURVE.sub(lambda curve: curve[0].replace(",", ";"), specs)):
        points = [spec]
        for curve in re.finditer(r"\b(alpha|seed)=([^:,;]+(?:;[^:,;]+)+)", spec):
            values = [f"{curve[1]}={value.strip()}" for value in curve[2].split(";")]
            points = [point.replace(curve[0], value) for point in points for value in values]
        groups.append(points)
    return groups


def requests(
    specs: str,
    suite: Path,
    results: Path,
    options: RunOptions | None = None,
    held: bool = False,
) -> tuple[list[Request], str | None]:
    """The upstreams to score, and the name of the one that differences are taken from.

    One `merged` alone brings its comparison along: what its recipe names under `compare`, the
    pre-trained base (the reference) and, unless it is a curve of alphas, the fine-tuned upstream
    (of every seed). With `options` all is chosen and built; without, what is not built yet stays a
    recipe. held: as of `request`.
    """
    listed, reference = _listed(specs, suite, results, held)
    if options and options.executor != LOCAL:
        _build_elsewhere(listed, options)
    return [_settled(each, options) for each in listed], reference


def require_names(
    specs: str, suite: Path, results: Path, reference: str | None = None, held: bool = False
) -> None:
    """Raise what `requests` would for any wrong name, option or recipe, those of recipes too.

    reference: what differences are to be taken from; it must be one of the upstreams. Nothing is
    built and no corpus is read; a model of the hub is fetched. held: as of `request`.
    """
    listed, _ = _listed(specs, suite, results, held)
    for each in listed:
        _require(each)
    names = [each.name for each in listed]
    if reference and canonical(reference.split("@")[0]) not in names:
        raise UserError(f"--reference {reference}: not scored here{near_miss(reference, names)}")


def _require(upstream: Request) -> None:
    ready(upstream.spec, **upstream.options)
    if not (built := _built(upstream)):
        return
    _require(_base(built))
    for name in built.plan.tuned:
        run = made(name)
        if not run:
            ready(beside(name, built.recipe.parent))
            continue
        path = built.recipe.parent / run.recipe
        recipe = load_tuning(path, run.changes)
        with opening(path):
            base = beside(recipe.upstream, path.parent)
            _require(request(base, path.parent, built.results))


def _listed(specs: str, suite: Path, results: Path, held: bool) -> tuple[list[Request], str | None]:
    """As `requests`, but nothing is looked up. Raises UserError for a name that comes twice."""
    groups, reference = curves(specs), None
    listed = [request(spec, suite, results, held) for group in groups for spec in group]
    built = _built(listed[0])
    if len(groups) == 1 and built and built.member is None:
        plan, reference = built.plan, built.plan.base
        elsewhere = built.recipe != suite / "merged.yaml"
        tuned = f"finetuned:recipe={built.recipe}" if elsewhere else "finetuned"
        seeds = [parse(each.spec)[1].get("seed") for each in listed]
        runs = [f"{tuned}:seed={seed}" if seed else tuned for seed in seeds]
        curve = len({*runs}) < len(runs)
        names = [*plan.compare, plan.base, *([] if curve else runs)]
        listed = [*(request(name, suite, results) for name in names), *listed]
    shown = [each.name for each in listed]
    for name in shown:
        if shown.count(name) > 1:
            raise UserError(f"upstream {name} is named twice")
    return listed, reference


def _build_elsewhere(listed: Sequence[Request], options: RunOptions) -> None:
    """Let a cluster's jobs build what there is not yet: fine-tuning wants the GPUs that they have.

    Those that wait for the same fine-tuning wait for its lease. Raises UserError for a failed one.
    """
    waiting = [each for each in listed if _built(each) and _settled(each, None) is each]
    if not waiting:
        return
    with cluster(options.executor, len(waiting), options.store.root / "queue") as executor:
        for job, outcome in executor(partial(build, options=options), waiting):
            if outcome.trace:
                note(options.results / "errors.log", job.name, outcome.trace)
                raise UserError(f"{job.name}: {outcome.line}")
            print(f"{job.name}: {outcome.line}", flush=True)


def build(request: Request, options: RunOptions) -> str:
    """Build one upstream here, alone; what to say of it. Raises UserError."""
    begun = time.monotonic()
    disk.guard(options.results)
    _settled(request, replace(options, executor=LOCAL, workers=1))
    return f"built ({time.monotonic() - begun:.0f} s)"


def _built(request: Request) -> Built | None:
    name, _ = parse(request.spec)
    if name not in BUILT and not name.endswith(YAML):
        return None
    options = call(request.spec, **request.options)[1]
    recipe, results = Path(options.pop("recipe")), Path(options.pop("results"))
    if name == "finetuned":
        member = options.pop("member", 0)
        return Built(recipe, results, altered(recipe, **options), member)
    return Built(recipe, results, altered(recipe, **options), None)


def _settled(request: Request, options: RunOptions | None) -> Request:
    """The same upstream as the folder of its weights; without `options` only if it is there."""
    built = _built(request)
    if built is None or (options is None and _untrained(built)):
        return request
    if built.member is not None:
        spec = tuned_spec(built.plan, built.recipe, built.results, built.member)
        return Request(request.name, spec)
    choose = partial(_choose, request, options) if options else None
    try:
        merge = open_merge(built.plan, built.recipe, built.results, choose)
    except Undecided:
        return request
    if merge.choice:
        print("\n".join(merge.choice.lines()))
    if options is None and not (folder_of(merge) / RECORD).is_file():
        return request
    return Request(request.name, settled_spec(merge))


def _choose(
    request: Request, options: RunOptions, plan: MergeRecipe, tasks: Sequence[Prepared]
) -> Choice:
    """Score what the recipe of `request` has to choose from, and choose."""
    choose = plan.choose
    assert choose is not None
    metrics = {task.recipe.name: task.recipe.kind_of_task().metrics[0] for task in tasks}
    built = _built(request)
    assert built is not None
    base = _base(built)

    def candidate(name: str) -> Request:
        if name == BASE:
            return _settled(base, options)
        word = f":{choose.what}={name}"
        return _settled(Request(request.name + word, request.spec + word, request.options), options)

    def score(candidates: Sequence[str]) -> Dev:
        return choosing.score({name: candidate(name) for name in candidates}, tasks, options)

    if choose.what == "members":
        return choosing.greedy(score, metrics, len(plan.tuned))
    if choose.depths:
        return choosing.deep(score, metrics, choose)
    return choosing.pick(score(choose.scored), metrics, choose.candidates)


def unbuilt(request: Request) -> Unbuilt | None:
    """What must be done before this upstream exists; None if nothing."""
    built = _built(request)
    if built is None:
        return None
    untrained = _untrained(built)
    waiting = [f"{recipe.name}: {recipe.steps} steps of fine-tuning" for recipe, _ in untrained]
    if (choose := built.plan.choose) and built.member is None:
        count = choose.count if choose.what == "alpha" else len(built.plan.tuned)
        waiting.append(f"{choose.what} to choose from {count} on {', '.join(choose.tasks)}")
    like = _base(built)
    inner = unbuilt(like) if like is _settled(like, None) else None
    like = inner.like if inner else like
    runs = [(each[0], _seconds(each)) for each in untrained]
    return Unbuilt(", ".join(waiting) or "merging", like, runs)


def costs(requests: Sequence[Request]) -> list[str]:
    """What building them took, a line each, of those that were built here and tell it."""
    lines = []
    for each in requests:
        for name in RECORDS:
            with contextlib.suppress(OSError, ValueError, TypeError):  # no record, or none now
                record = disk.read_record(Path(parse(each.spec)[0]) / name)
                lines += [f"cost of {each.name}: {text}"] if (text := cost_text(record)) else []
    return lines


def _seconds(untrained: Untrained) -> float:
    """Audio in all steps of a run, were the corpora of all objectives alike."""
    recipe, corpora = untrained
    mean = sum(task.seconds for task in corpora) / sum(len(task.clips) for task in corpora)
    batch = recipe.batch_seconds or mean * (recipe.batch or 0)
    return recipe.steps * recipe.accumulate * batch


def _base(built: Built) -> Request:
    """What the base of a merge is loaded by."""
    return request(built.plan.base, built.recipe.parent, built.results)


def _untrained(built: Built) -> list[Untrained]:
    """The fine-tuning that a merge recipe waits for, that of its bases first."""
    with opening(built.recipe):
        waiting = _untrained_base(_base(built))
    runs = [(of.recipe, of.changes) for of in map(made, built.plan.tuned) if of]
    for number, (name, changes) in enumerate(runs):
        if (name, changes) in runs[:number]:  # of one run, another upstream
            continue
        path = built.recipe.parent / name
        recipe = load_tuning(path, changes)
        with opening(path):
            base = request(beside(recipe.upstream, path.parent), path.parent, built.results)
            first = _untrained_base(base)
        if first:
            corpora = tuple(aim.prepared(path, built.results) for aim in recipe.aims)
            waiting += [each for each in first if each not in waiting] + [(recipe, corpora)]
            continue
        plan = open_plan(path, built.results, changes)
        if not (plan.folder(built.results) / WEIGHTS).exists():
            waiting.append((plan.recipe, plan.corpora))
    return waiting


def _untrained_base(request: Request) -> list[Untrained]:
    built = _built(request)
    return _untrained(built) if built else []


def export(request: Request, form: str, output: Path) -> Path:
    """Write an encoder as an HF folder or as a file of s3prl or fairseq. Raises UserError."""
    return write_encoder(as_encoder(request.load(), request.name), form, output)
