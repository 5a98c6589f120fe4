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

PERIOD = 1.0  # seconds
STALE = 30.0  # seconds without a sign of life: the process was killed, or its machine is gone
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
            with contextlib.suppress(OSError), disk.whole(file) as part:
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
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def read(folder: Path) -> list[Beat]:
    """All processes that gave a sign of life lately, longest at work first."""
    beats = []
    for file in folder.glob("*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            age = time.time() - file.stat().st_mtime
            if age < STALE and file.suffix == ".json" and not file.name.startswith(disk.PART):
                beats.append(Beat(*json.loads(file.read_text())))
            elif age > OLD:
                file.unlink()
    return sorted(beats, key=lambda beat: -beat.seconds)
