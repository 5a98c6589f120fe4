"""What a run would do and cost, measured on this machine, before it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from downstream import evaluate, jobs
from downstream.evaluate import Identity, Prepared
from downstream.heads import HEADS
from downstream.jobs import Load, Request, Settings
from upstream import cache
from upstream.base import SAMPLE_RATE, Upstream
from upstream.cache import forward

PROBE_SECONDS = 4.0


def describe(
    requests: Sequence[Request],
    waiting: Mapping[str, str],
    load: Load,
    tasks: Sequence[Prepared],
    seeds: int | None,
    settings: Settings,
) -> str:
    """A table of cells, passes, cache and time; `waiting` names the upstreams still to be built."""
    lines = [
        f"{'upstream':<20} {'task':<8} {'cells':>12} {'audio':>8} {'features':>18} {'time':>8}"
    ]
    total = 0.0
    for request in requests:
        if request.spec in waiting:
            lines.append(f"{request.spec:<20} first built: {waiting[request.spec]}")
            continue
        upstream = load(request).to(settings.device)
        identity = Identity(request.spec, upstream.fingerprint(), upstream.source)
        speed = _encoder_speed(upstream)
        passes: set[Path] = set()
        for task in tasks:
            count = seeds or task.recipe.train.seeds
            left = len(evaluate.missing(identity, task, count, settings.results))
            hours, where, seconds = _cost(upstream, identity, task, left, speed, passes, settings)
            total += seconds
            cells = f"{count - left} kept, {left}" if left else f"{count} kept"
            row = (
                f"{request.spec:<20} {task.recipe.name:<8} {cells:>12} {hours:>6.2f} h {where:>18}"
            )
            lines.append(f"{row} {_clock(seconds):>8}")
    lines.append(f"about {_clock(total / settings.workers)} in {settings.workers} processes")
    return "\n".join(lines)


def _cost(
    upstream: Upstream,
    identity: Identity,
    task: Prepared,
    left: int,
    speed: float,
    passes: set[Path],
    settings: Settings,
) -> tuple[float, str, float]:
    """Hours of audio, where its features are, and the seconds that `left` cells take."""
    length = sum(map(cache.length, task.clips))
    hours = length / 3600
    if not left:
        return hours, "", 0.0
    reduce = task.recipe.kind_of_task().reduce
    place = task.place(settings.results, identity.fingerprint)
    folds = len(task.splits)
    heads = left * folds * task.recipe.train.steps * _step_seconds(upstream, task, length)
    if cache.complete(task.clips, reduce, place):
        return hours, f"{reduce} cached", heads
    if reduce == "frames" and not jobs.fits(upstream, task, settings):
        micro = task.recipe.train.steps * task.recipe.train.accumulate * task.recipe.train.batch
        again = left * folds * micro * length / len(task.clips) / speed
        return hours, "recomputed", heads + again
    size = cache.gigabytes(upstream, task.clips) if reduce == "frames" else 0.0
    shared = place in passes
    passes.add(place)
    where = "same pass" if shared else f"{reduce} {size:.2f} GB" if size else "means"
    return hours, where, heads + (0.0 if shared else length / speed)


def _encoder_speed(upstream: Upstream) -> float:
    """Seconds of audio per second, measured."""
    wavs = [torch.randn(int(PROBE_SECONDS * SAMPLE_RATE)) * 0.1 for _ in range(2)]
    forward(upstream, wavs[:1])
    begun = time.monotonic()
    forward(upstream, wavs)
    return len(wavs) * PROBE_SECONDS / (time.monotonic() - begun)


def _step_seconds(upstream: Upstream, task: Prepared, length: float) -> float:
    """Seconds of one training step of all learning rates' heads, measured on random features."""
    recipe = task.recipe
    kind = recipe.kind_of_task()
    labels = kind.labels(recipe.tokens, task.targets)
    head = HEADS[kind.head](upstream.num_layers, upstream.dim, labels.size, **recipe.head)
    frames = max(1, int(length / len(task.clips) * SAMPLE_RATE / upstream.stride))
    shape = (upstream.num_layers, recipe.train.batch)
    size = (*shape, upstream.dim) if kind.reduce == "mean" else (*shape, frames, upstream.dim)
    x, lens = torch.randn(size), torch.full((recipe.train.batch,), frames)
    targets = [labels.encode(task.targets[0])] * recipe.train.batch
    times = []
    for _ in range(3):
        begun = time.monotonic()
        head.loss(head(x, lens), lens, targets).backward()
        times.append(time.monotonic() - begun)
    return min(times) * recipe.train.accumulate * len(recipe.train.lr)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
