"""Kept features on a GPU: all of a task's if they fit there, else each batch read ahead of its use.

What crosses to the device is what is kept, in half or a quarter of the bytes, from locked memory;
it is decoded there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from upstream.base import valid
from upstream.features.ahead import ahead
from upstream.features.codec import decode

SHARE = 0.125  # of the GPU's free memory that one task may take: others work there, too
DEEP = 3  # batches that are read ahead
Arrays = dict[str, Tensor]


class Kept(Protocol):
    """As of `Features`, and what is kept itself."""

    lens: Tensor
    mean: bool

    def rows(self, indices: Sequence[int]) -> tuple[Arrays, Tensor]:
        """Arrays [B, T, L, ...] of the CPU, lens [B]."""


class Resident:
    """All utterances, one after the other, on a device."""

    def __init__(self, kept: Kept, device: torch.device) -> None:
        """Reads them; `fits` says whether there is room."""
        self.mean, self.lens = kept.mean, kept.lens
        counts = torch.ones_like(self.lens) if self.mean else self.lens
        self.counts, self.starts = counts, counts.cumsum(0) - counts
        self.arrays: Arrays = {}
        for (i,), (arrays, _) in ahead(kept.rows, ([i] for i in range(len(counts))), DEEP):
            first, n = int(self.starts[i]), int(counts[i])
            for name, array in arrays.items():
                if name not in self.arrays:
                    shape = (int(counts.sum()), *array.shape[2:])
                    self.arrays[name] = torch.empty(shape, dtype=array.dtype, device=device)
                self.arrays[name][first : first + n] = array[0].to(device)
        self.device = device

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D] (or [L, B, D]) on the device, lens [B] of the CPU."""
        chosen = torch.as_tensor(indices)
        counts = self.counts[chosen]
        frames = torch.arange(int(counts.max()))
        places = self.starts[chosen, None] + frames.clamp(max=counts[:, None] - 1)
        places = moved(places, self.device)
        arrays = {name: array[places] for name, array in self.arrays.items()}
        return _batch(arrays, counts, self.mean), self.lens[chosen]


def fits(kept: Kept, device: torch.device) -> bool:
    """Whether all of it may stay on the device. Reads one utterance."""
    arrays, _ = kept.rows([0])
    count = len(kept.lens) if kept.mean else int(kept.lens.sum())
    row = sum(array[0, 0].numel() * array.element_size() for array in arrays.values())
    return count * row <= SHARE * torch.cuda.mem_get_info(device)[0]


def batches(
    kept: Kept, order: Iterable[Sequence[int]], device: torch.device
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Each of `order` as `Resident.batch` gives it, read ahead in threads."""

    def read(indices: Sequence[int]) -> tuple[Arrays, Tensor]:
        arrays, lens = kept.rows(indices)
        return {name: array.pin_memory() for name, array in arrays.items()}, lens

    for indices, (arrays, lens) in ahead(read, order, DEEP):
        there = {name: array.to(device, non_blocking=True) for name, array in arrays.items()}
        counts = torch.ones_like(lens) if kept.mean else lens
        yield indices, _batch(there, counts, kept.mean), lens


def moved(values: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device is at."""
    if torch.device(device).type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _batch(arrays: Arrays, counts: Tensor, mean: bool) -> Tensor:
    """Arrays [B, T, L, ...] as a head takes them."""
    x = decode(arrays).movedim(2, 0)
    if mean:
        return x[:, :, 0].contiguous()
    mask = moved(valid(counts, x.shape[2]), x.device)
    return torch.where(mask[None, :, :, None], x, 0).contiguous()
