"""Where jobs run: in this process, or in several of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from upstream.common.errors import UserError, one_line
from upstream.common.progress import hush, is_silent
from upstream.common.stop import shielded

J = TypeVar("J")
Line = str | None  # what to print of a job that is done; None: another process is at it


class Outcome(NamedTuple):
    """What became of a job."""

    line: Line
    seconds: float
    trace: str = ""  # of one that failed


# Does each job somewhere and yields it with its outcome, in whatever order they end.
Executor = Callable[[Callable[[J], Line], Sequence[J]], Iterator[tuple[J, Outcome]]]


def attempt(do: Callable[[J], Line], job: J) -> Outcome:
    """Do a job; an error is an outcome, for it may not survive the way to another process."""
    begun = time.monotonic()
    try:
        line, trace = do(job), ""
    except Exception as error:
        line, trace = one_line(error, "its traceback in errors.log"), traceback.format_exc()
    return Outcome(line, time.monotonic() - begun, trace)


@contextlib.contextmanager
def local(workers: int) -> Iterator[Executor[Any]]:
    """This machine: this process alone, or that many others. Raises UserError if one is killed.

    None of them outlives the block, whatever ends it.
    """
    if workers <= 1:
        yield lambda do, jobs: ((job, attempt(do, job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with shielded():  # the tracker of shared objects as well
        shared = (threads, context.Value("i", 0), is_silent())
    pool = ProcessPoolExecutor(workers, context, _start_worker, shared)
    with shielded():
        pool.submit(os.getpid)  # the first job starts all processes

    def execute(do: Callable[[Any], Line], jobs: Sequence[Any]) -> Iterator[tuple[Any, Outcome]]:
        futures = {pool.submit(partial(attempt, do), job): job for job in jobs}
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


def _start_worker(threads: int, started: Any, quiet: bool) -> None:
    """Share cores and GPUs, and never outlive the parent (kill -9)."""
    torch.set_num_threads(threads)
    with started.get_lock():
        started.value += 1
        place = started.value
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    hush(quiet)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
