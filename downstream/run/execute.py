"""Making passes and computing cells, here or in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

from downstream.run import cell as evaluate
from downstream.run.schedule import Job, Load, Pass, Request, Settings, Work
from downstream.tasks.metrics import METRICS
from upstream.base import Upstream
from upstream.common.errors import UserError
from upstream.common.progress import progress, share_terminal
from upstream.features import extract as cache
from upstream.features.extract import Features


def extract(load: Load, job: Pass, settings: Settings) -> str:
    """Make one pass. Runs in a worker."""
    cache.extract(
        _upstream(load, job.request, settings.device), job.clips, job.kinds, settings.store,
        name=job.request.spec, share_cnn=job.share_cnn, batch_seconds=settings.batch_seconds,
    )  # fmt: skip
    return ""


def compute(load: Load, job: Job, settings: Settings) -> str:
    """Compute one cell. Runs in a worker; the upstream is only needed without a cache."""
    prepared, store, print_ = job.prepared, settings.store, job.identity.fingerprint
    features: Features
    if store.missing(print_, prepared.kind, prepared.clips):
        upstream = _upstream(load, job.request, settings.device)
        features = cache.Recomputed(upstream, prepared.clips, store)
    else:
        features = store.open(print_, prepared.kind, prepared.clips)
    error = store.error(print_, prepared.clips) if prepared.kind == "int8" else None
    args = (job.identity, prepared, job.seed, features, settings.results, settings.device, error)
    result = evaluate.run(*args)
    published = prepared.recipe.expect.get(job.request.spec.split(":")[0])
    return (
        f"{job.identity.name}: {prepared.recipe.name} seed {job.seed}: "
        f"{METRICS[result.metric].label} {result.score:.2f} ({result.seconds:.0f} s)"
        + (f"; published: {published}" if published is not None else "")
        + "".join(f"; {warning}" for warning in result.warnings[:1])
    )


_last: dict[str, Upstream] = {}  # of this process: the shards of one upstream follow each other


def _upstream(load: Load, request: Request, device: str) -> Upstream:
    key = repr(request)
    if key not in _last:
        _last.clear()
        _last[key] = load(request).to(device)
    return _last[key]


def run_all(work: Work, load: Load, settings: Settings) -> None:
    """Wave by wave all passes, then all cells, here or in `workers` processes.

    The first error stops the rest. Raises UserError if a worker is killed.
    """
    most = max((max(len(wave.passes), len(wave.cells)) for wave in work.waves), default=0)
    count = min(settings.workers, most)
    if count <= 1:
        for function, jobs, what in _phases(work, settings):
            for job in progress(jobs, what):
                _say(function(load, job, settings))
        return
    threads = max(1, (os.cpu_count() or 1) // count)
    context = multiprocessing.get_context("spawn")
    worker = (threads, context.Value("i", 0), context.RLock())
    with ProcessPoolExecutor(count, context, _start_worker, worker) as pool:
        try:
            for function, jobs, what in _phases(work, settings):
                futures = [pool.submit(function, load, job, settings) for job in jobs]
                for future in progress(as_completed(futures), what, len(futures)):
                    _say(future.result())
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


def _phases(
    work: Work, settings: Settings
) -> Iterable[tuple[Callable[..., str], Sequence[Any], str]]:
    for wave in work.waves:
        for gone in settings.store.evict(wave.bytes, settings.cache_gb, wave.entries):
            tqdm.write(f"cache: {gone.name} {gone.kind} ({gone.gigabytes:.1f} GB) made room")
        yield extract, wave.passes, "passes"
        yield compute, wave.cells, "cells"


def _say(line: str) -> None:
    if line:
        tqdm.write(line)


def _start_worker(threads: int, started: Any, lock: Any) -> None:
    """Share cores, GPUs and terminal, leave Ctrl-C to the parent, never outlive it (kill -9)."""
    torch.set_num_threads(threads)
    place = share_terminal(started, lock)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
