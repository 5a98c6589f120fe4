"""Batches through an upstream: padded, halved where memory ends, held to what it promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from upstream import audio
from upstream.base import Hidden, Upstream
from upstream.common.errors import UserError
from upstream.features.clips import Clip, require_unchanged
from upstream.features.store import Store

Run = Callable[[Upstream, list[Tensor]], Hidden]


def whole(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """Waves [N_i] -> hidden states. Raises UserError if they are not what it promised."""
    return _as_promised(upstream, upstream(*_padded(upstream, wavs)), len(wavs))


def convolved(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """Waves [N_i] -> the CNN's outputs as one layer [1, B, T, C]."""
    convolve: Any = upstream.convolve  # an upstream that names its CNN has both halves
    x, kept, _ = convolve(*_padded(upstream, wavs))
    return Hidden(x[None], kept)


def contextual(upstream: Upstream, outputs: list[Tensor]) -> Hidden:
    """The CNN's outputs [T_i, C] -> hidden states."""
    rest: Any = upstream.contextual
    x, lens = _padded(upstream, outputs)
    return _as_promised(upstream, rest(x, lens, lens), len(outputs))


def forward(upstream: Upstream, items: list[Tensor], run: Run = whole) -> Hidden:
    """A batch of unpadded items, one by one on a CPU, together on a GPU.

    Kernels round by the shape of their input, so that an item's last bits follow from its batch.
    Alone it is the same whenever and wherever it passes; on a CPU that costs next to nothing.
    On a GPU a batch that does not fit in memory becomes two halves, and what did not fit once is
    halved at once the next time: the size of a batch is found by trial.
    """
    if _device(upstream).type == "cpu" and not upstream.padding_matters:
        return _together([_run(upstream, [item], run) for item in items])
    fits = _fits.setdefault(upstream, {})
    size = len(items) * max(map(len, items))
    if len(items) == 1 or size < fits.get(run, math.inf):
        try:
            return _run(upstream, items, run)
        except torch.cuda.OutOfMemoryError:
            if len(items) == 1:
                raise
        fits[run] = size
        torch.cuda.empty_cache()
        print(f"out of GPU memory with {len(items)} utterances: halves from now on", flush=True)
    middle = len(items) // 2
    halves = (items[:middle], items[middle:])
    return _together([forward(upstream, half, run) for half in halves])


def _run(upstream: Upstream, items: list[Tensor], run: Run) -> Hidden:
    with torch.inference_mode():
        return run(upstream, items)


def _together(parts: list[Hidden]) -> Hidden:
    """The hidden states of several batches as those of one, padded with zeros."""
    if len(parts) == 1:
        return parts[0]
    frames = max(part.layers.shape[2] for part in parts)
    layers = [pad(part.layers, (0, 0, 0, frames - part.layers.shape[2])) for part in parts]
    return Hidden(torch.cat(layers, 1), torch.cat([part.lens for part in parts]))


# By upstream: the least padded size of a batch that did not fit. A process has one device.
_fits: WeakKeyDictionary[Upstream, dict[Run, float]] = WeakKeyDictionary()


@dataclass
class Source:
    """Clips as an upstream takes them: their audio, or its CNN's outputs where a store has them."""

    upstream: Upstream
    clips: Sequence[Clip]
    store: Store
    cnn: str | None  # whose outputs may be used
    run: Run = whole  # for audio
    verify: bool = False  # that audio still is what its clips were made from

    def __post_init__(self) -> None:
        self.row: dict[int, int] = {}  # index of a clip -> its row in the CNN's outputs
        if self.cnn:
            missing = {clip.key for clip in self.store.missing(self.cnn, "cnn", self.clips)}
            kept = [i for i, clip in enumerate(self.clips) if clip.key not in missing]
            self.row = {index: row for row, index in enumerate(kept)}
            if kept:
                self.outputs = self.store.open(self.cnn, "cnn", [self.clips[i] for i in kept])

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """What `hidden` needs: the CNN's outputs [T_i, C] of a batch, or its audio [N_i]."""
        if self._has_outputs(indices):
            x, lens = self.outputs.batch([self.row[i] for i in indices])
            return [frames[:n] for frames, n in zip(x[0], lens.tolist())]
        wavs = [self.clips[i].load() for i in indices]
        if self.verify:
            require_unchanged(self.clips[i] for i in indices)
        return wavs

    def hidden(self, indices: Sequence[int], items: list[Tensor]) -> tuple[Hidden, Tensor]:
        """The batch and its means [L, B, D], from what `read` gave; `require` looks at them."""
        run = contextual if self._has_outputs(indices) else self.run
        hidden = forward(self.upstream, items, run)
        return hidden, hidden.mean()

    def require(self, indices: Sequence[int], lens: Tensor, frames: int, means: Tensor) -> None:
        """Raises UserError for lens [B] that cannot be, and for hidden states that are NaN.

        On a GPU this waits for the batch, unless lens and means have been copied from there.
        """
        if not 0 < int(lens.min()) <= int(lens.max()) <= frames:
            name = self.upstream.source or type(self.upstream).__name__
            raise UserError(f"{name}: gives lens {lens.tolist()}, which are not from 1 to {frames}")
        # over valid frames: one NaN in any shows
        for index, finite in zip(indices, torch.isfinite(means).all(-1).all(0).tolist()):
            if not finite:
                path = self.clips[index].path
                raise UserError(f"{path}: the upstream gives NaN or infinite hidden states")

    def _has_outputs(self, indices: Sequence[int]) -> bool:
        return all(i in self.row for i in indices)


def _as_promised(upstream: Upstream, hidden: Any, count: int) -> Hidden:
    """The hidden states of `count` utterances, or UserError if another shape was promised."""
    try:
        layers, lens = hidden
        shape, frames, types = list(layers.shape), layers.shape[2], (layers.dtype, lens.dtype)
        fits = shape == [upstream.num_layers, count, frames, upstream.dim]
        fits = fits and types == (torch.float32, torch.int64) and lens.shape == (count,)
        # on a GPU a look at the numbers would wait for the batch: see Source.require
        fits = fits and (lens.is_cuda or 0 < int(lens.min()) <= int(lens.max()) <= frames)
        gives = f"layers {shape} {types[0]} and lens {lens.tolist()} {types[1]}"
    except (AttributeError, IndexError, TypeError, ValueError):
        fits, gives = False, type(hidden).__name__
    if fits:
        return Hidden(layers, lens)
    name = upstream.source or type(upstream).__name__
    name += f":{type(upstream).__name__}" if name.endswith(".py") else ""
    raise UserError(
        f"{name}: promised float32 layers [{upstream.num_layers}, {count}, T, {upstream.dim}] "
        f"and int64 lens [{count}] from 1 to T, and gives {gives.replace('torch.', ''):.200}; "
        f"run: benchmark.py check --upstream {name}"
    )


def _device(upstream: Upstream) -> torch.device:
    return next((p.device for p in upstream.parameters()), torch.device("cpu"))


def _padded(upstream: Upstream, items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N_i, ...] each -> zero-padded [B, N, ...] and lens [B] where the upstream is."""
    device = _device(upstream)
    batch, lens = audio.pad(items)
    if device.type == "cuda":  # from locked memory, so that the copy does not wait for the GPU
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True), lens.to(device)
