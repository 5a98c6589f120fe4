"""Batches through an upstream: padded, halved where memory ends, held to what it promised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from upstream import audio
from upstream.base import Hidden, Upstream
from upstream.common.errors import UserError

Run = Callable[[Upstream, list[Tensor]], Hidden]
K = TypeVar("K")
V = TypeVar("V")
AHEAD = 4  # batches that are read, each in a thread, while the encoder works


def forward(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """Hidden states of unpadded waves [N_i]; a batch that does not fit in memory is halved.

    Raises UserError for hidden states that are not what the upstream promised.
    """
    return halving(whole, upstream, wavs)


def whole(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """Waves [N_i] -> hidden states."""
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


def halving(run: Run, upstream: Upstream, items: list[Tensor]) -> Hidden:
    """Run a batch, or two halves of it where it does not fit in memory."""
    try:
        with torch.inference_mode():
            return run(upstream, items)
    except torch.cuda.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()
    print(f"out of GPU memory with {len(items)} utterances: trying two halves", flush=True)
    halves = [halving(run, upstream, half) for half in (items[::2], items[1::2])]
    frames = max(half.layers.shape[2] for half in halves)
    count, _, _, dim = halves[0].layers.shape
    layers = halves[0].layers.new_zeros(count, len(items), frames, dim)
    lens = halves[0].lens.new_empty(len(items))
    for offset, half in enumerate(halves):
        layers[:, offset::2, : half.layers.shape[2]] = half.layers
        lens[offset::2] = half.lens
    return Hidden(layers, lens)


def ahead(read: Callable[[K], V], order: Iterable[K]) -> Iterator[tuple[K, V]]:
    """Each of `order` with what was read for it in a thread, while those before were in use."""
    rest = iter(order)
    with ThreadPoolExecutor(AHEAD) as pool:
        coming = [(item, pool.submit(read, item)) for item in islice(rest, AHEAD)]
        while coming:
            item, future = coming.pop(0)
            value = future.result()
            coming += [(later, pool.submit(read, later)) for later in islice(rest, 1)]
            yield item, value


def require_finite(means: Tensor, names: Sequence[str]) -> None:
    """Means over valid frames [L, B, D]: one NaN in any frame shows in them. Raises UserError."""
    finite = torch.isfinite(means).all(-1).all(0).tolist()
    if not all(finite):
        name = names[finite.index(False)]
        raise UserError(f"{name}: the upstream gives NaN or infinite hidden states")


def _as_promised(upstream: Upstream, hidden: Any, count: int) -> Hidden:
    """The hidden states of `count` utterances, or UserError if another shape was promised."""
    try:
        layers, lens = hidden
        shape, frames, types = list(layers.shape), layers.shape[2], (layers.dtype, lens.dtype)
        fits = shape == [upstream.num_layers, count, frames, upstream.dim]
        fits = fits and types == (torch.float32, torch.int64) and lens.shape == (count,)
        fits = fits and int(lens.min()) > 0 and int(lens.max()) <= frames
        gives = f"layers {shape} {types[0]} and lens {lens.tolist()} {types[1]}"
    except (AttributeError, IndexError, TypeError, ValueError):
        fits, gives = False, type(hidden).__name__
    if not fits:
        name = upstream.source or type(upstream).__name__
        name += f":{type(upstream).__name__}" if name.endswith(".py") else ""
        raise UserError(
            f"{name}: promised float32 layers [{upstream.num_layers}, {count}, T, {upstream.dim}] "
            f"and int64 lens [{count}] from 1 to T, and gives {gives.replace('torch.', ''):.200}; "
            f"run: benchmark.py check --upstream {name}"
        )
    return Hidden(layers, lens)


def _padded(upstream: Upstream, items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N_i, ...] each -> zero-padded [B, N, ...] and lens [B] where the upstream is."""
    device = next((p.device for p in upstream.parameters()), torch.device("cpu"))
    batch, lens = audio.pad(items)
    return batch.to(device), lens.to(device)
