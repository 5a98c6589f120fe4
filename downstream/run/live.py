"""How far a run is: one screen on a terminal, a line for each finished job elsewhere.

On a terminal all that this process and its workers print goes through a pipe and appears above the
screen, so that no warning tears it. The screen is redrawn as a whole and leaves no mode behind: a
killed command's terminal is as it was.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
import textwrap
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from downstream.run import beats
from downstream.run.schedule import CellJob, Pass, Work
from upstream.common.progress import QUIET_SECONDS, clock, on_terminal, silent

FRAME_SECONDS = 0.5
ELSEWHERE = "done by another process"
Job = Pass | CellJob


class Tally:
    """What is done, what failed, and how long the rest takes."""

    def __init__(self, work: Work, folder: Path) -> None:
        passes = [job for part in work.rounds for job in part.passes]
        jobs: list[Job] = [*work.cells, *passes]
        self.folder, self.kept = folder, work.kept
        self.cells, self.passes = len(work.cells), len(passes)
        self.kinds = {job.name: (_kind(job), _units(job)) for job in jobs}
        # kind of job -> its units that are not done
        self.todo: dict[str, float] = defaultdict(float)
        for job in jobs:
            self.todo[_kind(job)] += _units(job)
        self.over: dict[str, float] = defaultdict(float)  # the same of those that are
        self.took: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # seconds, units
        self.ended: Counter[type] = Counter()
        self.failed: dict[str, list[str]] = defaultdict(list)  # error -> cells that had it
        self.begun = time.monotonic()

    def end(self, job: Job, line: str, seconds: float, failed: bool) -> None:
        """Count a job that ended after so long; `line`: what is printed of it, or its error."""
        kind, units = _kind(job), _units(job)
        self.ended[type(job)] += 1
        self.todo[kind] -= units
        if failed:
            if isinstance(job, CellJob):  # those of a failed pass end soon
                self.failed[line].append(job.name)
            return
        self.over[kind] += units
        if not line.endswith(ELSEWHERE):
            self.took[kind][0] += seconds
            self.took[kind][1] += units

    @property
    def failures(self) -> int:
        """Cells that failed."""
        return sum(map(len, self.failed.values()))

    @property
    def errors(self) -> list[str]:
        """A line for each error, with the first cell that had it."""
        return [
            f"failed: {first}{f' and {len(others)} more' * bool(others)}: {line}"
            for line, (first, *others) in self.failed.items()
        ]

    def counts(self, running: Sequence[beats.Beat] = ()) -> list[str]:
        """How far it is, in parts."""
        failed = self.failures
        parts = [f"{self.ended[CellJob] - failed} of {self.cells} cells"]
        parts += [f"{len(running)} running"] if running else []
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{self.kept} kept before"] if self.kept else []
        parts += [f"{self.ended[Pass]} of {self.passes} passes"] if self.passes else []
        parts.append(f"{clock(time.monotonic() - self.begun)} gone")
        left = self.left(running)
        return parts if left is None else [*parts, f"about {clock(left)} left"]

    def left(self, running: Sequence[beats.Beat]) -> float | None:
        """Seconds to go at the speed so far, whoever does the work; None if that is not known.

        A kind of job that has not ended yet is taken to be as long as the others of its sort.
        """
        rates = {kind: seconds / units for kind, (seconds, units) in self.took.items() if units}
        if not any(map(_is_cell, rates)):
            return None

        def rate(kind: str) -> float:
            alike = [r for other, r in rates.items() if _is_cell(other) == _is_cell(kind)]
            return rates.get(kind, sum(alike) / max(1, len(alike)))

        known = {beat.job: beat.seconds for beat in running}
        begun = sum(min(seconds, rate(self.kinds[job][0]) * self.kinds[job][1])
                    for job, seconds in known.items())  # fmt: skip
        left = sum(units * rate(kind) for kind, units in self.todo.items())
        done = sum(units * rate(kind) for kind, units in self.over.items())
        if not left:
            return None
        return (time.monotonic() - self.begun) * max(0.0, left - begun) / max(done + begun, 1e-9)

    def frame(self, width: int, height: int) -> list[str]:
        """The screen: at most so many lines of at most so many columns."""
        running = [beat for beat in beats.read(self.folder) if beat.job in self.kinds]
        share = self.ended[CellJob] / max(1, self.cells)
        full = round(share * min(width - 6, 60))
        lines = textwrap.wrap(" · ".join(self.counts(running)), max(10, width))
        lines.append(f"{'#' * full:.<{max(0, min(width - 6, 60))}} {share:4.0%}")
        last = self.errors[-3:]
        room = max(0, height - len(lines) - len(last))
        rows = [_row(beat, min(width, 100)) for beat in running]
        if len(rows) > room:
            rows = [*rows[: max(0, room - 1)], f"and {len(rows) - max(0, room - 1)} more"]
        return [fit(line, width, cut_left=False) for line in [*lines, *rows, *last]][:height]


def _kind(job: Job) -> str:
    """Jobs that take about as long, by unit."""
    return f"cell {job.task}" if isinstance(job, CellJob) else f"pass {job.request.name}"


def _is_cell(kind: str) -> bool:
    return kind.startswith("cell ")


def _units(job: Job) -> float:
    return 1 if isinstance(job, CellJob) else sum(clip.seconds for clip in job.clips)


def _row(beat: beats.Beat, width: int) -> str:
    """A process at work: what, how far, how long, and where if it is not here."""
    steps = f"{beat.done}/{beat.total}" if beat.total else ""
    here = beat.host == os.uname().nodename
    facts = f"{steps:>13} {clock(beat.seconds):>7}{'' if here else f'  {beat.host}'}"
    facts = fit(facts, width - 12)
    return f"{fit(beat.job, width - len(facts) - 1, pad=True)} {facts}"


def fit(text: str, width: int, *, cut_left: bool = True, pad: bool = False) -> str:
    """`text` in so many columns of a terminal; the end of a name tells more than its begin."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    cut = columns(text) > width
    while text and columns(text) > width - cut:
        text = text[1:] if cut_left else text[:-1]
    text = (f"…{text}" if cut_left else f"{text}…") if cut and width > 0 else text
    return text + " " * (width - columns(text)) * pad


def columns(text: str) -> int:
    """How many columns of a terminal it takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


@contextlib.contextmanager
def shown(tally: Tally) -> Iterator[Callable[[str], None]]:
    """Tell how far `tally` is while the block runs; yields what prints a job's line."""
    if tally.cells and on_terminal() and os.environ.get("TERM", "dumb") != "dumb" and _has(1, 2):
        with silent(), _screen(tally.frame):
            yield functools.partial(print, flush=True)
        return
    told = time.monotonic()

    def tell(line: str) -> None:
        nonlocal told
        print(line, flush=True)
        if time.monotonic() - told > QUIET_SECONDS:
            told = time.monotonic()
            print(", ".join(tally.counts()), file=sys.stderr)

    yield tell


def _has(*descriptors: int) -> bool:
    try:
        return all(os.fstat(each) for each in descriptors)
    except OSError:
        return False


@contextlib.contextmanager
def _screen(frame: Callable[[int, int], list[str]]) -> Iterator[None]:
    """Draw `frame(width, height)` below all that is printed meanwhile, by worker processes too."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2) if os.isatty(descriptor)}
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(kept[2], reader, frame, over), daemon=True)
    try:
        for descriptor in kept:
            os.dup2(writer, descriptor)
        thread.start()
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for descriptor, terminal in kept.items():
            os.dup2(terminal, descriptor)
        over.set()
        os.write(writer, b" ")  # wakes the thread
        thread.join()
        for descriptor in (reader, writer, *kept.values()):
            os.close(descriptor)


def _draw(
    terminal: int, reader: int, frame: Callable[[int, int], list[str]], over: threading.Event
) -> None:
    """The thread: print what comes through the pipe, and the frame below it, until it is over."""
    drawn: list[int] = []  # columns of each line on the terminal
    rest = b""
    while True:
        last = over.is_set()
        text, newline, rest = (rest + _all_of(reader)).rpartition(b"\n")
        rest = rest[rest.rfind(b"\r", 0, -1) + 1 :]  # of a bar that somebody draws, its last state
        if last:
            text, newline = text + newline + rest.rstrip(b" "), b""
        with contextlib.suppress(OSError):  # a terminal that is gone
            width, height = (n or m for n, m in zip(os.get_terminal_size(terminal), (80, 24)))
            lines = [] if last else _safe(frame, width - 1, height - 1)
            # of a terminal that became narrower, a line takes several rows
            rows = sum(max(1, -(-each // width)) for each in drawn)
            up = b"\x1b[%dF" % rows if rows else b""
            body = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
            _write(terminal, up + b"\x1b[J" + text + newline + body)
            drawn = [columns(line) for line in lines]
        if last:
            return
        select.select([reader], [], [], FRAME_SECONDS)
        time.sleep(0.05)  # whatever is printed, twenty frames a second at the most


def _safe(frame: Callable[[int, int], list[str]], width: int, height: int) -> list[str]:
    try:
        return frame(max(1, width), max(1, height))
    except Exception as error:  # the pipe must be read on, or all who print would wait
        return [fit(f"no progress to show: {error!r}", width, cut_left=False)]


def _all_of(reader: int) -> bytes:
    content = b""
    with contextlib.suppress(BlockingIOError):
        while len(content) < 1 << 20 and (chunk := os.read(reader, 1 << 16)):
            content += chunk
    return content


def _write(terminal: int, content: bytes) -> None:
    while content:
        content = content[os.write(terminal, content) :]
