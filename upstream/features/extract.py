"""Hidden states of utterances: each passes the encoder once, what is kept is read from disk.

`extract` writes what the store misses, `Store.open` reads it in batches. The outputs of the frozen
CNN, which Speech-FT never trains, can be kept too: every upstream with the same CNN starts there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor

from upstream.base import SAMPLE_RATE, Hidden, Upstream
from upstream.common.progress import progress
from upstream.features.clips import Clip, require_unchanged
from upstream.features.codec import Features, Kind, encode
from upstream.features.forward import (
    Run,
    ahead,
    contextual,
    convolved,
    halving,
    require_finite,
    whole,
)
from upstream.features.shards import Writer
from upstream.features.store import Store

SHARD_SECONDS = 600.0
UTTERANCE = 4.0  # seconds, for an estimate
Target = tuple[str, Kind]  # fingerprint and kind: an entry of the store
BYTES = {"mean": 4.0, "float16": 2.0, "int8": 1.0, "cnn": 4.0}  # of one number


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
    fingerprint = upstream.fingerprint()
    targets: list[Target] = [(fingerprint, kind) for kind in kinds if kind != "cnn"]
    first: list[Target] = [(cnn, "cnn")] if cnn else []
    wanted = targets + (first if "cnn" in kinds else [])
    todo = {clip.key: clip for target in wanted for clip in store.missing(*target, clips)}
    parts = shards(list(todo.values()))
    for entry, _ in first + targets if parts else []:
        store.describe(entry, name, upstream.source)
    for number, part in enumerate(parts, 1):
        what = f"{name}: features" + (f", part {number} of {len(parts)}" if parts[1:] else "")
        job = _Job(upstream, part, store, batch_seconds, what.removeprefix(": "))
        if not cnn:
            job.make(targets, whole, _waves)
            continue
        job.make(first, convolved, _waves)
        job.make(targets, contextual, _outputs(store, cnn, part))


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
        for batch, items in progress(ahead(read, batches), self.what, len(batches)):
            hidden = halving(run, self.upstream, items)
            means = hidden.mean()
            require_finite(means, [clip.path for clip in batch])
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
    arrays, error = encode(kind, x, clip.path)
    writer.add(clip, arrays, n, error)


def _waves(batch: list[Clip]) -> list[Tensor]:
    """The audio of a batch, if it is still what its clips were made from."""
    wavs = [clip.load() for clip in batch]
    require_unchanged(batch)
    return wavs


def _outputs(store: Store, cnn: str, clips: list[Clip]) -> Read:
    """What reads the CNN's outputs [T, C] of a batch of these clips."""
    features = store.open(cnn, "cnn", clips)
    row = {clip.key: i for i, clip in enumerate(clips)}
    return lambda batch: unpadded(features, [row[clip.key] for clip in batch])


def unpadded(outputs: Features, rows: Sequence[int]) -> list[Tensor]:
    """The CNN's outputs of some utterances, [T_i, C] each."""
    x, lens = outputs.batch(rows)
    return [frames[:n] for frames, n in zip(x[0], lens.tolist())]


def _batches(clips: list[Clip], batch_seconds: float) -> list[list[Clip]]:
    """Clips, longest first, in batches of at most this much audio, padding included."""
    batches: list[list[Clip]] = []
    for clip in clips:
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].seconds > batch_seconds:
            batches.append([])
        batches[-1].append(clip)
    return batches
