"""Progress for long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from tqdm import tqdm

T = TypeVar("T")
QUIET_SECONDS = 20.0


class Stage(NamedTuple):
    """How far the innermost loop of this process is."""

    what: str = ""
    done: int = 0
    total: int | None = None


stage = Stage()
_silent = False


def progress(
    items: Iterable[T], what: str, total: int | None = None, initial: int = 0
) -> Iterator[T]:
    """Iterate over `items`, telling stderr how far it is, and whoever asks for `stage`."""
    global stage
    if total is None:
        total = len(items) + initial if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if not _silent:
        show = _bar if on_terminal() else _lines
        items = show(items, what, total, initial)
    for done, item in enumerate(items, initial):
        stage = Stage(what, done, total)
        yield item


def on_terminal() -> bool:
    """Whether people watch stderr."""
    return sys.stderr.isatty()


def _bar(items: Iterable[T], what: str, total: int | None, initial: int) -> Iterable[T]:
    return tqdm(items, desc=what, total=total, initial=initial, leave=False)


def _lines(items: Iterable[T], what: str, total: int | None, initial: int) -> Iterable[T]:
    begun = told = time.monotonic()
    for done, item in enumerate(items, initial):
        now = time.monotonic()
        if now - told > QUIET_SECONDS:
            told = now
            print(f"{what}: {done}/{total or '?'} after {now - begun:.0f} s", file=sys.stderr)
        yield item


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No progress is told in the block: somebody else tells it."""
    before = is_silent()
    hush(True)
    try:
        yield
    finally:
        hush(before)


def hush(quiet: bool) -> None:
    """From now on no progress is told, or it is again."""
    global _silent
    _silent = quiet


def is_silent() -> bool:
    """Whether no progress is told; a worker process does as its parent."""
    return _silent


def clock(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
