#!/usr/bin/env python
"""Speech-FT Bench: does a fine-tuned and merged speech encoder generalise, or did it forget?"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from upstream.checkpoints import FORMATS
from upstream.common.errors import UserError, near_miss, one_line
from upstream.common.stop import stoppable

if TYPE_CHECKING:
    from downstream.run.prepare import Prepared
    from downstream.run.schedule import Request, RunOptions

EXAMPLES = """\
examples:
  benchmark.py --upstream merged                          build what is missing, score, compare
  benchmark.py --upstream hf:my/checkpoint,fbank --suite sample
  benchmark.py --upstream merged:alpha=0.5 --downstream asr,er --seeds 3 --set train.steps=500
  benchmark.py merge --base hubert_base --tuned my/tuned --set alpha=0.5 --output merged/
The same command again keeps what is finished and goes on where it was interrupted.
"""
STOPPED = 130  # exit status
COMMANDS = (
    "run plan compare errors matrix report similarity list_ describe check predict "
    "finetune merge export cache"
).split()
LISTS = {  # what `list` knows: where its registry is
    "upstreams": "upstream.resolve:UPSTREAMS",
    "tasks": "downstream.base:TASKS",
    "suites": "",
    "corpora": "downstream.corpora:CORPORA",
    "heads": "downstream.base:HEADS",
    "methods": "merging.methods:METHODS",
}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line with the near match."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        choice = re.fullmatch(
            r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL
        )
        if choice:
            known = [name.strip("' ") for name in choice[3].split(",")]
            message = f"unknown {choice[1]} {choice[2]!r}{near_miss(choice[2], known)}"
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Every command with its flags; a call without a command is `run`."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of EXAMPLES
    top = Parser("benchmark.py", description=__doc__, formatter_class=raw, epilog=EXAMPLES)
    added = top.add_subparsers(metavar="COMMAND", required=True)
    commands = {}
    for name in COMMANDS:
        call = globals()[name]
        command = added.add_parser(name.rstrip("_"), help=call.__doc__, description=call.__doc__)
        command.set_defaults(call=call)
        flag = command.add_argument
        flag("--results", type=Path, default=Path("results"),
             help="where results, caches and built upstreams live")  # fmt: skip
        flag("--debug", action="store_true", help="show the traceback of an error")
        commands[name] = command
    for name in ("run", "plan"):
        flag = commands[name].add_argument
        flag("--upstream", required=True, help="names, separated by commas")
        flag("--downstream", help="tasks, separated by commas (default: the suite's)")
        flag("--suite", default="demo", help="a folder of recipes (default: demo)")
        flag("--seeds", type=_number(int, 1), help="head seeds (default: the recipe's)")
        flag("--set", action="append", default=[], metavar="KEY=VALUE",
             help="override a task recipe's key, e.g. train.steps=500")  # fmt: skip
        flag("--workers", type=_number(int, 1),
             help="processes (default: one per core, or up to 4 per GPU)")  # fmt: skip
        flag("--device", help="cpu or cuda (default: cuda if there is one)")
        flag("--cache-gb", type=_number(float, 0), default=20.0,
             help="disk for features; least recently used go first")  # fmt: skip
        flag("--features", choices=("auto", "cache", "recompute"), default="auto",
             help="keep frames on disk or pass the audio again at every step "
             "(default: keep what fits --cache-gb)")  # fmt: skip
        flag("--batch-seconds", type=_number(float, 1),
             help="audio per encoder batch (default: 32; on a GPU 600, or what fits)")  # fmt: skip
        flag("--reference", help="the upstream that differences are taken from")
    flag = commands["run"].add_argument
    flag("--from-scratch", action="store_true",
         help="repeat hubert_demo's pre-training first (hours)")  # fmt: skip
    flag = commands["compare"].add_argument
    flag("a")
    flag("b")
    flag("more", nargs="*", help="further upstreams: then letters say which cannot be told apart")
    flag("--format", default="text", choices=("text", "md", "csv", "json", "latex"))
    flag = commands["errors"].add_argument
    flag("a")
    flag("b")
    flag("--downstream", required=True, help="a task that both were scored on")
    flag("--suite", default="demo", help="the suite of the task (default: demo)")
    flag("--limit", type=_number(int, 1), default=10, help="so many a side (default: 10)")
    flag("--format", default="text", choices=("text", "csv", "json"))
    commands["errors"].set_defaults(set=[])
    flag = commands["report"].add_argument
    flag("--suite", help="only this one (default: all)")
    flag("--reference", help="the upstream that differences are taken from")
    flag("--output", type=Path, help="the page (default: report.html in the results folder)")
    flag("--figures", type=Path, metavar="DIR", help="every figure as PDF and SVG file too")
    flag = commands["similarity"].add_argument
    flag("reference", help="usually the pre-trained upstream")
    flag("others", nargs="+", metavar="UPSTREAM")
    flag("--suite", default="demo", help="whose test audio (default: demo)")
    flag("--downstream", help="tasks of the suite, separated by commas (default: all)")
    flag("--utterances", type=_number(int, 5), default=200, help="at the most (default: 200)")
    flag("--seed", type=_number(int, 0), default=0, help="of the choice of utterances")
    flag("--device", help="cpu or cuda (default: cuda if there is one)")
    flag("--format", default="text", choices=("text", "json", "csv"))
    commands["similarity"].set_defaults(
        set=[], workers=None, cache_gb=20.0, batch_seconds=32.0, features="auto"
    )
    flag = commands["matrix"].add_argument
    flag("--suite", default="demo", help="of the results to show (default: demo)")
    flag("--base", help="the pre-trained upstream (default: what most others grew from)")
    flag("--format", default="text", choices=("text", "md", "csv", "json", "latex"))
    commands["list_"].add_argument("what", choices=LISTS)
    commands["describe"].add_argument("upstream")
    flag = commands["predict"].add_argument
    flag("files", nargs="+", metavar="FILE", help="audio files")
    flag("--upstream", required=True)
    flag("--downstream", required=True, help="a task that this upstream was scored on")
    flag("--suite", default="demo", help="the suite of the task (default: demo)")
    either = commands["check"].add_mutually_exclusive_group(required=True)
    either.add_argument("--upstream")
    either.add_argument("--recipe", type=Path)
    flag = commands["finetune"].add_argument
    flag("recipe", type=Path)
    flag("--set", action="append", default=[], metavar="KEY=VALUE",
         help="override a key of the recipe, e.g. seed=1")  # fmt: skip
    flag("--output", type=Path, help="where to write it (default: results/upstreams)")
    flag = commands["merge"].add_argument
    flag("recipe", type=Path, nargs="?")
    flag("--base")
    flag("--tuned", nargs="+", default=[])
    flag("--method", help="one of `list methods` (default: linear)")
    flag("--set", action="append", default=[], metavar="KEY=VALUE",
         help="a parameter or a key of the recipe, e.g. alpha=0.5, only=[attention]")  # fmt: skip
    flag("--format", default="hf", choices=(*FORMATS, "same"),
         help="same: the container that the base came in")  # fmt: skip
    flag("--output", type=Path, required=True)
    flag = commands["export"].add_argument
    flag("upstream")
    flag("--format", default="hf", choices=FORMATS)
    flag("--output", type=Path, required=True)
    flag = commands["cache"].add_argument
    flag("action", nargs="?", choices=("list", "clear"), default="list")
    flag("upstream", nargs="?", help="only this name or fingerprint")
    return top


def _number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """A finite number of at least `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < 2**31:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r:.40} is no {whole}number from {least} up")
        return value

    return read


def tasks(args: argparse.Namespace) -> list[Prepared]:
    """The chosen tasks of the suite with their corpora read."""
    from downstream import recipe
    from downstream.run.prepare import prepare

    suite, overrides = recipe.suite(args.suite), recipe.overrides(args.set)
    chosen = args.downstream.split(",") if args.downstream is not None else list(suite)
    for name in chosen:
        if name not in suite:
            raise UserError(f"unknown task {name!r} in suite {args.suite}{near_miss(name, suite)}")
        if chosen.count(name) > 1:
            raise UserError(f"--downstream names {name} twice")
    recipes = [recipe.load(suite[name], overrides) for name in chosen]
    return [prepare(task, args.results) for task in recipes]


def settings(args: argparse.Namespace) -> RunOptions:
    """Device, processes and budgets; a results folder that cannot be written is found out now."""
    import torch

    from downstream.run.schedule import RunOptions

    device = args.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # torch has a kind of its own for each way to be no device
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {device!r}: cannot be used ({reason:.200})") from error
    writable(args.results)
    workers = cores = os.cpu_count() or 1
    if device != "cpu":  # several share one GPU: while one decodes audio, another computes
        gpus = max(1, torch.cuda.device_count())
        workers = gpus * max(1, min(4, cores // gpus))
    budgets = (args.cache_gb, args.batch_seconds or (32.0 if device == "cpu" else 600.0))
    return RunOptions(args.results, args.workers or workers, device, *budgets, args.features)


def writable(folder: Path) -> None:
    """Raise UserError now if a folder cannot be written, not after hours."""
    from upstream.common import disk

    with disk.writing(folder), disk.whole(folder / "probe") as part:
        part.touch()
    (folder / "probe").unlink(missing_ok=True)


def run(args: argparse.Namespace) -> None:
    """Score upstreams on the tasks of a suite: --upstream merged,fbank --suite demo"""
    from downstream.recipe import suite_folder
    from downstream.report import table
    from downstream.report.groups import name
    from downstream.report.results import load_results
    from downstream.run import execute, schedule
    from merging.requests import costs, requests

    how, suite = settings(args), suite_folder(args.suite)
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
    scored = {(identity.name, identity.fingerprint) for identity in work.identities}
    revisions = {task.revision for task in prepared}
    mine = [r for r in results if name(r) in scored and r.cell.revision in revisions]
    # a merged upstream is also shown against the fine-tuned one that it came from
    tuned = [each.name for each in work.identities if each.name.split(":")[0] == "finetuned"]
    references = list(dict.fromkeys(filter(None, [args.reference or reference, *tuned])))
    print(table.show(table.summary(mine, suite.name, references)))
    print("".join(f"{line}\n" for line in costs(upstreams)), end="")
    written = table.write(args.results, results, references)
    try:
        from downstream.report import page
        from upstream.similarity import similarities

        alike, prints = similarities(args.results), dict(scored)
        exact = [f"{each}@{prints[each]}" if each in prints else each for each in references]
        written += page.write(args.results / page.NAME, results, alike, exact)
    except UserError as error:  # at the end of a long run no page is no failure
        print(f"no page: {error}")
    print(f"written: {', '.join(map(str, written))}", flush=True)
    if failed:
        print(*failed.lines, sep="\n", file=sys.stderr)
        raise failed


def plan(args: argparse.Namespace) -> None:
    """What a run would keep, compute and cost; builds nothing: plan --upstream merged"""
    from downstream.recipe import suite_folder
    from downstream.run.estimate import describe
    from merging.requests import requests, unbuilt

    how, suite = settings(args), suite_folder(args.suite)
    upstreams, _ = requests(args.upstream, suite, args.results)
    waiting = {each.name: needs for each in upstreams if (needs := unbuilt(each))}
    print(describe(upstreams, waiting, tasks(args), args.seeds, how))


def compare(args: argparse.Namespace) -> None:
    """Upstreams task by task, paired: compare hubert_demo merged [finetuned ...]"""
    from downstream.report import compare, results, several, table

    known, names = results.load_results(args.results), [args.a, args.b, *args.more]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"compare: {name} is named twice")
    notes = several.unlike(names, known)
    if args.more:
        print(several.render(names, several.several(names, known), notes, args.format))
        return
    pairs = compare.compare(args.a, args.b, known)
    print(table.render(pairs._replace(notes=notes), args.format))


def errors(args: argparse.Namespace) -> None:
    """What A gets right and B wrong, with its audio: errors hubert_demo merged --downstream sid"""
    from downstream.report.results import load_results
    from downstream.report.wrong import compared, render

    paths = {}
    try:
        prepared, *_ = tasks(args)
        paths = {item.id: clip.path for item, clip in zip(prepared.items, prepared.clips)}
    except UserError as error:  # results outlive their corpora
        print(f"benchmark.py: no paths of audio: {error}", file=sys.stderr)
    suite = Path(args.suite).name
    known = load_results(args.results)
    rows = compared(args.a, args.b, args.downstream, suite, known, paths)
    print(render(args.a, args.b, rows, args.limit, args.format))


def report(args: argparse.Namespace) -> None:
    """All results as one HTML page, and figures for a paper: report --figures figures/"""
    from downstream.report import page, results
    from upstream.similarity import similarities

    output = args.output or args.results / page.NAME
    references = [args.reference] if args.reference else []
    found = results.load_results(args.results), similarities(args.results)
    for path in page.write(output, *found, references, args.suite, args.figures):
        print(path)


def similarity(args: argparse.Namespace) -> None:
    """Hidden states and weights against the first upstream's: similarity hubert_demo merged"""
    import merging  # noqa: F401 - registers what is built here
    from upstream.resolve import require

    specs = [args.reference, *args.others]
    for spec in specs:
        require(spec)
    from downstream.recipe import suite_folder
    from merging import similarity
    from merging.requests import requests

    how, suite = settings(args), suite_folder(args.suite)
    with contextlib.redirect_stdout(sys.stderr):  # what is built on the way is no JSON
        audio = similarity.draw(tasks(args), args.utterances, args.seed)
        (first, *others), _ = requests(",".join(specs), suite, args.results, how)
        found = similarity.compare(first, others, audio, how)
    print(getattr(similarity, f"as_{args.format}")(found))


def matrix(args: argparse.Namespace) -> None:
    """Ways of fine-tuning by tasks, their seeds together: matrix --suite demo"""
    from downstream.report.matrix import matrix, render
    from downstream.report.results import load_results

    suite = Path(args.suite).name
    print(render(matrix(load_results(args.results), suite, args.base), args.format))


def list_(args: argparse.Namespace) -> None:
    """What there is, a line each: list upstreams"""
    if args.what == "suites":
        from downstream import recipe

        rows = [(path.name, ", ".join(recipe.suite(path.name))) for path in recipe.suites()]
    else:
        import merging  # noqa: F401 - registers what is built here

        module, _, attribute = LISTS[args.what].partition(":")
        registry = getattr(importlib.import_module(module), attribute)
        rows = [(name, registry.about(name)) for name in sorted(registry)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {about}" for name, about in rows))


def named(args: argparse.Namespace) -> Request:
    """The upstream that a command without a suite names."""
    import merging  # noqa: F401 - registers what is built here
    from upstream.resolve import require

    require(args.upstream)  # a wrong name is told before seconds of imports
    from downstream.recipe import suite_folder
    from merging.requests import request

    suite = getattr(args, "suite", "demo")
    return request(args.upstream, suite_folder(suite), args.results)


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
        print(f"\n{card.read_text(encoding='utf-8', errors='replace')}")


def check(args: argparse.Namespace) -> int:
    """The promises of an upstream, or a recipe: check --upstream mine.py:Mine"""
    if args.recipe:
        from downstream import recipe
        from downstream.run.prepare import prepare

        prepared = prepare(recipe.load(args.recipe), args.results)
        for fold, split in prepared.splits.items():
            print(fold or "corpus", {part: len(indices) for part, indices in split.items()})
        return 0
    from upstream.check import check as promises

    rows = promises(named(args).load())
    for row in rows:
        print(f"{'kept  ' if row.kept else 'BROKEN'}  {row.name:<28} {row.evidence}")
    return 0 if all(row.kept for row in rows) else 1


def predict(args: argparse.Namespace) -> None:
    """What trained heads say of other audio: predict --upstream X --downstream asr my.wav"""
    from upstream.audio import load  # a file that cannot be read is told before all else

    for path in args.files:
        load(path)
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
    upstream = named(args).load().eval()
    if upstream.fingerprint() != cells[0].cell.fingerprint:
        raise UserError(
            f"{args.upstream} has other weights now ({upstream.fingerprint()}) than its heads were "
            f"trained on ({cells[0].cell.fingerprint}); run the benchmark again"
        )
    kept = [head for cell in cells for head in heads.load(cell, upstream)]
    for path in args.files:
        print(f"{path}\t{heads.agreed(heads.predict(kept, upstream, path))}", flush=True)


def finetune(args: argparse.Namespace) -> None:
    """Stage 1, stable fine-tuning: finetune recipes/demo/finetune.yaml"""
    from downstream.recipe import overrides
    from merging.tuning import build_tuned
    from merging.tuning.ranks import joined

    changes = overrides(args.set)
    writable(args.output or args.results)
    with joined() as ranks:
        print(build_tuned(args.recipe, args.results, args.output, ranks, changes))


def merge(args: argparse.Namespace) -> None:
    """Stage 2, merge weights and write them: merge recipes/demo/merged.yaml --output merged/"""
    from downstream.recipe import overrides
    from merging.merged import write
    from merging.recipe import load_recipe, placed, recipe_of

    parts, keys = (args.base, args.tuned), overrides(args.set)
    if any(parts) == bool(args.recipe) or any(parts) != all(parts):
        raise UserError("merge: give either a recipe, or both --base and --tuned")
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
            cleared = store.remove(entry)
            row += "  cleared" if cleared else "  kept: in use by another process"
        print(row)
    print(f"{sum(entry.gigabytes for entry in chosen):.3f} GB in {store.root}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; a mistake is one line and exit code 2, an interruption 130."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["run", *argv]
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # any name, on any terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(args.call(args) or 0)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        line = one_line(error, "what the same command prints with --debug")
        print(f"benchmark.py: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with stoppable():
        status = main()
    if status == STOPPED:  # the threads of killed workers may wait for each other for ever
        end = threading.Timer(5.0, os._exit, [status])
        end.daemon = True
        end.start()
    sys.exit(status)
