"""Frames of some clips at a time, in memory, for all heads that want these now."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from upstream.base import Upstream
from upstream.features.ahead import ahead
from upstream.features.clips import Clip
from upstream.features.codec import Kind
from upstream.features.extract import batches
from upstream.features.forward import Source
from upstream.features.provide import Indices, Recomputed, stack
from upstream.features.store import Store


class Window:
    """Frames of any of `clips`, rounded as they would be kept, where the upstream is."""

    def __init__(self, upstream: Upstream, clips: Sequence[Clip], kind: Kind, store: Store) -> None:
        self.source = Recomputed(upstream, clips, kind, store)
        self.rows = {clip.key: row for row, clip in enumerate(clips)}
        self.held: dict[str, dict[str, Tensor]] = {}

    def fill(self, clips: Sequence[Clip], batch_seconds: float = 32.0) -> None:
        """Hold the frames of these, anew, and of no others. Raises UserError for bad audio."""
        self.held = {}
        wanted = {clip.key: clip for clip in clips}.values()
        todo = sorted(wanted, key=lambda clip: (-clip.seconds, clip.key))
        order = [[self.rows[todo[i].key] for i in part] for part in batches(todo, batch_seconds)]
        for indices, items in ahead(partial(Source.read, self.source), order):
            arrays, lens = self.source.rounded(indices, items)
            for row, (index, n) in enumerate(zip(indices, lens.tolist())):
                # a copy: a part would keep the whole batch, with its padding
                held = {name: x[:, row, :n].clone() for name, x in arrays.items()}
                self.held[self.source.clips[index].key] = held

    def view(self, clips: Sequence[Clip]) -> View:
        """As `Features` of these by index, as far as they are held."""
        lens = self.source.lens[[self.rows.get(clip.key, 0) for clip in clips]]
        return View(self, clips, self.source.layers, self.source.dim, lens)


@dataclass
class View:
    """A task's way into a window."""

    window: Window
    clips: Sequence[Clip]
    layers: int
    dim: int
    lens: Tensor

    @property
    def error(self) -> float:
        """As of `Features`: over all utterances that were in the window so far."""
        return self.window.source.error

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D], lens [B] of utterances that are held."""
        return stack([self.window.held[self.clips[i].key] for i in indices])


def free_memory(device: str) -> float:
    """Bytes that could be taken on a device, also where a container has less than its machine."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float("inf")
    with contextlib.suppress(OSError, ValueError, KeyError):  # Linux only
        free = _table("/proc/meminfo")["MemAvailable:"] * 1024
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max": no limit
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - _table("/sys/fs/cgroup/memory.stat")["anon"])
    return free


def _table(path: str) -> dict[str, float]:
    rows = (line.split() for line in Path(path).read_text().splitlines())
    return {row[0]: float(row[1]) for row in rows}
