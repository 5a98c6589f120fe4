"""Doing what is scheduled: a run is passes, then cells, in one process or in several.

Every job is claimed by a lease. What another process has claimed is left to it and asked for again
later, so that identical commands on one results folder share the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from downstream.run import cell as cells
from downstream.run.prepare import Prepared
from downstream.run.schedule import CellJob, Pass, Request, RunOptions, Work
from downstream.tasks.metrics import of_result
from upstream.base import Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress, share_terminal
from upstream.common.stop import shielded
from upstream.features.codec import Features
from upstream.features.extract import extract
from upstream.features.provide import provide

J = TypeVar("J")
Line = str | None  # what to print of a job that is done; None: another process is at it
# Does each job somewhere and yields it with its line, in whatever order they end.
Executor = Callable[[Callable[[J], Line], Sequence[J]], Iterator[tuple[J, Line]]]
PAUSE = 1.0  # seconds before asking again for what other processes have claimed


def run(work: Work, options: RunOptions) -> None:
    """Round by round all passes, then all cells. The first error stops the rest. UserError."""
    most = max((len(jobs) for part in work.rounds for jobs in (part.passes, part.cells)), default=0)
    with local(min(options.workers, most)) as executor:
        for part in work.rounds:
            for gone in options.store.evict(part.bytes, options.cache_gb, part.entries):
                tqdm.write(f"cache: {gone.name} {gone.kind} ({gone.gigabytes:.1f} GB) made room")
            _all(executor, partial(make, options=options), part.passes, "passes")
            _all(executor, partial(compute, options=options), part.cells, "cells")


def _all(executor: Executor[J], do: Callable[[J], Line], jobs: Sequence[J], what: str) -> None:
    for line in progress(_lines(executor, do, jobs), what, len(jobs)):
        if line:
            tqdm.write(line)


def _lines(executor: Executor[J], do: Callable[[J], Line], jobs: Sequence[J]) -> Iterator[str]:
    """The line of each job, here or elsewhere done."""
    while jobs:
        claimed = []
        for job, line in executor(do, jobs):
            if line is None:
                claimed.append(job)
            else:
                yield line
        if len(claimed) == len(jobs):
            time.sleep(PAUSE)
        jobs = claimed


def make(job: Pass, options: RunOptions) -> Line:
    """Make one pass, unless another process is making it."""
    name, seconds = job.request.name, options.batch_seconds
    keys = "\n".join([job.request.spec, *(clip.key for clip in job.clips)])
    claim = f"{hashlib.blake2b(keys.encode(), digest_size=8).hexdigest()}.lease"
    with disk.lease(options.store.root / "passes", wait=False, name=claim) as ours:
        if not ours:
            return None
        upstream = _upstream(job.request, options.device)
        extract(upstream, job.clips, job.kinds, options.store, name=name, batch_seconds=seconds)
        return ""


def compute(job: CellJob, options: RunOptions) -> Line:
    """Compute one cell, unless another process is computing it or has done so meanwhile."""
    prepared = _prepared(job.prepared)
    cell = cells.cell(job.identity, prepared, job.seed)
    name = f"{job.identity.name}: {prepared.recipe.name} seed {job.seed}"
    with disk.lease(cell.folder(options.results), wait=False) as ours:
        if not ours:
            return None
        if cells.done(cell, prepared, options.results):
            return f"{name}: done by another process"
        features = _features(job, prepared, options)
        where = (options.results, options.device)
        score = cells.run(job.identity, prepared, job.seed, features, *where, job.seen)
    label = of_result(score.metric, score.better).label
    line = f"{name}: {label} {score.score:.2f} ({score.seconds:.0f} s)"
    published = prepared.recipe.expect.get(job.request.name.split(":")[0])
    notes = [] if published is None else [f"published: {published}"]
    notes += [each for each in score.warnings if each not in prepared.warnings][:1]  # told before
    return "; ".join([line, *notes])


def _features(job: CellJob, prepared: Prepared, options: RunOptions) -> Features:
    """From the store, where the upstream itself is not needed, or else recomputed."""
    entry = (job.identity.fingerprint, prepared.kind, prepared.clips)
    if not options.store.missing(*entry):
        return options.store.open(*entry)
    upstream = _upstream(job.request, options.device)
    return provide(upstream, prepared.clips, prepared.kind, options.store, where="recompute")


_prepared = lru_cache(maxsize=4)(Prepared.load)  # of this process
_last: dict[str, Upstream] = {}  # of this process: the shards of one upstream follow each other


def _upstream(request: Request, device: str) -> Upstream:
    key = repr(request)
    if key not in _last:
        _last.clear()  # first, or two would be in memory
        _last[key] = request.load().to(device)
    return _last[key]


@contextlib.contextmanager
def local(workers: int) -> Iterator[Executor[Any]]:
    """This machine: this process alone, or that many others. Raises UserError if one is killed.

    None of them outlives the block, whatever ends it.
    """
    if workers <= 1:
        yield lambda do, jobs: ((job, do(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with shielded():  # the tracker of shared objects as well
        shared = (threads, context.Value("i", 0), context.RLock())
    pool = ProcessPoolExecutor(workers, context, _start_worker, shared)
    with shielded():
        pool.submit(os.getpid)  # the first job starts all processes

    def execute(do: Callable[[Any], Line], jobs: Sequence[Any]) -> Iterator[tuple[Any, Line]]:
        futures = {pool.submit(do, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield execute
        pool.shutdown()
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        # not waited for: what died with a lock in its hands would be waited for for ever
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, perhaps for memory; the same command goes on, "
                "with --workers 1 or a smaller --batch-seconds it needs less"
            ) from error
        raise


def _start_worker(threads: int, started: Any, lock: Any) -> None:
    """Share cores, GPUs and terminal, and never outlive the parent (kill -9)."""
    torch.set_num_threads(threads)
    place = share_terminal(started, lock)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
