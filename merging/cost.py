"""What it took to build an upstream: in every record, on its card, under the table of a run."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
KEYS = ("seconds", "peak_memory_bytes", "stored_bytes")


def cost(seconds: float, peak: int, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """For a record: wall clock, the most memory in use (see `peak_bytes`), the size of weights."""
    stored = sum(t.numel() * t.element_size() for t in weights.values())
    return dict(zip(KEYS, (seconds, peak, stored)))


def begin_peak() -> None:
    """Forget what was in use before, where the system can: what follows is a cost of its own."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # Linux: the high-water mark becomes what is resident now


def peak_bytes() -> int:
    """The most memory in use since `begin_peak`: the GPU's if one is used, else this process's.

    Where the system cannot forget (macOS), since the process began.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        if mark := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(mark[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cost_text(record: Mapping[str, Any]) -> str:
    """A record's cost in words; "" for one from before it was noted."""
    if any(key not in record for key in KEYS):
        return ""
    seconds, memory, stored = (record[key] for key in KEYS)
    parts = [f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"]
    parts += [f"at most {_bytes(memory)} of memory", f"{_bytes(stored)} stored"]
    if (learned := record.get("learned_parameters")) is not None:
        parts.append(f"{learned / 1e6:.3g} M weights learnt")
    return ", ".join(parts)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 999.5e6 else f"{count / 1e6:.3g} MB"
