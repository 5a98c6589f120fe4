"""Progress for long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
QUIET_SECONDS = 20.0
_silent = False
_line = 0  # on which terminal line this process draws its bar: workers draw below the main one


def progress(
    items: Iterable[T], what: str, total: int | None = None, initial: int = 0
) -> Iterator[T]:
    """Iterate over `items`, telling stderr how far it is."""
    if _silent:
        yield from items
        return
    if total is None:
        total = len(items) + initial if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, initial=initial, leave=False, position=_line)
        return
    begun = told = time.monotonic()
    for done, item in enumerate(items, initial):
        now = time.monotonic()
        if now - told > QUIET_SECONDS:
            told = now
            print(f"{what}: {done}/{total or '?'} after {now - begun:.0f} s", file=sys.stderr)
        yield item


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No progress is told in the block: another process does the same, and tells."""
    global _silent
    _silent = True
    try:
        yield
    finally:
        _silent = False


def share_terminal(started: Any, lock: Any) -> int:
    """In a worker: take the next line of the terminal, from 1; the arguments are the pool's."""
    global _line
    tqdm.set_lock(lock)
    with started.get_lock():
        started.value += 1
        _line = started.value
    return _line
