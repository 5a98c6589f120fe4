"""Many cells: which are kept, which are missing, and computing those in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from downstream import evaluate
from downstream.evaluate import Identity, Prepared
from downstream.metrics import METRICS
from upstream import cache
from upstream.base import Upstream
from upstream.cache import Clip, Features, Reduce
from upstream.errors import UserError
from upstream.progress import progress, share_terminal


class Request(NamedTuple):
    """An upstream to score: its name on the command line and in the tables, and loader options."""

    spec: str
    options: dict[str, Any]


Load = Callable[[Request], Upstream]


@dataclass(frozen=True)
class Settings:
    """How cells are computed; nothing here changes a score."""

    results: Path
    workers: int
    device: str
    cache_gb: float = 20.0
    batch_seconds: float = 32.0


class Extraction(NamedTuple):
    """One pass of one upstream over one list of clips, for every task that shares the list."""

    request: Request
    place: Path
    clips: list[Clip]
    reduces: list[Reduce]


class Job(NamedTuple):
    """One missing cell."""

    request: Request
    identity: Identity
    prepared: Prepared
    seed: int


class Work(NamedTuple):
    """What a run has to do."""

    identities: list[Identity]
    kept: int
    passes: list[Extraction]
    cells: list[Job]


def survey(
    requests: Sequence[Request],
    load: Load,
    tasks: Sequence[Prepared],
    seeds: int | None,
    settings: Settings,
) -> Work:
    """Load (and so build) every upstream and find its missing passes and cells."""
    identities: list[Identity] = []
    kept, passes, cells = 0, [], []
    for request in requests:
        upstream = load(request)
        identity = Identity(request.spec, upstream.fingerprint(), upstream.source)
        identities.append(identity)
        unfinished = []
        for prepared in tasks:
            count = seeds or prepared.recipe.train.seeds
            missing = evaluate.missing(identity, prepared, count, settings.results)
            kept += count - len(missing)
            cells += [Job(request, identity, prepared, seed) for seed in missing]
            unfinished += [prepared] if missing else []
        passes += extractions(request, upstream, identity.fingerprint, unfinished, settings)
    # the long ones first, so that no process waits for the last
    cells.sort(key=lambda job: job.prepared.recipe.kind_of_task().reduce != "frames")
    return Work(identities, kept, passes, cells)


def extractions(
    request: Request,
    upstream: Upstream,
    fingerprint: str,
    tasks: Sequence[Prepared],
    settings: Settings,
) -> list[Extraction]:
    """The passes still to be made for these tasks; frames that do not fit are not cached."""
    passes: dict[Path, Extraction] = {}
    for prepared in tasks:
        reduce = prepared.recipe.kind_of_task().reduce
        place = prepared.place(settings.results, fingerprint)
        if cache.complete(prepared.clips, reduce, place):
            continue
        if reduce == "frames" and not fits(upstream, prepared, settings):
            continue
        one = passes.setdefault(place, Extraction(request, place, prepared.clips, []))
        if reduce not in one.reduces:
            one.reduces.append(reduce)
    return list(passes.values())


def fits(upstream: Upstream, prepared: Prepared, settings: Settings) -> bool:
    """Whether the frame cache of a task fits the budget and the disk."""
    needed = cache.gigabytes(upstream, prepared.clips)
    return needed <= min(settings.cache_gb, 0.9 * cache.free_gigabytes(settings.results))


def extract(load: Load, job: Extraction, settings: Settings) -> str:
    """Make one pass. Runs in a worker."""
    upstream = load(job.request).to(settings.device)
    what = f"{job.request.spec}: features of {len(job.clips)} utterances"
    cache.extract(upstream, job.clips, job.reduces, job.place, what, settings.batch_seconds)
    return what


def compute(load: Load, job: Job, settings: Settings) -> str:
    """Compute one cell. Runs in a worker; the upstream is only needed without a cache."""
    reduce = job.prepared.recipe.kind_of_task().reduce
    place = job.prepared.place(settings.results, job.identity.fingerprint)
    features: Features
    if cache.complete(job.prepared.clips, reduce, place):
        features = cache.opened(job.prepared.clips, reduce, place)
    else:
        features = cache.Recomputed(load(job.request).to(settings.device), job.prepared.clips)
    args = (job.identity, job.prepared, job.seed, features, settings.results, settings.device)
    result = evaluate.run(*args)
    published = job.prepared.recipe.expect.get(job.request.spec.split(":")[0])
    return (
        f"{job.identity.name}: {job.prepared.recipe.name} seed {job.seed}: "
        f"{METRICS[result.metric].label} {result.score:.2f} ({result.seconds:.0f} s)"
        + (f"; published: {published}" if published is not None else "")
        + "".join(f"; {warning}" for warning in result.warnings[:1])
    )


def run_all(work: Work, load: Load, settings: Settings) -> None:
    """All passes, then all cells, here or in `workers` processes; prints a line for each.

    The first error stops the rest. Raises UserError if a worker is killed.
    """
    phases: list[tuple[Callable[..., str], Sequence[Any], str]] = [
        (extract, work.passes, "passes"),
        (compute, work.cells, "cells"),
    ]
    count = min(settings.workers, max(len(work.passes), len(work.cells)))
    if count <= 1:
        for function, jobs, what in phases:
            for job in progress(jobs, what):
                tqdm.write(function(load, job, settings))
        return
    threads = max(1, (os.cpu_count() or 1) // count)
    context = multiprocessing.get_context("spawn")
    worker = (threads, context.Value("i", 0), context.RLock())
    with ProcessPoolExecutor(count, context, _start_worker, worker) as pool:
        try:
            for function, jobs, what in phases:
                futures = [pool.submit(function, load, job, settings) for job in jobs]
                for future in progress(as_completed(futures), what, len(futures)):
                    tqdm.write(future.result())
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for memory; the same command goes on, "
                "with --workers 1 or a smaller --batch-seconds it needs less"
            ) from error
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(threads: int, started: Any, lock: Any) -> None:
    """Share cores and terminal, leave Ctrl-C to the parent, and never outlive it (kill -9)."""
    torch.set_num_threads(threads)
    share_terminal(started, lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
