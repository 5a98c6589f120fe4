#!/usr/bin/env python
"""Speech-FT Bench: does a fine-tuned and merged speech encoder generalise, or did it forget?"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

import argparse
import importlib
import importlib.util
import itertools
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def require_own_packages() -> None:
    """End with one line if a package of another project would be imported in place of ours."""
    folder = Path(__file__).resolve().parent
    for name in ("upstream", "downstream", "merging"):
        module = sys.modules.get(name)
        spec = None if module else importlib.util.find_spec(name)
        file = getattr(module, "__file__", None) or (spec.origin if spec else None)
        if file is None or Path(file).resolve().parent != folder / name:
            where = file or "nowhere"
            print(
                f"benchmark.py: the package `{name}` would be imported from {where}, not from "
                f"{folder}: another project has one of this name; remove that from PYTHONPATH or "
                f"uninstall it, or use an environment of your own",
                file=sys.stderr,
            )
            sys.exit(2)


require_own_packages()  # before any of them is imported

from upstream.checkpoints import FORMATS
from upstream.common import shipped
from upstream.common.disk import guard
from upstream.common.errors import bounded, near_miss, one_line
from upstream.common.output import unbroken
from upstream.common.stop import end_now, just_stopped, stoppable
from upstream.common.text import escaped_output

EXAMPLES = """\
examples:
  benchmark.py --upstream merged                          build what is missing, score, compare
  benchmark.py --upstream hf:my/checkpoint,fbank --suite sample
  benchmark.py --upstream merged:alpha=0.5 --downstream asr,er --seeds 3 --set train.steps=500
  benchmark.py merge --base hubert_base --tuned my/tuned --set alpha=0.5 --output merged/
The same command again keeps what is finished and goes on where it was interrupted.
"""
STOPPED = 130  # exit status
COMMANDS = {  # what each does: an example
    "run": "Score upstreams on the tasks of a suite: --upstream merged,fbank --suite demo",
    "plan": "What a run would keep, compute and cost; builds nothing: plan --upstream merged",
    "compare": "Upstreams task by task, paired: compare hubert_demo merged [finetuned ...]",
    "errors": "What A gets right and B wrong, with its audio: errors base merged --downstream sid",
    "matrix": "Ways of fine-tuning by tasks, their seeds together: matrix --suite demo",
    "report": "All results as one HTML page, and figures for a paper: report --figures figures/",
    "share": "Scores as every_eval_ever's JSON, or in a model's card: share merged --output a.md",
    "similarity": "Hidden states and weights against the first's: similarity hubert_demo merged",
    "fetch": "Download a suite's corpora, resumed and checked: fetch open --output /data/open",
    "list": "What there is, a line each: list upstreams",
    "describe": "An upstream's layers, size, fingerprint, licence, source: describe hubert_demo",
    "check": "The promises of an upstream, or a recipe: check --upstream mine.py:Mine",
    "doctor": "What is installed here and whether it works, for a bug report: doctor",
    "predict": "What trained heads say of audio: predict --upstream X --downstream sid a.wav",
    "finetune": "Stage 1, stable fine-tuning: finetune recipes/demo/finetune.yaml",
    "merge": "Stage 2, merge weights and write them: merge recipes/demo/merged.yaml --output out/",
    "export": "Write an upstream in another format: export merged --output out/",
    "cache": "Features on disk, least recently used first; list or clear: cache clear hubert_demo",
}
REPORTS = (
    "compare",
    "errors",
    "fetch",
    "matrix",
    "report",
    "share",
)  # the others need what builds upstreams
LISTS = ("upstreams", "tasks", "suites", "corpora", "heads", "methods", "published")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line with the near match."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse tells what is missing before what is misspelt: here an unknown flag is first."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        words = args if args and self._subparsers is None else ()  # else a command's parser knows
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                self.error(f"unknown option {flag}{near_miss(flag, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        choice = re.fullmatch(
            r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL
        )
        if choice:
            known = [name.strip("' ") for name in choice[3].split(",")]
            message = f"unknown {choice[1]} {choice[2]!r}{near_miss(choice[2], known)}"
        self.exit(2, f"{self.prog}: {bounded(message)} (see {self.prog} --help)\n")


def door() -> str:
    """How this program was called: benchmark.py, python -m benchmark, or speech-ft-bench."""
    name = Path(sys.argv[0]).name
    return name if name == "speech-ft-bench" else "benchmark.py"


def parser() -> argparse.ArgumentParser:
    """Every command with its flags; a call without a command is `run`."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of EXAMPLES
    top = Parser(door(), description=__doc__, formatter_class=raw,
                 epilog=EXAMPLES.replace("benchmark.py", door()))  # fmt: skip
    added = top.add_subparsers(metavar="COMMAND", required=True)
    commands = {}
    for name, about in COMMANDS.items():
        what, _, example = about.rpartition(": ")
        command = added.add_parser(
            name, help=about, description=what, epilog=f"example: {door()} {example}"
        )
        command.set_defaults(command=name)
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
        flag("--executor", default="local", metavar="WHERE",
             help="local (default), ray:jobs=8:num_cpus=4, or slurm:jobs=16:partition=gpu with "
             "options of submitit and sbatch (slurm:cluster=local tries it here)")  # fmt: skip
        flag("--device", help="cpu or cuda (default: cuda if there is one)")
        flag("--cache-gb", type=_number(float, 0), default=20.0,
             help="disk for features; least recently used go first")  # fmt: skip
        flag("--features", choices=("auto", "cache", "recompute"), default="auto",
             help="keep frames on disk or pass the audio again at every step "
             "(default: keep what fits --cache-gb; on a GPU, if reading it is faster)")  # fmt: skip
        flag("--batch-seconds", type=_number(float, 1),
             help="audio per encoder batch (default: 32; on a GPU 600, or what fits)")  # fmt: skip
        flag("--reference", help="the upstream that differences are taken from")
    for name in ("run", "matrix", "report"):
        commands[name].add_argument(
            "--published", action="append", default=[], metavar="ROW",
            help="add published numbers where tasks are SUPERB's own: hubert-base, wavlm-* "
            "(list published)",
        )  # fmt: skip
    for name in ("run", "compare", "matrix", "report"):
        commands[name].add_argument(
            "--margin", metavar="SIZE",
            help="what a task may lose and is kept: points (1.5), per cent of the reference's "
            "errors (5%%, the default), or a task's own (er=2,asr=10%%)",
        )  # fmt: skip
    flag = commands["run"].add_argument
    flag("--from-scratch", action="store_true",
         help="repeat hubert_demo's pre-training first (hours)")  # fmt: skip
    flag = commands["compare"].add_argument
    what = "an upstream, NAME@FINGERPRINT, a folder of results, or published:ROW (list published)"
    flag("a", help=what)
    flag("b", help=what)
    flag("more", nargs="*", help="further ones: then letters say which cannot be told apart")
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
    flag = commands["share"].add_argument
    flag("upstream")
    flag("--suite", help="only this one (default: all)")
    flag("--format", choices=("every_eval_ever", "model-index"),
         help="default: model-index for an output FILE.md, else every_eval_ever")  # fmt: skip
    flag("--organization", default="not stated", help="who measured (every_eval_ever asks)")
    flag("--output", type=Path, help="a new JSON file, or a card whose front matter is to say it")
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
        set=[], workers=None, cache_gb=20.0, batch_seconds=32.0, features="auto", executor="local"
    )
    flag = commands["matrix"].add_argument
    flag("--suite", default="demo", help="of the results to show (default: demo)")
    flag("--base", help="the pre-trained upstream (default: what most others grew from)")
    flag("--format", default="text", choices=("text", "md", "csv", "json", "latex"))
    flag = commands["fetch"].add_argument
    flag("suite")
    flag("--output", type=Path, help="the folder of all corpora (default: the suite's variable)")
    commands["list"].add_argument("what", choices=LISTS)
    commands["list"].add_argument("name", nargs="?", help="what one of them takes: its options and "
                                  "what they mean, e.g. list corpora manifest")  # fmt: skip
    commands["list"].set_defaults(command="list_")  # the function's name
    commands["describe"].add_argument("upstream")
    flag = commands["predict"].add_argument
    flag("files", nargs="+", metavar="FILE", help="audio files")
    flag("--upstream", required=True)
    flag("--downstream", required=True, help="a task that this upstream was scored on")
    flag("--suite", default="demo", help="the suite of the task (default: demo)")
    flag("--set", action="append", default=[], metavar="KEY=VALUE",
         help="as in the run, where the task's recipe names Python of your own")  # fmt: skip
    either = commands["check"].add_mutually_exclusive_group()  # neither: doctor
    either.add_argument("--upstream")
    either.add_argument("--recipe", type=_recipe,
                        help="of a task, or a folder of them: prints what its corpus is, split by "
                        "split; `list corpora manifest` tells a table's columns")  # fmt: skip
    commands["check"].add_argument("--format", default="text", choices=("text", "json"))
    flag = commands["finetune"].add_argument
    flag("recipe", type=_recipe)
    flag("--set", action="append", default=[], metavar="KEY=VALUE",
         help="override a key of the recipe, e.g. seed=1")  # fmt: skip
    flag("--output", type=Path, help="where to write it (default: results/upstreams)")
    flag = commands["merge"].add_argument
    flag("recipe", type=_recipe, nargs="?")
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


def _recipe(text: str) -> Path:
    """The path of a recipe; one that ships with the project is found from any folder."""
    return shipped(Path(text))


def main(argv: list[str] | None = None) -> int:
    """Run a command; a mistake is one line and exit code 2, an interruption 130."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["run", *argv]
    args = parser().parse_args(argv)
    guard(args.results)
    with unbroken():
        return _call(args)


def _stopped() -> int:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    return STOPPED


def _call(args: argparse.Namespace) -> int:
    try:
        if args.command == "check" and not (args.upstream or args.recipe):
            args.command = "doctor"
        room = "downstream" if args.command in REPORTS else "merging"
        module = "upstream.doctor" if args.command == "doctor" else f"{room}.commands"
        call = getattr(importlib.import_module(module), args.command)
        with escaped_output():
            return int(call(args) or 0)
    except KeyboardInterrupt:
        return _stopped()
    except Exception as error:
        if just_stopped():
            return _stopped()
        if args.debug:
            traceback.print_exc()
        line = f"benchmark.py: {one_line(error, 'what the same command prints with --debug')}"
        print(line.replace("benchmark.py", door()), file=sys.stderr)
        return 2


def console() -> NoReturn:
    """The command `speech-ft-bench`: `main` on the command line, then the exit status."""
    with stoppable():
        try:
            status = main()
        except KeyboardInterrupt:  # before a command began
            status = _stopped()
    if status == STOPPED:
        end_now(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
