"""Servers of a queue on a cluster: as SLURM jobs (by submitit), or as Ray tasks.

`--executor slurm:jobs=16:partition=gpu:gpus_per_node=1` or `ray:jobs=8:num_cpus=4`. The head itself
computes nothing. Servers that end too early (killed, out of time, preempted) are started anew;
submitit moreover lets SLURM requeue those that it warns. The results folder must be on a file
system that all machines share and whose renames and exclusive creation are atomic (NFS 3 and
later, Lustre, GPFS); flock is not needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from downstream.run.executors import Executor
from downstream.run.queue import heading, serve
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.common.packages import require_package
from upstream.common.schema import read_value
from upstream.resolve import parse

JOBS = 4  # servers, if the user does not say
AGAIN = 3  # times that each may be started anew, on average
MINUTES = 240  # that SLURM is asked for, if the user does not say
LAST = 5.0  # seconds that servers have to end by themselves
LOCAL = "local"


class Engine(Protocol):
    """What starts servers."""

    local: bool  # all run on this machine

    def start(self, folder: Path, count: int) -> list[Any]:
        """Start so many. Raises UserError."""

    def over(self, server: Any) -> str | None:
        """Why a server ended; None while it runs or waits."""

    def stop(self, servers: list[Any]) -> None:
        """End what is left of them."""


class Asked(NamedTuple):
    """An executor as the command line names it."""

    name: str
    jobs: int
    gpus: bool  # each server is to have one
    options: dict[str, Any]  # of the engine


def asked(spec: str) -> Asked:
    """Read `slurm:jobs=16:partition=gpu`. Raises UserError for a name that there is not."""
    name, texts = parse(spec)
    if name != LOCAL and name not in ENGINES:
        raise UserError(f"--executor: unknown {name!r}{near_miss(name, [LOCAL, *ENGINES])}")
    options = {key: read_value(text, f"--executor {key}") for key, text in texts.items()}
    if name == LOCAL and options:
        raise UserError(f"--executor local has no option {next(iter(options))}; see --workers")
    jobs = options.pop("jobs", JOBS)
    if not isinstance(jobs, int) or not 1 <= jobs <= 10_000:
        raise UserError(f"--executor jobs={jobs}: not a whole number from 1 to 10000")
    gpus = any(options.get(key) for key in ("gpus_per_node", "num_gpus", "gres", "gpus_per_task"))
    return Asked(name, jobs, gpus, options)


@contextlib.contextmanager
def cluster(spec: str, most: int, root: Path) -> Iterator[Executor[Any]]:
    """Servers for at most so many jobs at a time; none outlives the block. Raises UserError.

    root: where the queue is put; it stays there, with what the servers wrote, after an error.
    """
    wanted = asked(spec)
    count = min(wanted.jobs, max(1, most))
    engine = engine_of(wanted)
    threads = max(1, (os.cpu_count() or 1) // count) if engine.local else None
    with heading(root, threads) as queue:
        servers: list[Any] = []
        spent = 0

        def watch() -> None:
            nonlocal spent
            if not servers:
                servers.extend(engine.start(queue.folder, count))
                print(f"{count} jobs of {spec} started; logs: {queue.folder}", flush=True)
            for place, server in enumerate(servers):
                if (why := engine.over(server)) is None:
                    continue
                spent += 1
                if spent > AGAIN * count:
                    raise UserError(
                        f"--executor {spec}: {spent} jobs ended before the work was done, the last "
                        f"so: {why}; logs: {queue.folder}; the same command goes on"
                    )
                servers[place : place + 1] = engine.start(queue.folder, 1)

        patience = LAST
        try:
            yield lambda do, jobs: queue.execute(do, jobs, watch)
        except KeyboardInterrupt:
            patience = 0.0
            raise
        finally:
            disk.touch(queue.folder / "over")
            end = time.monotonic() + patience
            while time.monotonic() < end and any(engine.over(each) is None for each in servers):
                time.sleep(0.1)
            engine.stop(servers)


def engine_of(wanted: Asked) -> Engine:
    """Raises UserError for what is not installed, or an option that there is not."""
    return ENGINES[wanted.name](dict(wanted.options))


class Server:
    """What SLURM runs; told that it will be killed, it asks to be put in the queue again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        serve(self.folder)

    def checkpoint(self) -> Any:
        """What submitit calls then."""
        return require_package("submitit.helpers").DelayedSubmission(self)


class Slurm:
    """An array of jobs by submitit; its `cluster=local` runs them on this machine, to try it."""

    def __init__(self, options: dict[str, Any]) -> None:
        submitit = require_package("submitit")
        kind = options.pop("cluster", "slurm")
        self.local = kind != "slurm"
        common = submitit.AutoExecutor._typed_parameters()
        given = {"name": "speech-ft-bench", "timeout_min": MINUTES, **options}
        self.given = {k if k in common else f"slurm_{k}": v for k, v in given.items()}
        self.make = lambda folder: submitit.AutoExecutor(folder / "%j", cluster=kind)
        self._executor(Path("none"))  # a mistake is told now

    def _executor(self, folder: Path) -> Any:
        try:
            executor = self.make(folder)
            executor.update_parameters(**self.given)
        except Exception as error:  # it has many ways to say so, some of several lines
            reason = str(error).split("\n")[0]
            raise UserError(
                f"--executor slurm: {reason} (slurm:cluster=local tries it on this machine)"
            ) from error
        return executor

    def start(self, folder: Path, count: int) -> list[Any]:
        try:
            executor = self._executor(folder)
            with executor.batch():
                return [executor.submit(Server(folder)) for _ in range(count)]
        except UserError:
            raise
        except Exception as error:  # sbatch refuses for as many reasons as there are clusters
            raise UserError(f"--executor slurm: cannot submit ({_brief(error)})") from error

    def over(self, server: Any) -> str | None:
        if not server.done():
            return None
        try:
            server.result()
            return "it ended by itself"
        except Exception as error:
            return f"{server.job_id} {server.state}: {_brief(error)}"

    def stop(self, servers: list[Any]) -> None:
        for server in servers:
            with contextlib.suppress(Exception):
                if not server.done():
                    server.cancel(check=False)


class Ray:
    """Tasks of a Ray cluster (`address=auto`), or of one that is started on this machine."""

    def __init__(self, options: dict[str, Any]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = require_package("ray")
        self.address = options.pop("address", None)
        self.local = self.address is None
        known = ("num_cpus", "num_gpus", "memory")
        if unknown := [key for key in options if key not in known]:
            hint = near_miss(unknown[0], ["jobs", "address", *known])
            raise UserError(f"--executor ray: unknown option {unknown[0]!r}{hint}")
        self.options = {"num_cpus": 1, **options}

    def start(self, folder: Path, count: int) -> list[Any]:
        try:
            if not self.ray.is_initialized():
                cores = None if self.address else max(
                    os.cpu_count() or 1, int(self.options["num_cpus"] * count)
                )  # fmt: skip
                self.ray.init(
                    self.address, num_cpus=cores, include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR,
                )  # fmt: skip
            task = self.ray.remote(serve).options(max_retries=0, **self.options)
            return [task.remote(str(folder)) for _ in range(count)]
        except Exception as error:
            raise UserError(f"--executor ray: cannot start ({_brief(error)})") from error

    def over(self, server: Any) -> str | None:
        ready, _ = self.ray.wait([server], timeout=0)
        if not ready:
            return None
        try:
            self.ray.get(server)
            return "it ended by itself"
        except Exception as error:
            return _brief(error)

    def stop(self, servers: list[Any]) -> None:
        with contextlib.suppress(Exception):
            for server in servers:
                self.ray.cancel(server, force=True)
            self.ray.shutdown()


def _brief(error: Exception) -> str:
    """The last line tells most: those before are a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip("- ")]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]


ENGINES: dict[str, Any] = {"slurm": Slurm, "ray": Ray}
