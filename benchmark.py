#!/usr/bin/env python
"""Speech-FT Bench: does a fine-tuned and merged speech encoder generalise, or did it forget?"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from upstream.common.errors import UserError, near_miss

if TYPE_CHECKING:
    from downstream.run.cell import Prepared
    from downstream.run.schedule import Settings
    from upstream.common.registry import Registry

EXAMPLES = """\
examples:
  benchmark.py --upstream merged                          build what is missing, score, compare
  benchmark.py --upstream hf:my/checkpoint,fbank --suite sample
  benchmark.py --upstream merged:alpha=0.5 --downstream asr,er --seeds 3 --set train.steps=500
  benchmark.py plan --upstream merged                     what is kept and what it would take
  benchmark.py compare hubert_demo merged                 task by task, paired, with intervals
  benchmark.py list tasks                                 what there is
commands: plan compare list describe check finetune merge export cache (each has --help)
The same command again keeps what is finished and goes on where it was interrupted.
"""
FORMATS = ("hf", "s3prl", "fairseq")
LISTS = ("upstreams", "tasks", "suites", "corpora", "heads", "methods")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line with the near match."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        found = re.fullmatch(r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if found:
            known = [name.strip("' ") for name in found[3].split(",")]
            message = f"unknown {found[1]} {found[2]!r}{near_miss(found[2], known)}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Every command with its flags; a call without a command is `run`."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser("benchmark.py", description=__doc__, formatter_class=raw)
    top.epilog = EXAMPLES
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, about: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=about, description=about, epilog=f"example:\n  benchmark.py {example}",
            formatter_class=raw,
        )  # fmt: skip

    for name, about, example in (
        ("run", "score upstreams on the tasks of a suite", "--upstream merged,fbank --suite demo"),
        ("plan", "what a run would keep, compute and cost", "plan --upstream merged"),
    ):
        one = add(name, about, example)
        one.add_argument("--upstream", required=True, help="names, separated by commas")
        one.add_argument("--downstream", help="tasks, separated by commas (default: the suite's)")
        one.add_argument("--suite", default="demo", help="a folder of recipes (default: demo)")
        one.add_argument("--seeds", type=_positive, help="head seeds (default: the recipe's)")
        one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                         help="override a task recipe's key, e.g. train.steps=500")  # fmt: skip
        one.add_argument("--workers", type=_positive, help="processes (default: one per core)")
        one.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
        one.add_argument("--cache-gb", type=float, default=20.0,
                         help="disk for features; least recently used go first")  # fmt: skip
        one.add_argument("--features", choices=("auto", "cache", "recompute"), default="auto",
                         help="keep frames on disk or pass the audio again at every step "
                         "(default: keep what fits --cache-gb)")  # fmt: skip
        one.add_argument("--batch-seconds", type=float, default=32.0,
                         help="audio per encoder batch")  # fmt: skip
        one.add_argument("--reference", help="the upstream that differences are taken from")
        if name == "run":
            one.add_argument("--from-scratch", action="store_true",
                             help="repeat hubert_demo's pre-training first (hours)")  # fmt: skip
    one = add("compare", "two upstreams task by task, paired", "compare hubert_demo merged")
    one.add_argument("a")
    one.add_argument("b")
    one.add_argument("--format", default="text", choices=("text", "md", "csv", "json", "latex"))
    one = add("list", "what there is, a line each", "list upstreams")
    one.add_argument("what", choices=LISTS)
    one = add("describe", "an upstream's layers, size, fingerprint, source", "describe hubert_demo")
    one.add_argument("upstream")
    one = add("check", "the promises of an upstream, or a recipe", "check --upstream mine.py:Mine")
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("--upstream")
    which.add_argument("--recipe", type=Path)
    one = add("finetune", "stage 1: stable fine-tuning", "finetune recipes/demo/finetune.yaml")
    one.add_argument("recipe", type=Path)
    one.add_argument("--output", type=Path, help="where to write it (default: results/upstreams)")
    one = add("merge", "stage 2: merge weights and write them", "merge recipes/demo/merged.yaml "
              "--output merged/\n  benchmark.py merge --base hubert_base --tuned my/tuned "
              "--set alpha=0.5 --output merged/")  # fmt: skip
    one.add_argument("recipe", type=Path, nargs="?")
    one.add_argument("--base")
    one.add_argument("--tuned", nargs="+", default=[])
    one.add_argument("--method", help="one of `list methods` (default: linear)")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter or a key of the recipe, e.g. alpha=0.5, only=[attention]",
    )
    one.add_argument("--format", default="hf", choices=(*FORMATS, "same"),
                     help="same: the container that the base came in")  # fmt: skip
    one.add_argument("--output", type=Path, required=True)
    one = add("export", "write an upstream in another format", "export merged --output out/")
    one.add_argument("upstream")
    one.add_argument("--format", default="hf", choices=FORMATS)
    one.add_argument("--output", type=Path, required=True)
    one = add("cache", "features on disk: list or clear them", "cache\n  benchmark.py cache clear "
              "hubert_demo")  # fmt: skip
    one.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    one.add_argument("upstream", nargs="?", help="only this name or fingerprint")
    for one in commands.choices.values():
        one.add_argument("--results", type=Path, default=Path("results"),
                         help="where results, caches and built upstreams live")  # fmt: skip
    return top


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def tasks(args: argparse.Namespace) -> list[Prepared]:
    """The chosen tasks of the suite with their corpora read."""
    from downstream import recipe
    from downstream.run.cell import prepare

    suite, overrides = recipe.suite(args.suite), recipe.overrides(args.set)
    chosen = args.downstream.split(",") if args.downstream else list(suite)
    for name in chosen:
        if name not in suite:
            raise UserError(f"unknown task {name!r} in suite {args.suite}{near_miss(name, suite)}")
    recipes = [recipe.load(suite[name], overrides) for name in chosen]
    return [prepare(one, args.results) for one in recipes]


def settings(args: argparse.Namespace) -> Settings:
    """Device, processes and budgets; a results folder that cannot be written is found out now."""
    import torch

    from downstream.run.schedule import Settings

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device}: cannot be used ({str(error).splitlines()[0]})"
        ) from None
    writable(args.results)
    each = (os.cpu_count() or 1) if device == "cpu" else max(1, torch.cuda.device_count())
    budgets = (args.cache_gb, args.batch_seconds)
    return Settings(args.results, args.workers or each, device, *budgets, args.features)


def writable(folder: Path) -> None:
    """Raise UserError now if a folder cannot be written, not after hours."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def run(args: argparse.Namespace) -> None:
    """Score upstreams on tasks: build, extract once, train and test what is missing, compare."""
    from downstream.recipe import suite_folder
    from downstream.report import table
    from downstream.report.results import load as load_results
    from downstream.run import execute as jobs
    from downstream.run import schedule as survey
    from merging.requests import load, requests

    how, suite = settings(args), suite_folder(args.suite)
    if args.from_scratch:
        from merging.pretraining.pretrain import from_scratch

        os.environ["HUBERT_DEMO"] = str(from_scratch(args.results))  # workers inherit it
    prepared = tasks(args)
    upstreams, reference = requests(args.upstream, suite, args.results, how)
    reference = args.reference or reference
    work = survey.survey(upstreams, load, prepared, args.seeds, how)
    print(f"{work.kept} cells kept, {len(work.cells)} to compute")
    jobs.run_all(work, load, how)
    everything = load_results(args.results)
    scored = {(one.name, one.fingerprint) for one in work.identities}
    revisions = {task.revision for task in prepared}
    mine = [
        r for r in everything
        if (r.cell.upstream, r.cell.fingerprint) in scored and r.cell.recipe in revisions
    ]  # fmt: skip
    print(table.show(table.summary(mine, suite.name, reference)))
    written = table.write(args.results, everything, reference)
    print(f"written: {', '.join(map(str, written))}")


def plan(args: argparse.Namespace) -> None:
    """What `run` with the same flags would keep, compute and cost. Builds nothing."""
    from downstream.recipe import suite_folder
    from downstream.run.estimate import describe
    from merging.requests import load, requests, unbuilt

    how, suite = settings(args), suite_folder(args.suite)
    upstreams, _ = requests(args.upstream, suite, args.results)
    waiting = {one.spec: why for one in upstreams if (why := unbuilt(one, args.results))}
    print(describe(upstreams, waiting, load, tasks(args), args.seeds, how))


def compare(args: argparse.Namespace) -> None:
    """Two upstreams task by task."""
    from downstream.report import results, table

    print(table.render(table.compare(args.a, args.b, results.load(args.results)), args.format))


def list_(args: argparse.Namespace) -> None:
    """Names with a line each."""
    from downstream import base, recipe
    from downstream.tasks import heads
    from merging.methods import dense as methods
    from upstream import resolve  # noqa: F401 - registers what the hub has
    from upstream.base import UPSTREAMS

    if args.what == "suites":
        rows = [(path.name, ", ".join(recipe.suite(path.name))) for path in recipe.suites()]
    else:
        registries: dict[str, Registry[Any]] = {
            "upstreams": UPSTREAMS, "tasks": base.TASKS, "corpora": base.CORPORA,
            "heads": heads.HEADS, "methods": methods.METHODS,
        }  # fmt: skip
        registry = registries[args.what]
        rows = [(name, registry.about(name)) for name in registry]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {about}" for name, about in rows))


def describe(args: argparse.Namespace) -> None:
    """Layers, parameters, fingerprint, licence, source."""
    from downstream.recipe import suite_folder
    from merging.requests import load, request

    found = load(request(args.upstream, suite_folder("demo"), args.results))
    facts = {
        "upstream": args.upstream,
        "hidden states": f"{found.num_layers} of {found.dim} values",
        "frame": f"every {found.stride} samples ({1000 * found.stride / found.sample_rate:g} ms)",
        "parameters": f"{sum(p.numel() for p in found.parameters()):,}",
        "fingerprint": found.fingerprint(),
        "licence": found.licence or "not stated",
        "source": found.source or "not stated",
    }
    print("\n".join(f"{key:<14} {value}" for key, value in facts.items()))
    place = Path(found.source)
    merged = (place.parent / "merge.json").is_file()  # a model.pt with its card beside it
    card = (place.parent if merged else place) / "README.md"
    if card.is_file():
        print(f"\n{card.read_text()}")


def check(args: argparse.Namespace) -> int:
    """Promises of an upstream, kept or broken; or whether a recipe and its corpus can be used."""
    if args.recipe:
        from downstream import recipe
        from downstream.run import cell as evaluate

        prepared = evaluate.prepare(recipe.load(args.recipe), args.results)
        for fold, split in prepared.splits.items():
            print(fold or "corpus", {part: len(indices) for part, indices in split.items()})
        return 0
    from downstream.recipe import suite_folder
    from merging.requests import load, request
    from upstream.check import check as promises

    rows = promises(load(request(args.upstream, suite_folder("demo"), args.results)))
    for row in rows:
        print(f"{'kept  ' if row.kept else 'BROKEN'}  {row.name:<28} {row.evidence}")
    return 0 if all(row.kept for row in rows) else 1


def finetune(args: argparse.Namespace) -> None:
    """Stage 1."""
    from merging.tuning.finetune import build_tuned

    writable(args.output or args.results)
    print(build_tuned(args.recipe, args.results, args.output))


def merge(args: argparse.Namespace) -> None:
    """Stage 2, written to a folder."""
    from downstream.recipe import overrides
    from merging.merged import write
    from merging.recipe import load_recipe, placed, recipe_of

    writable(args.output if args.format == "hf" else args.output.parent)
    given = overrides(args.set)
    if args.recipe:
        method = {"method": args.method} if args.method else {}
        recipe = load_recipe(args.recipe, placed({**given, **method}))
    elif args.base and args.tuned:
        recipe = recipe_of(args.base, args.tuned, args.method, given)
    else:
        raise UserError("merge: give a recipe, or --base and --tuned")
    place = args.recipe or Path()
    print("\n".join(write(recipe, place, args.output, args.results, args.format).lines()))


def export(args: argparse.Namespace) -> None:
    """An encoder in another format."""
    from downstream.recipe import suite_folder
    from merging import requests as names

    writable(args.output if args.format == "hf" else args.output.parent)
    one = names.request(args.upstream, suite_folder("demo"), args.results)
    print(names.export(one, args.format, args.output))


def cache(args: argparse.Namespace) -> None:
    """What the cache of features holds, least recently used first, or clear it."""
    from datetime import datetime

    from upstream.features.store import Store

    store = Store(args.results / "cache")
    entries = store.entries()
    known = {name for entry in entries for name in (entry.name, entry.fingerprint)}
    if args.upstream and args.upstream not in known:
        raise UserError(f"cache: nothing of {args.upstream!r}{near_miss(args.upstream, known)}")
    chosen = [e for e in entries if args.upstream in (None, e.name, e.fingerprint)]
    for entry in chosen:
        cleared = ""
        if args.action == "clear":
            cleared = "cleared" if store.remove(entry) else "kept: in use by another process"
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        line = (
            f"{entry.fingerprint}  {entry.kind:<8} {entry.clips:>7} utterances "
            f"{entry.hours:>8.2f} h {entry.gigabytes:>8.3f} GB  {used}  {entry.name}  {cleared}"
        )
        print(line.rstrip())
    print(f"{sum(entry.gigabytes for entry in chosen):.3f} GB in {store.root}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line and exit code 2, an interruption 130."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["run", *argv]
    args = parser().parse_args(argv)
    try:
        command = globals()["list_" if args.command == "list" else args.command]
        return int(command(args) or 0)
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
