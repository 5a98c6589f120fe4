"""What a run would do and cost, measured on this machine, before it is done."""

from __future__ import annotations

import timeit
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from downstream.report.compare import detectable
from downstream.report.groups import TaskVersion
from downstream.report.results import load_results
from downstream.run import cell as cells
from downstream.run.cell import Identity
from downstream.run.cluster import LOCAL, asked
from downstream.run.prepare import Prepared
from downstream.run.schedule import Needs, Request, RunOptions, needed, processes_each
from downstream.run.window import Dealt
from upstream.base import SAMPLE_RATE, Upstream
from upstream.common.progress import clock
from upstream.features.codec import Kind
from upstream.features.extract import bytes_of
from upstream.features.forward import forward

PROBE_SECONDS = 4.0
CNN_SHARE = 0.38  # of a pass that the CNN takes (HuBERT Base); what cached outputs save
TRAINING = 3.0  # a step of fine-tuning, in forward passes


class Unbuilt(NamedTuple):
    """An upstream that a plan does not build."""

    why: str  # what must be done before
    like: Request  # an upstream of its size
    runs: Sequence[tuple[Any, float]]  # its fine-tuning: which, seconds of audio in all steps


def describe(
    requests: Sequence[Request],
    unbuilt: Mapping[str, Unbuilt],
    tasks: Sequence[Prepared],
    seeds: int | None,
    options: RunOptions,
) -> str:
    """A table of cells, features and time; `unbuilt`: by name what is not there yet."""
    width = max([20, *(len(request.name) for request in requests)])
    columns = f"{'task':<8} {'cells':>13} {'audio':>9}  {'features':<22} {'time':>8}"
    lines = [f"{'upstream':<{width}} {columns}"]
    total, size, begun = 0.0, 0, list[Any]()
    device = options.device if options.executor == LOCAL else "cpu"  # here there may be no other
    for request in requests:
        waiting = unbuilt.get(request.name)
        upstream = (waiting.like if waiting else request).load().to(device)
        fingerprint = "" if waiting else upstream.fingerprint()
        identity = Identity(request.name, fingerprint, "")
        if waiting:
            audio = sum(seconds for run, seconds in waiting.runs if run not in begun)
            building = audio * TRAINING * (1 - CNN_SHARE) / _passed(upstream)
            how_long = "as above" if waiting.runs and not audio else clock(building)
            lines.append(f"{request.name:<{width}} first: {waiting.why} ({how_long})")
            begun += [run for run, _ in waiting.runs]
            # here one process's work, for which the others wait; on a cluster a job beside others
            total += building * (options.workers if options.executor == LOCAL else 1)
        counts = [task.recipe.seeds(seeds) for task in tasks]
        left = [
            len(cells.missing(identity, task, count, options.results))
            for task, count in zip(tasks, counts)
        ]
        unfinished = [task for task, missing in zip(tasks, left) if missing]
        needs = needed(upstream, fingerprint, unfinished, options)
        size += needs.bytes
        shared = _shared(unfinished, needs)
        parts = processes_each(options.workers, len(shared) * len(requests))
        for task, count, missing in zip(tasks, counts, left):
            where, seconds, number = "", 0.0, f"{count - missing} kept"
            if missing:
                kind = needs.kinds[task.revision]
                clips = needs.missing.pop(task.kind, {})  # its first task makes the pass
                if kind and kind != task.kind:
                    clips = needs.missing.pop(kind, {}) | clips
                seconds = sum(clip.seconds for clip in clips.values()) / _passed(upstream)
                evaluated = (fingerprint, task.kind) in needs.entries  # what is, is kept
                seconds += missing * _cell_seconds(upstream, task, kind, evaluated)
                where, number = _where(upstream, task, kind, bool(clips)), f"{number}, {missing}"
            total += seconds
            row = f"{task.recipe.name:<8} {number:>13} {task.seconds / 3600:>7.2f} h  {where:<22}"
            lines.append(f"{request.name:<{width}} {row} {clock(seconds):>8}")
        for group in shared.values():
            row, seconds = _passes(upstream, group, needs.kinds[group[0].revision])
            lines.append(f"{request.name:<{width}} {row}, in {parts} processes")
            total += parts * seconds
    lines.append(
        f"about {clock(total / options.workers)} in {options.workers} {_processes(options)} "
        f"({total / 3600:.2f} hours of one), {size / 1e9:.2f} GB of features to write (limit "
        f"--cache-gb {options.cache_gb:g})"
    )
    return "\n".join([*lines, _detectable(tasks, options)])


def _processes(options: RunOptions) -> str:
    """What works, in the plan's words."""
    device = "GPU" if options.device.startswith("cuda") else "CPU"
    if options.executor == LOCAL:
        return f"processes on this machine's {device}"
    name = asked(options.executor).name
    return f"{device} jobs of {name}, at this machine's speed and without waiting in its queue"


def _detectable(tasks: Sequence[Prepared], options: RunOptions) -> str:
    """How small a difference would get a verdict, as far as finished cells tell."""
    results, known = load_results(options.results), []
    for task in tasks:
        version = TaskVersion(task.recipe.suite, task.recipe.name, task.revision)
        if (points := detectable(results, version, len(tasks))) is not None:
            known.append(f"{points:.1f} ({task.recipe.name})")
    if not known:
        return "how small a difference would be found is not known before a first result"
    return f"a difference of so many points is found in 4 of 5 cases: {', '.join(known)}"


def _where(upstream: Upstream, task: Prepared, kind: Kind | None, passed: bool) -> str:
    """Where a task's features come from, in the table's words."""
    if kind != task.kind:
        window = f", {task.recipe.window:g} min" if task.recipe.window else ""
        return f"recomputed{' from CNN' * (kind == 'cnn')}{window}"
    size = f"{bytes_of(upstream, kind, task.seconds) / 1e9:.2f} GB"
    return ("means" if kind == "mean" else f"{kind} {size}") + ("" if passed else ", there")


def _shared(tasks: Sequence[Prepared], needs: Needs) -> dict[str, list[Prepared]]:
    """Tasks that one pass an epoch feeds."""
    groups: dict[str, list[Prepared]] = defaultdict(list)
    for task in tasks:
        if task.sharing and needs.kinds[task.revision] != task.kind:
            groups[task.sharing].append(task)
    return groups


def _passes(upstream: Upstream, group: Sequence[Prepared], kind: Kind | None) -> tuple[str, float]:
    """What feeds the cells of tasks that share a window, in words and in seconds."""
    task, blocks, passes = group[0], group[0].blocks, 0.0
    assert blocks  # all have the same
    for each in group:
        if train := each.recipe.train:
            epoch = len(Dealt(blocks, train.batch, 0).places)
            passes = max(passes, train.steps * train.accumulate / epoch)
    seconds = passes * blocks.seconds / _passed(upstream) * (1 - CNN_SHARE * (kind == "cnn"))
    size = bytes_of(upstream, task.kind, blocks.most) / 1e9
    names = ", ".join(task.recipe.name for task in group)
    return (
        f"{names}: {passes:.1f} passes over {blocks.seconds / 3600:.2f} h for all cells "
        f"({clock(seconds)}), {size:.2f} GB in memory"
    ), seconds


def _cell_seconds(upstream: Upstream, task: Prepared, kind: Kind | None, evaluated: bool) -> float:
    """Training one seed (all folds), recomputing frames where they are not kept.

    evaluated: those of dev and test are. Passes over a window are not counted: they are no cell's.
    """
    train = task.recipe.train
    if train is None:
        return 0.0
    steps = len(task.splits) * train.steps
    seconds = steps * _step(upstream, task)
    if kind != task.kind:
        mean = task.seconds / len(task.clips)
        audio = 0.0 if task.sharing else steps * train.accumulate * train.batch * mean
        if not evaluated:
            parts = [(len(s["dev"]), len(s["test"])) for s in task.splits.values()]
            audio += mean * sum(dev * train.steps / train.eval_every + test for dev, test in parts)
        seconds += audio / _passed(upstream) * (1 - CNN_SHARE if kind == "cnn" else 1)
    return seconds


_measured: dict[Any, float] = {}  # upstreams of one size are not timed one by one


def _passed(upstream: Upstream) -> float:
    """Seconds of audio that pass the upstream in one second."""
    size = _size(upstream)
    if size not in _measured:
        wavs = [torch.randn(int(PROBE_SECONDS * SAMPLE_RATE)) * 0.1 for _ in range(2)]
        seconds = timeit.repeat(lambda: forward(upstream, wavs), number=1, repeat=2)
        _measured[size] = len(wavs) * PROBE_SECONDS / min(seconds)
    return _measured[size]


def _step(upstream: Upstream, task: Prepared) -> float:
    """Seconds of one training step of all learning rates' heads, on random features."""
    recipe, kind = task.recipe, task.recipe.kind_of_task()
    step = (*_size(upstream), task.revision)
    train = recipe.train
    if train and step not in _measured:
        labels = task.labels(next(iter(task.splits)))
        head = recipe.new_head(upstream.num_layers, upstream.dim, labels)
        frames = max(1, int(task.seconds / len(task.clips) * SAMPLE_RATE / upstream.stride))
        middle = (frames,) if kind.features == "frames" else ()
        x = torch.randn(upstream.num_layers, train.batch, *middle, upstream.dim)
        lens = torch.full((train.batch,), frames)
        first = next(iter(task.splits.values()))["train"][0]
        targets = [labels.encode(task.targets[first])] * train.batch
        seconds = timeit.repeat(
            lambda: head.loss(head(x, lens), lens, targets).backward(), number=1, repeat=3
        )
        _measured[step] = min(seconds) * train.accumulate * len(train.lr)
    return _measured[step] if train else 0.0


def _size(upstream: Upstream) -> tuple[Any, ...]:
    """What an upstream's speed depends on."""
    parameters = sum(parameter.numel() for parameter in upstream.parameters())
    return type(upstream), upstream.num_layers, upstream.dim, upstream.stride, parameters
