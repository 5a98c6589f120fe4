"""Hidden states of utterances: each passes the encoder once, what is kept is read from disk.

`extract` writes what the store misses, `Store.open` reads it in batches. The outputs of the frozen
CNN, which Speech-FT never trains, can be kept too: every upstream with the same CNN starts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from upstream import audio
from upstream.base import SAMPLE_RATE, Hidden, Upstream
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.features.clips import Clip, require_unchanged
from upstream.features.codec import Features, Kind, encode
from upstream.features.shards import Writer
from upstream.features.store import Store

SHARD_SECONDS = 600.0
AHEAD = 4  # batches that are read, each in a thread, while the encoder works
UTTERANCE = 4.0  # seconds, for an estimate
Target = tuple[str, Kind]  # fingerprint and kind: an entry of the store
BYTES = {"mean": 4.0, "float16": 2.0, "int8": 1.0, "cnn": 4.0}  # of one number


class Recomputed:
    """Frames computed again for every batch: what is left when they do not fit the disk budget.

    With a store, from the CNN's outputs for those utterances whose outputs are kept there.
    """

    def __init__(
        self, upstream: Upstream, clips: Sequence[Clip], store: Store | None = None
    ) -> None:
        self.upstream, self.clips = upstream, clips
        self.layers, self.dim = upstream.num_layers, upstream.dim
        # only used to sort batches by length; the true lengths come with each batch
        self.lens = torch.tensor([int(c.seconds * SAMPLE_RATE / upstream.stride) for c in clips])
        self.outputs: Features | None = None
        self.row: dict[int, int] = {}  # index of a clip -> its row in the outputs
        cnn = upstream.cnn_fingerprint() if store else None
        if store and cnn:
            missing = {clip.key for clip in store.missing(cnn, "cnn", clips)}
            kept = [i for i, clip in enumerate(clips) if clip.key not in missing]
            self.row = {index: row for row, index in enumerate(kept)}
            if kept:
                self.outputs = store.open(cnn, "cnn", [clips[i] for i in kept])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D], lens [B]. Raises UserError for unreadable audio, a damaged shard."""
        if self.outputs and all(i in self.row for i in indices):
            items = _items(self.outputs, [self.row[i] for i in indices])
            hidden = _halving(_contextual, self.upstream, items)
        else:
            hidden = forward(self.upstream, [self.clips[i].load() for i in indices])
        # copies, because a head that is trained may not keep tensors of an inference
        return hidden.layers.to("cpu", copy=True), hidden.lens.to("cpu", copy=True)


def forward(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """Hidden states of unpadded waves [N_i]; a batch that does not fit in memory is halved."""
    return _halving(_whole, upstream, wavs)


def bytes_of(upstream: Upstream, kind: Kind, seconds: float) -> int:
    """About how much disk `kind` takes for this much audio; utterances of 4 s for means."""
    rows = seconds / UTTERANCE if kind == "mean" else seconds * SAMPLE_RATE / upstream.stride
    width = upstream.num_layers * upstream.dim
    if kind == "cnn":
        config: Any = upstream.config  # only an Encoder shares its CNN
        width = config.conv_dim[-1]
    scales = 4 * upstream.num_layers if kind == "int8" else 0
    return round(rows * (width * BYTES[kind] + scales))


def shards(clips: Sequence[Clip]) -> list[list[Clip]]:
    """At most ten minutes each (or one longer clip), longest clips first.

    Equal sets of clips make equal shards, in whatever order they come.
    """
    found: list[list[Clip]] = []
    filled = SHARD_SECONDS
    for clip in sorted(clips, key=lambda clip: (-clip.seconds, clip.key)):
        if filled + clip.seconds > SHARD_SECONDS:
            found.append([])
            filled = 0.0
        found[-1].append(clip)
        filled += clip.seconds
    return found


def extract(
    upstream: Upstream,
    clips: Sequence[Clip],
    kinds: Sequence[Kind],
    store: Store,
    *,
    name: str = "",
    share_cnn: bool = False,
    batch_seconds: float = 32.0,
) -> None:
    """Pass `clips` through the upstream once and keep what the store misses of `kinds`.

    share_cnn: where the upstream says which CNN it has, the CNN's outputs are kept too, and taken
    from the store for clips that passed any upstream with the same CNN. Kind "cnn" implies it.

    Raises UserError for unreadable audio, hidden states that are not finite, and a store that
    cannot be written.
    """
    upstream.eval()
    cnn = upstream.cnn_fingerprint() if share_cnn or "cnn" in kinds else None
    if "cnn" in kinds and cnn is None:
        raise ValueError(f"{name}: has no CNN to share")
    own = upstream.fingerprint()
    targets: list[Target] = [(own, kind) for kind in kinds if kind != "cnn"]
    first: list[Target] = [(cnn, "cnn")] if cnn else []
    wanted = targets + (first if "cnn" in kinds else [])
    todo = {clip.key: clip for target in wanted for clip in store.missing(*target, clips)}
    parts = shards(list(todo.values()))
    for fingerprint, _ in first + targets if parts else []:
        store.describe(fingerprint, name, upstream.source)
    for number, part in enumerate(parts, 1):
        what = f"{name}: features" + (f", part {number} of {len(parts)}" if parts[1:] else "")
        job = _Job(upstream, part, store, batch_seconds, what.removeprefix(": "))
        if not cnn:
            job.make(targets, _whole, _waves)
            continue
        job.make(first, _convolved, _waves)
        job.make(targets, _contextual, _outputs(store, cnn, part))


Run = Callable[[Upstream, list[Tensor]], Hidden]
Read = Callable[[list[Clip]], list[Tensor]]


class _Job(NamedTuple):
    """One shard's worth of clips."""

    upstream: Upstream
    clips: list[Clip]  # longest first
    store: Store
    batch_seconds: float
    what: str

    def make(self, targets: list[Target], run: Run, read: Read) -> None:
        """Compute and write what the targets miss.

        A process that computes the same just now is waited for; it may leave nothing to do.
        """
        missing = self._missing(sorted(targets))
        while any(missing.values()):
            with ExitStack() as stack:
                writers = {
                    target: stack.enter_context(Writer(self.store.folder(*target), clips))
                    for target, clips in missing.items()
                    if clips
                }
                expected, missing = missing, self._missing(list(missing))
                if missing == expected:
                    self._write(missing, writers, run, read)
                    return

    def _missing(self, targets: list[Target]) -> dict[Target, list[Clip]]:
        return {target: self.store.missing(*target, self.clips) for target in targets}

    def _write(
        self,
        missing: dict[Target, list[Clip]],
        writers: dict[Target, Writer],
        run: Run,
        read: Read,
    ) -> None:
        wanted = {(target, clip.key) for target, clips in missing.items() for clip in clips}
        keys = {key for _, key in wanted}
        todo = [clip for clip in self.clips if clip.key in keys]
        batches = _batches(todo, self.batch_seconds)
        for batch, items in progress(_ahead(read, batches), self.what, len(batches)):
            hidden = _halving(run, self.upstream, items)
            means = hidden.mean()
            _require_finite(means, batch)
            for row, clip in enumerate(batch):
                for target, writer in writers.items():
                    if (target, clip.key) in wanted:
                        _keep(writer, target[1], clip, hidden, means, row)
        for writer in writers.values():
            writer.commit()


def _keep(writer: Writer, kind: Kind, clip: Clip, hidden: Hidden, means: Tensor, row: int) -> None:
    """Append one clip, the item `row` of a batch, without its padding."""
    n = int(hidden.lens[row])
    if kind == "mean":
        x = means[None, :, row]
    elif kind == "cnn":
        x = hidden.layers[0, row, :n]
    else:
        x = hidden.layers[:, row, :n].transpose(0, 1)
    arrays, error = encode(kind, x)
    if kind == "float16" and not np.isfinite(arrays[""]).all():
        raise UserError(f"{clip.path}: hidden states too large for float16; do not cache frames")
    writer.add(clip, arrays, n, error)


def _require_finite(means: Tensor, batch: list[Clip]) -> None:
    """Means over valid frames [L, B, D]: one NaN in any frame shows in them."""
    finite = torch.isfinite(means).all(-1).all(0).tolist()
    if not all(finite):
        clip = batch[finite.index(False)]
        raise UserError(f"{clip.path}: the upstream gives NaN or infinite hidden states")


def _waves(batch: list[Clip]) -> list[Tensor]:
    """The audio of a batch, if it is still what its clips were made from."""
    wavs = [clip.load() for clip in batch]
    require_unchanged(batch)
    return wavs


def _outputs(store: Store, cnn: str, clips: list[Clip]) -> Read:
    """What reads the CNN's outputs [T, C] of a batch of these clips."""
    features = store.open(cnn, "cnn", clips)
    row = {clip.key: i for i, clip in enumerate(clips)}
    return lambda batch: _items(features, [row[clip.key] for clip in batch])


def _items(outputs: Features, rows: list[int]) -> list[Tensor]:
    x, lens = outputs.batch(rows)
    return [frames[:n] for frames, n in zip(x[0], lens.tolist())]


def _whole(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    return cast(Hidden, upstream(*_padded(upstream, wavs)))


def _convolved(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """The CNN's outputs as one layer [1, B, T, C]."""
    convolve: Any = upstream.convolve  # an upstream that names its CNN has both halves
    x, _, lens = convolve(*_padded(upstream, wavs))
    return Hidden(x[None], lens)


def _contextual(upstream: Upstream, outputs: list[Tensor]) -> Hidden:
    contextual: Any = upstream.contextual
    x, lens = _padded(upstream, outputs)
    return cast(Hidden, contextual(x, lens, lens))


def _padded(upstream: Upstream, items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N_i, ...] each -> zero-padded [B, N, ...] and lens [B] where the upstream is."""
    device = next((p.device for p in upstream.parameters()), torch.device("cpu"))
    batch, lens = audio.pad(items)
    return batch.to(device), lens.to(device)


def _halving(run: Run, upstream: Upstream, items: list[Tensor]) -> Hidden:
    """Run a batch, or two halves of it where it does not fit in memory."""
    try:
        with torch.inference_mode():
            return run(upstream, items)
    except torch.cuda.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()
    print(f"out of GPU memory with {len(items)} utterances: trying two halves", flush=True)
    halves = [_halving(run, upstream, half) for half in (items[::2], items[1::2])]
    frames = max(half.layers.shape[2] for half in halves)
    count, _, _, dim = halves[0].layers.shape
    layers = halves[0].layers.new_zeros(count, len(items), frames, dim)
    lens = halves[0].lens.new_empty(len(items))
    for offset, half in enumerate(halves):
        layers[:, offset::2, : half.layers.shape[2]] = half.layers
        lens[offset::2] = half.lens
    return Hidden(layers, lens)


def _batches(clips: list[Clip], batch_seconds: float) -> list[list[Clip]]:
    """Clips, longest first, in batches of at most this much audio, padding included."""
    batches: list[list[Clip]] = []
    for clip in clips:
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].seconds > batch_seconds:
            batches.append([])
        batches[-1].append(clip)
    return batches


def _ahead(read: Read, batches: list[list[Clip]]) -> Iterator[tuple[list[Clip], list[Tensor]]]:
    """Batches with what was read for them in threads while the encoder was busy."""
    with ThreadPoolExecutor(AHEAD) as pool:
        ahead = [pool.submit(read, batch) for batch in batches[:AHEAD]]
        for n, batch in enumerate(batches, AHEAD):
            items = ahead.pop(0).result()
            if n < len(batches):
                ahead.append(pool.submit(read, batches[n]))
            yield batch, items
