"""Commands over upstreams, those included that are fine-tuned and merged here."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downstream.commands import margins, recipes, settings, tasks, writable
from upstream.common import disk
from upstream.common.errors import UserError, near_miss

if TYPE_CHECKING:
    from downstream.recipe import Recipe
    from downstream.run.schedule import Request
    from upstream.common.registry import Registry

LARGEST_CARD = 1 << 20  # bytes
LISTS = {  # what `list` knows: where its registry is
    "upstreams": "upstream.resolve:UPSTREAMS",
    "tasks": "downstream.base:TASKS",
    "suites": "",
    "corpora": "downstream.corpora:CORPORA",
    "heads": "downstream.base:HEADS",
    "methods": "merging.methods:METHODS",
    "published": "",
}


def run(args: argparse.Namespace) -> None:
    """Score upstreams on the tasks of a suite: --upstream merged,fbank --suite demo"""
    from downstream.recipe import suite_folder
    from downstream.report import published, share, table
    from downstream.report.groups import name
    from downstream.report.pool import Pool
    from downstream.report.results import load_results
    from downstream.run import execute, schedule
    from merging import study
    from merging.requests import costs, requests, require_names

    args.upstream, bases = study.expand(args.upstream, args.results)
    suite, numbers = suite_folder(args.suite), published.chosen(args.published)
    allowed = margins(args.margin, [recipe.name for recipe in recipes(args)])
    require_names(args.upstream, suite, args.results, args.reference)
    how = settings(args)
    if args.from_scratch:
        from merging.pretraining.pretrain import from_scratch

        os.environ["HUBERT_DEMO"] = str(from_scratch(args.results))  # workers inherit it
    prepared = tasks(args)
    upstreams, reference = requests(args.upstream, suite, args.results, how)
    work = schedule.survey(upstreams, prepared, args.seeds, how)
    print(f"{work.kept} cells kept, {len(work.cells)} to compute")
    failed = None
    try:
        execute.run(work, how)
    except execute.Unfinished as error:  # what is finished is shown all the same
        failed = error
    results = load_results(args.results)
    pool = Pool(results, allowed)
    scored = {(identity.name, identity.fingerprint) for identity in work.identities}
    revisions = {task.revision for task in prepared}
    mine = [r for r in results if name(r) in scored and r.cell.revision in revisions]
    if failed and not mine:  # there is nothing to show
        print(*failed.lines, sep="\n", file=sys.stderr)
        raise failed
    # a merged upstream is also shown against the fine-tuned one that it came from
    tuned = [each.name for each in work.identities if each.name.split(":")[0] == "finetuned"]
    references = list(dict.fromkeys(filter(None, [args.reference or reference, *tuned, *bases])))
    if bases:
        from downstream.report.matrix import matrix
        from downstream.report.matrix_view import render

        print(
            *(render(matrix(mine, suite.name, base, pool=pool), "text") for base in bases),
            sep="\n\n",
        )
    else:
        print(table.show(table.summary(mine, suite.name, references, numbers, pool)))
    if not references and len(work.identities) > 1:
        print("no differences: --reference NAME compares the others with one of these")
    print("".join(f"{line}\n" for line in costs(upstreams)), end="", flush=True)
    written = table.write(args.results, results, references, numbers, allowed)
    share.update_cards(mine, args.results / "upstreams", pool)
    if failed:
        print(*failed.lines, sep="\n", file=sys.stderr)
    try:  # pictures come last: whatever becomes of them, the rest is there
        from downstream.report import page
        from upstream.similarity import similarities

        alike, prints = similarities(args.results), dict(scored)
        exact = [f"{each}@{prints[each]}" if each in prints else each for each in references]
        output = args.results / page.NAME
        written += page.write(output, results, alike, exact, published=numbers, margins=allowed)
    except UserError as error:  # at the end of a long run no page is no failure
        print(f"no page: {error}")
    print(f"written: {', '.join(map(str, written))}", flush=True)
    if failed:
        raise failed


def plan(args: argparse.Namespace) -> None:
    """What a run would keep, compute and cost; builds nothing: plan --upstream merged"""
    from downstream.recipe import suite_folder
    from downstream.run.estimate import describe
    from merging import study
    from merging.requests import requests, require_names, unbuilt

    args.upstream, _ = study.expand(args.upstream, args.results)
    suite = suite_folder(args.suite)
    recipes(args)
    require_names(args.upstream, suite, args.results, args.reference)
    how = settings(args)
    upstreams, _ = requests(args.upstream, suite, args.results)
    waiting = {each.name: needs for each in upstreams if (needs := unbuilt(each))}
    print(describe(upstreams, waiting, tasks(args), args.seeds, how))


def similarity(args: argparse.Namespace) -> None:
    """Hidden states and weights against the first upstream's: similarity hubert_demo merged"""
    specs = [args.reference, *args.others]
    from downstream.recipe import suite_folder
    from merging import similarity
    from merging.requests import requests, require_names

    suite = suite_folder(args.suite)
    recipes(args)
    require_names(",".join(specs), suite, args.results, held=True)
    how = settings(args)
    with contextlib.redirect_stdout(sys.stderr):  # what is built on the way is no JSON
        audio = similarity.draw(tasks(args), args.utterances, args.seed)
        (first, *others), _ = requests(",".join(specs), suite, args.results, how, held=True)
        found = similarity.compare(first, others, audio, how)
    print(getattr(similarity, f"as_{args.format}")(found))


def list_(args: argparse.Namespace) -> None:
    """What there is, a line each: list upstreams; or what one takes: list corpora manifest"""
    if args.name is not None:
        print(_described(args.what, args.name))
        return
    if args.what == "suites":
        from downstream import recipe

        rows = [(path.name, ", ".join(recipe.suite(path.name))) for path in recipe.suites()]
    elif args.what == "published":
        from downstream.report import published

        rows = [*published.about()]
    else:
        registry = _registry(args.what)
        rows = [(name, registry.about(name)) for name in sorted(registry)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {about}" for name, about in rows))


def _registry(what: str) -> Registry[Any]:
    import merging  # noqa: F401 - registers what is built here

    module, _, attribute = LISTS[what].partition(":")
    registry: Registry[Any] = getattr(importlib.import_module(module), attribute)
    return registry


def _described(what: str, name: str) -> str:
    """One line on an entry of a list, its options with their defaults, and its documentation."""
    if not LISTS[what]:
        raise UserError(f"list {what}: takes no name")
    registry = _registry(what)
    entry = registry[name]
    parts = [f"{name}: {registry.about(name)}"]
    if inspect.isroutine(entry) or inspect.isclass(entry):
        options = inspect.signature(entry).parameters.values()
        parts.append("\n".join(map(_option, options)))
        parts.append(inspect.getdoc(entry) or "")
    return "\n\n".join(filter(None, parts))


def _option(option: inspect.Parameter) -> str:
    """`  name: type = default`."""
    default = "" if option.default is option.empty else f" = {option.default!r}"
    return f"  {option.name}: {option.annotation}{default}"


def named(args: argparse.Namespace) -> Request:
    """The upstream that a command names which builds nothing. Raises UserError."""
    import merging  # noqa: F401 - registers what is built here
    from merging.built import BUILT, find, is_built
    from upstream.resolve import canonical, parse, require

    spec = canonical(args.upstream)
    built = is_built(spec) or parse(spec)[0] in BUILT
    if not built:
        require(spec)  # a wrong name is told before seconds of imports
    from downstream.run.schedule import Request

    if not built:
        return Request(spec, spec)
    suite = getattr(args, "suite", None)
    stored = find(spec, args.results, Path(suite).name if suite else None)
    return Request(stored.name, stored.spec)


def describe(args: argparse.Namespace) -> None:
    """An upstream's layers, size, fingerprint, licence, source: describe hubert_demo"""
    upstream = named(args).load()
    milliseconds = 1000 * upstream.stride / upstream.sample_rate
    facts = {
        "upstream": args.upstream,
        "hidden states": f"{upstream.num_layers} of {upstream.dim} values",
        "frame": f"every {upstream.stride} samples ({milliseconds:g} ms)",
        "parameters": f"{sum(p.numel() for p in upstream.parameters()):,}",
        "options": ", ".join(f"{key}={value}" for key, value in upstream.options.items()) or "none",
        "fingerprint": upstream.fingerprint(),
        "licence": upstream.licence or "not stated",
        "source": upstream.source or "not stated",
    }
    print("\n".join(f"{key:<14} {value}" for key, value in facts.items()))
    place = Path(upstream.source)
    merged = (place.parent / "merge.json").is_file()  # a model.pt with its card beside it
    card = (place.parent if merged else place) / "README.md"
    if card.is_file():
        print(f"\n{disk.read(card, LARGEST_CARD).decode(errors='replace')}")


def check(args: argparse.Namespace) -> int:
    """The promises of an upstream, or a recipe: check --upstream mine.py:Mine"""
    if args.recipe:
        from downstream import recipe
        from downstream.run.data_sheet import data_sheet

        suite = args.recipe.is_dir()
        paths = list(recipe.suite(str(args.recipe)).values()) if suite else [args.recipe]
        for path in paths:
            sheet = data_sheet(recipe.load(path), args.results)
            print(sheet.as_json() if args.format == "json" else sheet.as_text())
        return 0
    request = named(args)
    from upstream.check import check as promises

    rows = promises(request.load())
    if args.format == "json":
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        for row in rows:
            print(f"{'kept  ' if row.kept else 'BROKEN'}  {row.name:<28} {row.evidence}")
        _tell_files_run()
    return 0 if all(row.kept for row in rows) else 1


def _tell_files_run() -> None:
    """Python that recipes and names asked for was run: by design, and said."""
    from upstream.common import user_code

    for path in user_code.files_run():
        print(f"ran {path}")


def predict(args: argparse.Namespace) -> None:
    """What trained heads say of other audio: predict --upstream X --downstream asr my.wav"""
    from downstream import recipe as task_recipes
    from downstream.recipe import suite_folder
    from downstream.report.groups import results_of
    from downstream.report.results import load_results
    from downstream.run import heads

    suite = suite_folder(args.suite).name
    mine = [r for r in load_results(args.results) if r.cell.suite == suite]
    mine = results_of(args.upstream, mine)
    cells = [r for r in mine if r.cell.task == args.downstream]
    if not cells:
        known = {r.cell.task for r in mine}
        raise UserError(
            f"{args.upstream} has no results in task {args.downstream!r} of suite {suite!r}"
            f"{near_miss(args.downstream, known)}"
        )
    newest = max(cells, key=lambda r: r.score.created).cell.revision
    cells = [r for r in cells if r.cell.revision == newest]
    from upstream.audio import load  # a file that cannot be read is told before the rest

    for path in args.files:
        load(path)
    upstream = named(args).load().eval()
    if upstream.fingerprint() != cells[0].cell.fingerprint:
        raise UserError(
            f"{args.upstream} has other weights now ({upstream.fingerprint()}) than its heads were "
            f"trained on ({cells[0].cell.fingerprint}); run the benchmark again"
        )

    def trusted() -> Recipe:
        """The user's own recipe, with what --set changes."""
        own = task_recipes.suite(args.suite)
        if args.downstream not in own:
            raise UserError(f"suite {args.suite} has no {args.downstream}.yaml: nothing of it runs")
        return task_recipes.load(own[args.downstream], task_recipes.overrides(args.set))

    kept = [head for cell in cells for head in heads.load(cell, upstream, trusted)]
    for path in args.files:
        print(f"{path}\t{heads.agreed(heads.predict(kept, upstream, path))}", flush=True)


def finetune(args: argparse.Namespace) -> None:
    """Stage 1, stable fine-tuning: finetune recipes/demo/finetune.yaml"""
    from merging.names import require_finetune
    from upstream.common.schema import overrides

    changes = overrides(args.set)
    require_finetune(args.recipe, changes)
    writable(args.output or args.results)
    from merging.tuning import build_tuned
    from merging.tuning.ranks import joined

    with joined() as ranks:
        print(build_tuned(args.recipe, args.results, args.output, ranks, changes))


def merge(args: argparse.Namespace) -> None:
    """Stage 2, merge weights and write them: merge recipes/demo/merged.yaml --output merged/"""
    from merging.names import require_merge, require_method, require_names
    from upstream.common.schema import overrides

    parts, keys = (args.base, args.tuned), overrides(args.set)
    if any(parts) == bool(args.recipe) or any(parts) != all(parts):
        raise UserError("merge: give either a recipe, or both --base and --tuned")
    if args.recipe:
        require_merge(args.recipe, keys, args.method)
    else:
        require_names([args.base, *args.tuned], None, "merge")
        require_method(args.method or "linear", "merge")
    from merging.merged import write
    from merging.recipe import load_recipe, placed, recipe_of

    writable(args.output if args.format == "hf" else args.output.parent)
    if args.recipe:
        method = {"method": args.method} if args.method else {}
        recipe = load_recipe(args.recipe, placed({**keys, **method}))
    else:
        recipe = recipe_of(args.base, args.tuned, args.method, keys)
    record = write(recipe, args.recipe or Path(), args.output, args.results, args.format)
    print("\n".join(record.lines()))


def export(args: argparse.Namespace) -> None:
    """Write an upstream in another format: export merged --output out/"""
    request = named(args)
    from merging import requests

    writable(args.output if args.format == "hf" else args.output.parent)
    print(requests.export(request, args.format, args.output))


def cache(args: argparse.Namespace) -> None:
    """Features on disk, least recently used first; list or clear: cache clear hubert_demo"""
    from datetime import datetime

    from upstream.features.store import Store

    store = Store(args.results / "cache")
    entries = store.entries()
    known = {name for entry in entries for name in (entry.name, entry.fingerprint)}
    if args.upstream and args.upstream not in known:
        raise UserError(f"cache: nothing of {args.upstream!r}{near_miss(args.upstream, known)}")
    chosen = [e for e in entries if args.upstream in (None, e.name, e.fingerprint)]
    for entry in chosen:
        row = (
            f"{entry.fingerprint}  {entry.kind:<8} {entry.clips:>7} utterances "
            f"{entry.hours:>8.2f} h {entry.gigabytes:>8.3f} GB  "
            f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}  {entry.name}"
        )
        if args.action == "clear":
            if store.remove(entry):
                row += "  cleared"
            elif others := store.foreign(entry):
                row += f"  kept: {others[0]!r:.80} in it is not of this program"
            else:
                row += "  kept: in use by another process"
        print(row)
    print(f"{sum(entry.gigabytes for entry in chosen):.3f} GB in {store.root}")
