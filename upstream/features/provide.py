"""The one way to features: from the store, extracted now, or recomputed batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from upstream.base import Upstream, valid
from upstream.common import disk
from upstream.features.ahead import ahead
from upstream.features.clips import Clip
from upstream.features.codec import Features, Kind, decode, encode, require
from upstream.features.extract import bytes_of, extract, shape
from upstream.features.forward import Source, convolved
from upstream.features.lengths import frame_counts
from upstream.features.store import Store

Where = Literal["auto", "cache", "recompute"]
FREE_SHARE = 0.5  # of the free disk that frames may take when nobody says where they belong


def provide(
    upstream: Upstream,
    clips: Sequence[Clip],
    kind: Kind,
    store: Store,
    *,
    name: str = "",
    where: Where = "auto",
    share_cnn: bool = False,
    batch_seconds: float = 32.0,
) -> Features:
    """Features of `clips`, in their order.

    What the store has is read. What it misses of means is extracted; of frames too where they may
    be kept (`where`; "auto": they take at most half of the free disk), else all are recomputed
    for every batch. A recomputed frame is rounded like a kept one, and batches are made by the
    same true lengths: on a CPU the bytes of predictions are the same either way.
    name, share_cnn, batch_seconds: as of `extract`. Raises UserError, as `extract` and `open` do.
    """
    upstream.eval()
    entry = upstream.cnn_fingerprint() if kind == "cnn" else upstream.fingerprint()
    missing = store.missing(entry, kind, clips) if entry else list(clips)
    if where == "auto":
        size = bytes_of(upstream, kind, sum(clip.seconds for clip in missing))
        fits = size <= FREE_SHARE * disk.free_bytes(store.root)
        where = "cache" if fits or kind == "mean" else "recompute"
    if entry is None or (missing and where == "recompute" and kind != "mean"):
        return Recomputed(upstream, clips, kind, store)
    if missing:
        extract(
            upstream, missing, [kind], store,
            name=name, share_cnn=share_cnn, batch_seconds=batch_seconds,
        )  # fmt: skip
    return store.open(entry, kind, clips)


Indices = Sequence[int]


def in_order(
    features: Features, order: Iterable[Indices], device: torch.device | str | None = None
) -> Iterator[tuple[Indices, Tensor, Tensor]]:
    """Each of `order` with its `features.batch`: x where it comes, or on a device; lens [B] of the
    CPU. What has to be read or decoded for a GPU is read ahead in threads."""
    if isinstance(features, Recomputed):
        for indices, items in ahead(features.read, order):
            x, lens = features.compute(indices, items)
            yield indices, x if device is None else x.to(device), lens.cpu()
    elif hasattr(features, "on") and torch.device(device or "cpu").type == "cuda":
        yield from features.on(torch.device(device or "cpu"), order)
    else:
        for indices in order:
            x, lens = features.batch(indices)
            yield indices, x if device is None else x.to(device), lens.cpu()


class Recomputed(Source):
    """Frames computed again for every batch, which comes where the upstream is.

    A batch that is in the store is read there; one whose CNN outputs are, computed from these.
    """

    def __init__(self, upstream: Upstream, clips: Sequence[Clip], kind: Kind, store: Store) -> None:
        if kind == "cnn":
            super().__init__(upstream, clips, store, None, convolved)
        else:
            super().__init__(upstream, clips, store, upstream.cnn_fingerprint())
        self.kind = kind
        entry = upstream.cnn_fingerprint() if kind == "cnn" else upstream.fingerprint()
        missing = {clip.key for clip in store.missing(entry, kind, clips)} if entry else set()
        there = [i for i, clip in enumerate(clips) if entry and clip.key not in missing]
        self.there = {index: row for row, index in enumerate(there)}
        if entry and there:
            self.kept = store.open(entry, kind, [clips[i] for i in there])
        self.layers, self.dim = shape(upstream, kind)
        self.lens = frame_counts(upstream, entry, clips, store, self.run)
        self.squares, self.count = 0.0, 0  # of the codec's errors so far

    @property
    def error(self) -> float:
        """Relative RMS error of int8 over the utterances so far, 0 for other kinds."""
        return (self.squares / max(1, self.count)) ** 0.5

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D], lens [B]. Raises UserError for unreadable audio, a damaged shard."""
        return self.compute(indices, self.read(indices))

    def read(self, indices: Indices) -> list[Tensor]:
        """As of Source; nothing where the store has the frames themselves."""
        return [] if self._kept(indices) else super().read(indices)

    def compute(self, indices: Indices, items: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The batch, from what `read` gave for it."""
        if self._kept(indices):
            return self.kept.batch([self.there[i] for i in indices])
        arrays, lens = self.rounded(indices, items)
        x = decode(arrays)[:, :, : int(lens.max())]  # of kept ones there is no more
        return x.masked_fill(~valid(lens, x.shape[2])[None, :, :, None], 0), lens

    def rounded(self, indices: Indices, items: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """What would be kept of a batch, where the upstream is: arrays [L, B, T, ...], lens [B]."""
        hidden, means = self.hidden(indices, items)
        self.require(indices, hidden.lens, hidden.layers.shape[2], means)
        arrays, error, fits = encode(self.kind, hidden.layers, hidden.lens)
        require(fits, [self.clips[i].path for i in indices])
        self.squares += float(error.double().square().sum())
        self.count += len(indices)
        return arrays, hidden.lens

    def _kept(self, indices: Indices) -> bool:
        return all(i in self.there for i in indices)


def stack(rows: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What was kept of some utterances as a batch: x [L, B, T, D] and lens [B]."""
    first, lens = rows[0]["rows"], [arrays["rows"].shape[1] for arrays in rows]
    # not a tensor of an inference, which a head that is trained may not keep; padding is zero
    x = torch.zeros(len(first), len(rows), max(lens), first.shape[2], device=first.device)
    for row, (arrays, n) in enumerate(zip(rows, lens)):
        x[:, row, :n] = decode(arrays)
    return x, torch.tensor(lens, device=first.device)
