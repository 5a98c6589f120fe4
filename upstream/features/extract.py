"""Hidden states of utterances: each passes the encoder once, what is kept is read from disk.

`extract` writes what the store misses, `Store.open` reads it in batches. The outputs of the frozen
CNN, which Speech-FT never trains, can be kept too: every upstream with the same CNN starts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upstream.base import SAMPLE_RATE, Upstream
from upstream.common.progress import progress
from upstream.features.ahead import ahead
from upstream.features.clips import Clip
from upstream.features.codec import Coded, Kind, encode, require
from upstream.features.forward import Run, Source, convolved, whole
from upstream.features.shards import Array, Writer
from upstream.features.store import Store

SHARD_SECONDS = 600.0
UTTERANCE = 4.0  # seconds, for an estimate
Target = tuple[str, Kind]  # fingerprint and kind: an entry of the store
BYTES = {"mean": 4.0, "float16": 2.0, "int8": 1.0, "cnn": 4.0}  # of one number


def shape(upstream: Upstream, kind: Kind) -> tuple[int, int]:
    """Layers and numbers in each."""
    if kind != "cnn":
        return upstream.num_layers, upstream.dim
    config: Any = upstream.config  # only an Encoder shares its CNN
    return 1, config.conv_dim[-1]


def bytes_of(upstream: Upstream, kind: Kind, seconds: float) -> int:
    """About how much disk `kind` takes for this much audio; utterances of 4 s for means."""
    rows = seconds / UTTERANCE if kind == "mean" else seconds * SAMPLE_RATE / upstream.stride
    layers, dim = shape(upstream, kind)
    return round(rows * layers * (dim * BYTES[kind] + (4 if kind == "int8" else 0)))


def shards(clips: Sequence[Clip]) -> list[list[Clip]]:
    """At most ten minutes each (or one longer clip), longest first, whatever order they come in."""
    parts: list[list[Clip]] = []
    filled = SHARD_SECONDS
    for clip in sorted(clips, key=lambda clip: (-clip.seconds, clip.key)):
        if filled + clip.seconds > SHARD_SECONDS:
            parts.append([])
            filled = 0.0
        parts[-1].append(clip)
        filled += clip.seconds
    return parts


def extract(
    upstream: Upstream,
    clips: Sequence[Clip],
    kinds: Sequence[Kind],
    store: Store,
    *,
    name: str = "",
    share_cnn: bool = False,
    batch_seconds: float = 32.0,
    what: str = "",
) -> None:
    """Pass `clips` through the upstream once and keep what the store misses of `kinds`.

    share_cnn: where the upstream says which CNN it has, the CNN's outputs are kept too, and taken
    from the store for clips that passed any upstream with the same CNN. Kind "cnn" implies it.
    what: in lines about progress, which else begin with `name`.
    Raises UserError for audio, hidden states or a store that cannot be used.
    """
    upstream.eval()
    cnn = upstream.cnn_fingerprint() if share_cnn or "cnn" in kinds else None
    if "cnn" in kinds and cnn is None:
        raise ValueError(f"{name}: has no CNN to share")
    fingerprint = upstream.fingerprint()
    targets: list[Target] = [(fingerprint, kind) for kind in kinds if kind != "cnn"]
    first: list[Target] = [(cnn, "cnn")] if cnn else []
    wanted = targets + (first if "cnn" in kinds else [])
    todo = {clip.key: clip for target in wanted for clip in store.missing(*target, clips)}
    parts = shards(list(todo.values()))
    for entry, _ in first + targets if parts else []:
        store.describe(entry, name, upstream.source)
    for number, part in enumerate(parts, 1):
        label = f"{name}: features" + (f", part {number} of {len(parts)}" if parts[1:] else "")
        label = what or label.removeprefix(": ")
        make = partial(_make, upstream, part, store, cnn, batch_seconds, label)
        make(first, convolved)
        make(targets, whole)


def _make(
    upstream: Upstream,
    clips: list[Clip],
    store: Store,
    cnn: str | None,
    batch_seconds: float,
    what: str,
    targets: list[Target],
    run: Run,
) -> None:
    """Compute and write what the targets miss of the clips, which come longest first.

    A process that computes the same just now is waited for; it may leave nothing to do.
    """

    def look() -> dict[Target, list[Clip]]:
        return {target: store.missing(*target, clips) for target in sorted(targets)}

    missing = look()
    while any(missing.values()):
        with ExitStack() as stack:
            writers = {
                target: stack.enter_context(Writer(store.folder(*target), part))
                for target, part in missing.items()
                if part
            }
            expected, missing = missing, look()
            if missing == expected:
                todo = [clip for clip in clips if any(clip in w.wanted for w in writers.values())]
                source = Source(upstream, todo, store, cnn, run, verify=True)
                _write(source, writers, batch_seconds, what)
                return


def _write(source: Source, writers: dict[Target, Writer], batch_seconds: float, what: str) -> None:
    order = batches(source.clips, batch_seconds)
    before: _Leaving | None = None
    for indices, items in progress(ahead(source.read, order), what, len(order)):
        leaving = _Leaving(source, indices, items, [kind for _, kind in writers])
        if before:  # while it is written, a GPU computes the next batch
            before.write(writers)
        before = leaving if leaving.under_way else None
        if not before:
            leaving.write(writers)
    if before:
        before.write(writers)
    for writer in writers.values():
        writer.commit()


class _Leaving:
    """A batch on its way from the device to the disk."""

    def __init__(
        self, source: Source, indices: Sequence[int], items: list[Tensor], kinds: Sequence[Kind]
    ) -> None:
        self.source, self.indices = source, indices
        hidden, means = source.hidden(indices, items)
        self.lens, self.means, self.frames = (
            _sent(hidden.lens),
            _sent(means),
            hidden.layers.shape[2],
        )
        self.coded = dict[Kind, Coded]()
        for kind in kinds:
            if kind != "mean":
                arrays, *facts = encode(kind, hidden.layers, hidden.lens)
                # by utterance and frame, as they are kept
                rows = {name: _sent(x.movedim(0, 2).contiguous()) for name, x in arrays.items()}
                self.coded[kind] = Coded(rows, *map(_sent, facts))
        self.under_way = hidden.layers.is_cuda
        if self.under_way:
            self.sent = torch.cuda.Event()
            self.sent.record()

    def write(self, writers: dict[Target, Writer]) -> None:
        """Wait until it is here, and add it. Raises UserError for what cannot be kept."""
        if self.under_way:
            self.sent.synchronize()
        clips = [self.source.clips[i] for i in self.indices]
        self.source.require(self.indices, self.lens, self.frames, self.means)
        for coded in self.coded.values():
            require(coded.fits, [clip.path for clip in clips])
        for row, (clip, n) in enumerate(zip(clips, self.lens.tolist())):
            for (_, kind), writer in writers.items():
                if clip in writer.wanted:
                    arrays, error = self._of(kind, row, n)
                    writer.add(clip, arrays, n, error)

    def _of(self, kind: Kind, row: int, n: int) -> tuple[dict[str, Array], float]:
        """Of one item: means [1, L, D], [T, C] of a CNN, or [T, L, D]; with its error."""
        if kind == "mean":
            return {"rows": self.means[None, :, row].contiguous().numpy()}, 0.0
        arrays, errors, _ = self.coded[kind]
        rows = {name: x[row, :n].numpy() for name, x in arrays.items()}
        if kind == "cnn":
            rows = {name: x[:, 0] for name, x in rows.items()}
        return rows, float(errors[row])


def _sent(x: Tensor) -> Tensor:
    """On its way to the CPU; from a GPU it arrives later, in locked memory."""
    return x.to("cpu", non_blocking=True)


def batches(clips: Sequence[Clip], batch_seconds: float) -> list[list[int]]:
    """Clips, longest first, by index in batches of at most this much audio, padding included."""
    found: list[list[int]] = []
    for index in range(len(clips)):
        if not found or (len(found[-1]) + 1) * clips[found[-1][0]].seconds > batch_seconds:
            found.append([])
        found[-1].append(index)
    return found
