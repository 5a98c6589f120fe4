"""Commands that need no fine-tuning: comparisons of what was scored, and what they read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from upstream.common import disk
from upstream.common.errors import UserError, near_miss, one_line

if TYPE_CHECKING:
    from downstream.recipe import Recipe
    from downstream.report.verdicts import Margins
    from downstream.run.prepare import Prepared
    from downstream.run.schedule import RunOptions


def tasks(args: argparse.Namespace) -> list[Prepared]:
    """The chosen tasks of the suite with their corpora read."""
    from downstream.run.prepare import prepare

    return [prepare(task, args.results) for task in recipes(args)]


def recipes(args: argparse.Namespace) -> list[Recipe]:
    """The chosen tasks of the suite; no corpus is read. Raises UserError for a wrong name."""
    from downstream import recipe

    suite, overrides = recipe.suite(args.suite), recipe.overrides(args.set)
    chosen = args.downstream.split(",") if args.downstream is not None else list(suite)
    for name in chosen:
        if name not in suite:
            raise UserError(f"unknown task {name!r} in suite {args.suite}{near_miss(name, suite)}")
        if chosen.count(name) > 1:
            raise UserError(f"--downstream names {name} twice")
    return [recipe.load(suite[name], overrides) for name in chosen]


def settings(args: argparse.Namespace) -> RunOptions:
    """Device, processes and budgets; a results folder that cannot be written is found out now."""
    import torch

    from downstream.run import cluster
    from downstream.run.schedule import RunOptions

    device, wanted = args.device, cluster.asked(args.executor)
    if wanted.name == cluster.LOCAL:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        _usable(device)
        workers = cores = os.cpu_count() or 1
        if device != "cpu":  # several share one GPU: while one decodes audio, another computes
            gpus = max(1, torch.cuda.device_count())
            workers = gpus * max(1, min(4, cores // gpus))
    else:  # this machine may have no GPU
        if args.workers:
            raise UserError(f"--workers is for this machine; write --executor {wanted.name}:jobs=N")
        cluster.engine_of(wanted)
        if device is None:
            device = "cuda" if wanted.gpus else "cpu"
        workers = wanted.jobs
    writable(args.results)
    budgets = (args.cache_gb, args.batch_seconds or (32.0 if device == "cpu" else 600.0))
    how = (args.workers or workers, device, *budgets, args.features, args.executor)
    return RunOptions(args.results, *how)


def _usable(device: str) -> None:
    """Raises UserError if there is no such device."""
    import torch

    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # torch has a kind of its own for each way to be no device
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {device!r}: cannot be used ({reason:.200})") from error


def writable(folder: Path) -> None:
    """Raise UserError now if a folder cannot be written, not after hours."""
    with disk.writing(folder), disk.removed(folder) as part:
        part.touch()


def margins(text: str | None, tasks: Collection[str]) -> Margins:
    """What `--margin` says; tasks: that there are. Raises UserError."""
    from downstream.report.verdicts import read_margins

    return {} if text is None else read_margins(text, tasks)


def compare(args: argparse.Namespace) -> None:
    """Upstreams task by task, paired: compare hubert_demo merged [finetuned ...]"""
    from downstream.report import compare, published, results, several, table, unlike

    known, names = results.load_results(args.results), [args.a, args.b, *args.more]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"compare: {name} is named twice")
        if Path(name).is_dir():  # results; of a folder of weights they are in --results
            known += results.results_in(Path(name))
    allowed = margins(args.margin, {r.cell.task for r in known})
    measured = [name for name in names if not name.startswith(published.PREFIX)]
    notes = unlike.circumstances(measured, known)
    if args.more:
        print(several.render(names, several.several(names, known, allowed), notes, args.format))
        return
    if len(measured) == 2:
        found = compare.compare(args.a, args.b, known, allowed)
    else:
        found = published.compare(args.a, args.b, known)
    print(table.render(found._replace(notes=notes), args.format))


def errors(args: argparse.Namespace) -> None:
    """What A gets right and B wrong, with its audio: errors hubert_demo merged --downstream sid"""
    from downstream.report.results import load_results
    from downstream.report.wrong import compared, render

    suite = Path(args.suite).name
    rows = compared(args.a, args.b, args.downstream, suite, load_results(args.results))
    paths = {}
    try:
        prepared, *_ = tasks(args)
        paths = {item.id: clip.path for item, clip in zip(prepared.items, prepared.clips)}
    except UserError as error:  # results outlive their corpora
        print(f"benchmark.py: no paths of audio: {one_line(error, '')}", file=sys.stderr)
    rows = [row._replace(path=paths.get(row.id, "")) for row in rows]
    print(render(args.a, args.b, rows, args.limit, args.format))


def fetch(args: argparse.Namespace) -> None:
    """Download a suite's corpora, resumed and checked: fetch open --output /data/open"""
    from downstream.fetch import fetch

    fetch(args.suite, args.output)


def report(args: argparse.Namespace) -> None:
    """All results as one HTML page, and figures for a paper: report --figures figures/"""
    from downstream.report import page, published, results
    from upstream.similarity import similarities

    output = args.output or args.results / page.NAME
    references = [args.reference] if args.reference else []
    found = results.load_results(args.results), similarities(args.results)
    numbers = published.chosen(args.published)
    allowed = margins(args.margin, {r.cell.task for r in found[0]})
    written = page.write(output, *found, references, args.suite, args.figures, numbers, allowed)
    print(*written, sep="\n")


def matrix(args: argparse.Namespace) -> None:
    """Ways of fine-tuning by tasks, their seeds together: matrix --suite demo"""
    from downstream.report import published
    from downstream.report.matrix import matrix
    from downstream.report.matrix_view import render
    from downstream.report.pool import Pool
    from downstream.report.results import load_results

    suite, results = Path(args.suite).name, load_results(args.results)
    numbers = published.chosen(args.published)
    pool = Pool(results, margins(args.margin, {r.cell.task for r in results}))
    print(render(matrix(results, suite, args.base, numbers, pool), args.format))


def share(args: argparse.Namespace) -> None:
    """Scores as every_eval_ever's JSON, or in a model's card: share merged --output card.md"""
    from downstream.report import share
    from downstream.report.results import load_results

    found = share.shared(args.upstream, load_results(args.results), args.suite)
    card = args.output is not None and args.output.suffix == ".md"
    form = args.format or ("model-index" if card else "every_eval_ever")
    if form == "model-index":
        import yaml

        index = share.model_index(args.upstream, found)
        if args.output:
            share.write_card(args.output, index)
        else:
            print(yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True))
    else:
        record = share.every_eval_ever(args.upstream, found, args.organization)
        text = share.as_json(record)
        if args.output:
            disk.write(args.output, text + "\n")
        else:
            print(text)
    if args.output:
        print(args.output)
