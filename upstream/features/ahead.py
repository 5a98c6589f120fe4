"""Reading in threads what is needed next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AHEAD = min(16, max(4, CORES))  # batches, each in a thread
K = TypeVar("K")
V = TypeVar("V")


def ahead(read: Callable[[K], V], order: Iterable[K], count: int = AHEAD) -> Iterator[tuple[K, V]]:
    """Each of `order` with what was read for it in a thread, while those before were in use."""
    rest = iter(order)
    with ThreadPoolExecutor(count) as pool:
        coming = [(item, pool.submit(read, item)) for item in islice(rest, count)]
        while coming:
            item, future = coming.pop(0)
            value = future.result()
            coming += [(later, pool.submit(read, later)) for later in islice(rest, 1)]
            yield item, value
