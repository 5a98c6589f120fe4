"""What is being worked on: each process with a job says so in a small file, twice a second or so.

The folder is the results folder's: whoever looks sees the processes of all commands and machines
that share it. Nothing depends on these files; a job that cannot write one is done all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from upstream.common import disk, progress
from upstream.common.errors import UserError

PERIOD = 1.0  # seconds
STALE = 30.0  # seconds without a sign of life: the process was killed, or its machine is gone
LARGEST = 1 << 16  # bytes
OLD = 3600.0  # seconds: the file goes


class Beat(NamedTuple):
    """One process at work."""

    job: str  # its name
    host: str
    seconds: float  # since it began
    what: str = ""  # the stage of the job
    done: int = 0
    total: int | None = None


@contextlib.contextmanager
def beating(folder: Path, job: str) -> Iterator[None]:
    """Say in `folder` that this process is at `job`, until the block ends."""
    host, begun, over = platform.node(), time.monotonic(), threading.Event()
    file = folder / f"{host}-{os.getpid()}.json"
    progress.stage = progress.Stage()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError, UserError), disk.whole(file) as part:
                part.write_text(json.dumps([job, host, time.monotonic() - begun, *progress.stage]))
            if over.wait(PERIOD):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(UserError):
            disk.remove_file(file)


def read(folder: Path) -> list[Beat]:
    """All processes that gave a sign of life lately, longest at work first."""
    beats = []
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            age = abs(time.time() - file.lstat().st_mtime)
            if age < STALE and not file.name.startswith(disk.PART):
                beats.append(_beat(*json.loads(disk.read(file, LARGEST))))
            elif age > OLD:
                disk.remove_file(file)
    return sorted(beats, key=lambda beat: -beat.seconds)


def _beat(
    job: str, host: str, seconds: float, what: str = "", done: int = 0, total: int | None = None
) -> Beat:
    """A file's values; TypeError or ValueError for what `beating` does not write."""
    if not all(isinstance(text, str) for text in (job, host, what)):
        raise TypeError(job)
    return Beat(job, host, float(seconds), what, int(done), total and int(total))
