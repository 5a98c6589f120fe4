"""Lines on stderr about what was taken for granted: each once, and by the main process alone."""

from __future__ import annotations

import functools
import multiprocessing
import sys


@functools.cache
def notice(line: str) -> None:
    """Print `line` to stderr unless this run has printed it already."""
    if multiprocessing.parent_process() is None:
        print(f"benchmark.py: {line}", file=sys.stderr, flush=True)
