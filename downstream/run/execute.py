"""Doing what is scheduled: a run is passes, then cells, in one process or in several.

Every job is claimed by a lease. What another process has claimed is left to it and asked for again
later, so that identical commands on one results folder share the work. A job that fails leaves the
others alone; the run ends with what failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from downstream.report.results import Score, read_cell
from downstream.run import cell as of_cell
from downstream.run import together
from downstream.run.beats import beating
from downstream.run.cluster import LOCAL, cluster
from downstream.run.executors import Executor, Line, Outcome, local
from downstream.run.live import ELSEWHERE, Job, Tally, shown
from downstream.run.prepare import Prepared
from downstream.run.schedule import CellJob, Pass, Request, RunOptions, Work
from downstream.tasks.metrics import of_result
from upstream.base import Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.features import precision
from upstream.features.codec import Features
from upstream.features.extract import extract
from upstream.features.provide import provide

J = TypeVar("J", bound=Job)
PAUSE = 1.0  # seconds before asking again for what other processes have claimed
HOPELESS = 3  # failures in a row, of more than one upstream and task: it is none of theirs
RUNNING = "running"  # folder of the processes at work


class Unfinished(UserError):
    """Some cells failed. `lines`: one for each error."""

    def __init__(self, message: str, lines: Sequence[str]) -> None:
        super().__init__(message)
        self.lines = lines


def run(work: Work, options: RunOptions) -> None:
    """Round by round all passes, then all cells.

    Raises Unfinished at the end if cells failed; UserError at once where all would.
    """
    tally = Tally(work, options.store.root / RUNNING)
    log = options.results / "errors.log"
    most = max((len(jobs) for part in work.rounds for jobs in (part.passes, part.cells)), default=0)
    if options.executor == LOCAL:
        workers = local(min(options.workers, most))
    else:
        workers = cluster(options.executor, most, options.store.root / "queue")
    with shown(tally) as tell, workers as executor:

        def each(do: Callable[..., Line], jobs: Sequence[J]) -> dict[str, str]:
            """Do all; the errors by upstream."""
            errors, row = dict[str, str](), _Row(jobs)
            for job, (line, seconds, trace) in _ended(executor, partial(do, options=options), jobs):
                line = line or ""
                tally.end(job, line, seconds, bool(trace))
                if trace:
                    note(log, job.name, trace)
                    errors[job.request.name] = line
                    tell(f"failed: {job.name}: {line}")
                elif line:
                    tell(line)
                row.add(job, line, bool(trace))
            return errors

        for part in work.rounds:
            for gone in options.store.evict(part.bytes, options.cache_gb, part.entries):
                tell(f"cache: {gone.name} {gone.kind} ({gone.gigabytes:.1f} GB) made room")
            errors = each(make, part.passes)
            cells, lost = _apart(part.cells, errors, options)
            for job in lost:
                tally.end(job, errors[job.request.name], 0.0, True)
            each(compute, cells)
    if tally.failed:
        raise Unfinished(
            f"{tally.failures} of {tally.cells} cells failed; the same command tries them again; "
            f"{log} has more",
            tally.errors,
        )


class _Row:
    """Failures in a row. Raises UserError where all others would fail too."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.enough = tuple(min(2, len(names)) for names in self._names(jobs))
        self.bad: list[Job] = []

    def add(self, job: Job, line: str, failed: bool) -> None:
        self.bad = [*self.bad, job] if failed else []
        reached = tuple(map(len, self._names(self.bad)))
        if len(self.bad) >= HOPELESS and all(n >= m for n, m in zip(reached, self.enough)):
            raise UserError(f"stopped after {len(self.bad)} failures in a row, the last: {line}")

    @staticmethod
    def _names(jobs: Sequence[Job]) -> tuple[set[str], set[str]]:
        return {job.request.name for job in jobs}, {job.task for job in jobs}


def _ended(
    executor: Executor[J], do: Callable[[J], Line], jobs: Sequence[J]
) -> Iterator[tuple[J, Outcome]]:
    """Each job, here or elsewhere done."""
    while jobs:
        claimed = []
        for job, outcome in executor(do, jobs):
            if outcome.line is None:
                claimed.append(job)
            else:
                yield job, outcome
        if len(claimed) == len(jobs):
            time.sleep(PAUSE)
        jobs = claimed


def _apart(
    jobs: Sequence[CellJob], broken: dict[str, str], options: RunOptions
) -> tuple[list[CellJob], list[CellJob]]:
    """Cells that can be computed, and those whose features a failed pass left out."""
    parts: tuple[list[CellJob], list[CellJob]] = [], []
    lost: dict[tuple[str, Path], bool] = {}
    for job in jobs:
        key = (job.identity.fingerprint, job.prepared)
        if job.request.name in broken and key not in lost:
            task = _prepared(job.prepared)
            lost[key] = bool(options.store.missing(key[0], task.kind, task.clips))
        parts[lost.get(key, False)].append(job)
    return parts


def note(log: Path, name: str, trace: str) -> None:
    """Write down where a job failed, if that can be written."""
    with contextlib.suppress(UserError):
        disk.append(log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n{trace}\n")


def make(job: Pass, options: RunOptions) -> Line:
    """Make one pass, unless another process is making it."""
    name, seconds = job.request.name, options.batch_seconds
    keys = "\n".join([job.request.spec, *(clip.key for clip in job.clips)])
    claim = f"{hashlib.blake2b(keys.encode(), digest_size=8).hexdigest()}.lease"
    with disk.lease(options.store.root / "passes", wait=False, name=claim) as ours:
        if not ours:
            return None
        with beating(options.store.root / RUNNING, job.name):
            upstream = _upstream(job.request, options.device)
            line = precision.require_near(upstream, job.clips, options.store, name)
            extract(
                upstream, job.clips, job.kinds, options.store,
                name=name, batch_seconds=seconds, what=job.name,
            )  # fmt: skip
            return line


def compute(job: CellJob, options: RunOptions) -> Line:
    """Compute one cell, unless another process is computing it or has done so meanwhile."""
    prepared = _prepared(job.prepared)
    entry = (job.identity.fingerprint, prepared.kind, prepared.clips)
    if job.together and options.store.missing(*entry):
        return _together(job, options)
    cell = of_cell.cell(job.identity, prepared, job.seed)
    with disk.lease(cell.folder(options.results), wait=False) as ours:
        if not ours:
            return None
        if of_cell.done(cell, prepared, options.results):
            return f"{job.name}: {ELSEWHERE}"
        with beating(options.store.root / RUNNING, job.name):
            features = _features(job, prepared, options)
            where = (options.results, options.device)
            score = of_cell.run(job.identity, prepared, job.seed, features, *where, job.seen)
    return _line(job, prepared, score)


def _line(job: CellJob, prepared: Prepared, score: Score) -> str:
    label = of_result(score.metric, score.better).label
    line = f"{job.name}: {label} {score.score:.2f} ({score.seconds:.0f} s)"
    published = prepared.recipe.expect.get(job.request.name.split(":")[0])
    notes = [] if published is None else [f"published: {published}"]
    notes += [each for each in score.warnings if each not in prepared.warnings][:1]  # told before
    return "; ".join([line, *notes])


def _together(job: CellJob, options: RunOptions) -> Line:
    """Compute all cells that share this one's passes over audio, but those claimed elsewhere.

    They belong to whoever has the first that is unfinished; for others this one is claimed too.
    """
    mine: list[tuple[CellJob, Prepared]] = []
    with contextlib.ExitStack() as leases:
        for each in job.together:
            task = _prepared(each.prepared)
            cell = of_cell.cell(each.identity, task, each.seed)
            if of_cell.done(cell, task, options.results):
                continue
            ours = leases.enter_context(disk.lease(cell.folder(options.results), wait=False))
            if not ours and not mine:
                return None
            if ours and not of_cell.done(cell, task, options.results):
                mine.append((each, task))
        with beating(options.store.root / RUNNING, job.name):
            upstream = _upstream(job.request, options.device)
            for _, task in mine[:1]:
                precision.require_near(upstream, task.clips, options.store, job.request.name)
            scores = together.compute(mine, upstream, options)
    for (each, _), score in zip(mine, scores):
        if isinstance(score, Exception) and (each.prepared, each.seed) == (job.prepared, job.seed):
            raise score  # those of others come when it is their turn
    task = _prepared(job.prepared)
    cell = of_cell.cell(job.identity, task, job.seed)
    if not of_cell.done(cell, task, options.results):
        return None
    return _line(job, task, read_cell(cell.folder(options.results) / "score.json").score)


def _features(job: CellJob, prepared: Prepared, options: RunOptions) -> Features:
    """From the store, where the upstream itself is not needed, or else recomputed."""
    entry = (job.identity.fingerprint, prepared.kind, prepared.clips)
    if not options.store.missing(*entry):
        precision.require_recorded(entry[0], options.store, job.request.name)
        return options.store.open(*entry)
    upstream = _upstream(job.request, options.device)
    precision.require_near(upstream, prepared.clips, options.store, job.request.name)
    return provide(upstream, prepared.clips, prepared.kind, options.store, where="recompute")


_prepared = lru_cache(maxsize=4)(Prepared.load)  # of this process
_last: dict[str, Upstream] = {}  # of this process: the shards of one upstream follow each other


def _upstream(request: Request, device: str) -> Upstream:
    key = repr(request)
    if key not in _last:
        _last.clear()  # first, or two would be in memory
        _last[key] = request.load().to(device)
    return _last[key]
