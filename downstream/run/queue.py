"""Jobs in a folder that machines share, and the servers that do them.

The command that a user started is the head: it puts a stage (a function and its jobs) into the
folder and reads outcomes. Servers, started by whatever a cluster has, go through the jobs of a
stage; each job is claimed by the lease that `execute` gives it anyway, so servers, and other
commands on the same results, never do the same. A server that is killed loses only what it was
at, which the others take up once its lease is free. It ends when the head says so, or when it
has nothing to do and the head gave no sign of life: what was begun is finished without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from downstream.run.executors import Line, Outcome, attempt
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import hush

PAUSE = 0.5  # seconds between looks into the folder
SIGN = 5.0  # seconds between signs of life of the head
SILENCE = 60.0  # seconds without one: the head is gone
NAME = re.compile(r"[0-9a-f]{12}")  # of a queue's folder, drawn at random
OLD = 86400.0  # seconds: what killed heads left goes
INHERITED = ("HUBERT_DEMO", "SPEECH_SAMPLE")  # variables that names and recipes may rest on


class Setting(NamedTuple):
    """What a server must have as its head has it."""

    cwd: str  # paths may be relative
    path: list[str]  # of modules
    environment: dict[str, str]
    threads: int | None  # of a server; None: the cores that the cluster gave it


class Queue:
    """The head's side of a folder."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        """Pickles are read from a folder that was made just now, never from what lay there."""
        self.folder, self.stages = folder, 0
        given = {name: os.environ[name] for name in INHERITED if name in os.environ}
        setting = Setting(os.getcwd(), [p or os.getcwd() for p in sys.path], given, threads)
        disk.write(folder / "setting.pkl", pickle.dumps(setting))

    def execute(
        self, do: Callable[[Any], Line], jobs: Sequence[Any], watch: Callable[[], None]
    ) -> Iterator[tuple[Any, Outcome]]:
        """Put a stage, and yield its outcomes as they come. `watch` is called meanwhile."""
        stage = self.folder / str(self.stages)
        self.stages += 1
        disk.write(stage / "jobs.pkl", pickle.dumps((do, list(jobs))))
        waiting = set(range(len(jobs)))
        while waiting:
            for number in sorted(waiting & _ended(stage)):
                waiting.discard(number)
                content = disk.read(stage / f"{number}.json", disk.RECORD_BYTES)
                yield jobs[number], Outcome(*json.loads(content))
            if waiting:
                watch()
                time.sleep(PAUSE)


@contextlib.contextmanager
def heading(root: Path, threads: int | None) -> Iterator[Queue]:
    """A new queue below `root`; its servers end with the block. After an error it stays, to read.

    Raises UserError if the folder cannot be written.
    """
    for old in root.glob("*"):
        with contextlib.suppress(OSError, UserError):
            silent = time.time() - (old / "head").lstat().st_mtime
            if NAME.fullmatch(old.name) and silent > OLD:
                disk.remove_folder(old)
    folder, ended = (root / uuid.uuid4().hex[:12]).absolute(), threading.Event()

    def sign() -> None:
        while True:
            with contextlib.suppress(UserError):
                disk.write(folder / "head", str(time.time()))
            if ended.wait(SIGN):
                return

    queue = Queue(folder, threads)
    thread = threading.Thread(target=sign, daemon=True)
    thread.start()
    try:
        yield queue
        disk.remove_folder(folder)
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(UserError):
            if folder.is_dir():
                disk.touch(folder / "over")


def serve(folder: str | Path) -> None:
    """The life of a server."""
    folder = Path(folder)
    setting: Setting = pickle.loads(disk.read(folder / "setting.pkl"))
    os.chdir(setting.cwd)
    sys.path += [place for place in setting.path if place not in sys.path]
    for name, value in setting.environment.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(setting.threads or _cores())
    hush(True)
    number, sign, heard = 0, "", time.monotonic()
    while _open(folder):
        if (folder / str(number) / "jobs.pkl").is_file():
            _do(folder, folder / str(number))
            number += 1
            continue
        with contextlib.suppress(UserError):
            if (latest := disk.read(folder / "head", 100).decode()) != sign:
                sign, heard = latest, time.monotonic()
        if time.monotonic() - heard > SILENCE:
            return
        time.sleep(PAUSE)


def _cores() -> int:
    """That this process may use: a cluster binds a job to some of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "over").exists()


def _ended(stage: Path) -> set[int]:
    return {int(name[:-5]) for name in os.listdir(stage) if name[:-5].isdigit()}


def _do(folder: Path, stage: Path) -> None:
    """All jobs of a stage, but those that others do."""
    do, jobs = pickle.loads(disk.read(stage / "jobs.pkl"))
    while left := sorted({*range(len(jobs))} - _ended(stage)):
        idle = True
        for number in left:
            if not _open(folder):
                return
            place = stage / f"{number}.json"
            if place.exists():
                continue
            outcome = attempt(do, jobs[number])
            if outcome.line is not None:  # nobody else is at it
                disk.write(place, json.dumps(outcome))
                idle = False
        if idle:
            time.sleep(PAUSE)
