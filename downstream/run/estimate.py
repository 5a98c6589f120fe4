"""What a run would do and cost, measured on this machine, before it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from downstream.report.results import write_atomic
from downstream.run import cell as evaluate
from downstream.run import schedule as survey
from downstream.run.cell import Identity, Prepared
from downstream.run.schedule import Load, Request, Settings
from downstream.tasks.heads import HEADS
from upstream.base import SAMPLE_RATE, Upstream
from upstream.features import extract as cache
from upstream.features.extract import Kind

PROBE_SECONDS = 4.0
CNN_SHARE = 0.38  # of a pass that the CNN takes (HuBERT Base); what cached outputs save


def describe(
    requests: Sequence[Request],
    waiting: Mapping[str, str],
    load: Load,
    tasks: Sequence[Prepared],
    seeds: int | None,
    settings: Settings,
) -> str:
    """A table of cells, features and time; `waiting` names the upstreams still to be built."""
    names = max([20, *(len(one.spec) for one in requests)])
    columns = f"{'task':<8} {'cells':>13} {'audio':>9}  {'features':<22} {'time':>8}"
    lines = [f"{'upstream':<{names}} {columns}"]
    speeds = Speeds(settings)
    total, disk = 0.0, 0
    for request in requests:
        if request.spec in waiting:
            lines.append(f"{request.spec:<{names}} first built: {waiting[request.spec]}")
            continue
        upstream = load(request).to(settings.device)
        print_ = upstream.fingerprint()
        identity = Identity(request.spec, print_, upstream.source)
        counts = [seeds or task.recipe.train.seeds for task in tasks]
        left = [
            len(evaluate.missing(identity, task, count, settings.results))
            for task, count in zip(tasks, counts)
        ]
        unfinished = [task for task, n in zip(tasks, left) if n]
        needs = survey.needed(upstream, print_, unfinished, settings)
        kinds = dict(zip((task.recipe.name for task in unfinished), needs.kinds))
        passes = dict(needs.missing)
        disk += needs.bytes
        for task, count, n in zip(tasks, counts, left):
            kind = kinds.get(task.recipe.name)
            where, seconds = "", 0.0
            if n:
                speed = speeds.encoder(upstream, print_)
                # the first task of a kind makes its pass
                own = passes.pop(kind, []) if kind else []
                seconds = sum(clip.seconds for clip in own) / speed
                seconds += n * _cell_seconds(upstream, print_, task, kind, speed, speeds)
                where = _where(upstream, task, kind, bool(own))
            total += seconds
            cells = f"{count - n} kept, {n}" if n else f"{count} kept"
            row = f"{task.recipe.name:<8} {cells:>13} {task.seconds / 3600:>7.2f} h  {where:<22}"
            lines.append(f"{request.spec:<{names}} {row} {_clock(seconds):>8}")
    lines.append(
        f"about {_clock(total / settings.workers)} in {settings.workers} processes, "
        f"{disk / 1e9:.2f} GB of features to write (limit --cache-gb {settings.cache_gb:g})"
    )
    return "\n".join(lines)


def _where(upstream: Upstream, task: Prepared, kind: Kind | None, passed: bool) -> str:
    """Where a task's features come from, in the table's words."""
    if task.kind == "mean":
        return "means" if passed else "means, there"
    if kind == task.kind:
        size = f"{cache.bytes_of(upstream, kind, task.seconds) / 1e9:.2f} GB"
        return f"{kind} {size}" if passed else f"{kind} {size}, there"
    return "recomputed from CNN" if kind == "cnn" else "recomputed"


def _cell_seconds(
    upstream: Upstream,
    fingerprint: str,
    task: Prepared,
    kind: Kind | None,
    speed: float,
    speeds: Speeds,
) -> float:
    """Training one seed (all folds), recomputing frames where they are not kept."""
    train = task.recipe.train
    seconds = len(task.splits) * train.steps * speeds.step(upstream, fingerprint, task)
    if kind != task.kind:
        micro = len(task.splits) * train.steps * train.accumulate * train.batch
        again = micro * task.seconds / len(task.clips) / speed
        seconds += again * (1 - CNN_SHARE if kind == "cnn" else 1)
    return seconds


class Speeds:
    """This machine's speeds, measured once and remembered beside the cache."""

    def __init__(self, settings: Settings) -> None:
        self.path: Path = settings.store.root / "speeds.json"
        self.device = settings.device
        try:
            self.known: dict[str, float] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.known = {}

    def _remembered(self, name: str, measure: Callable[[], float]) -> float:
        name = f"{name} {self.device} {torch.get_num_threads()}"
        if name not in self.known:
            self.known[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(self.known, indent=1) + "\n")
        return self.known[name]

    def encoder(self, upstream: Upstream, fingerprint: str) -> float:
        """Seconds of audio that pass in one second."""

        def measure() -> float:
            wavs = [torch.randn(int(PROBE_SECONDS * SAMPLE_RATE)) * 0.1 for _ in range(2)]
            cache.forward(upstream, wavs[:1])
            begun = time.monotonic()
            cache.forward(upstream, wavs)
            return len(wavs) * PROBE_SECONDS / (time.monotonic() - begun)

        return self._remembered(f"encoder {fingerprint}", measure)

    def step(self, upstream: Upstream, fingerprint: str, task: Prepared) -> float:
        """Seconds of one training step of all learning rates' heads, on random features."""
        recipe, kind = task.recipe, task.recipe.kind_of_task()

        def measure() -> float:
            labels = kind.labels(recipe.tokens, task.targets)
            head = HEADS[kind.head](upstream.num_layers, upstream.dim, labels.size, **recipe.head)
            frames = max(1, int(task.seconds / len(task.clips) * SAMPLE_RATE / upstream.stride))
            middle = (frames,) if kind.reduce == "frames" else ()
            x = torch.randn(upstream.num_layers, recipe.train.batch, *middle, upstream.dim)
            lens = torch.full((recipe.train.batch,), frames)
            targets = [labels.encode(task.targets[0])] * recipe.train.batch
            times = []
            for _ in range(3):
                begun = time.monotonic()
                head.loss(head(x, lens), lens, targets).backward()
                times.append(time.monotonic() - begun)
            return min(times) * recipe.train.accumulate * len(recipe.train.lr)

        return self._remembered(f"step {fingerprint} {task.revision}", measure)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
