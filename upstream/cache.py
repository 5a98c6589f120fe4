"""Hidden states of a list of utterances: extracted once, kept on disk, read back in batches.

`extract` passes every utterance through the upstream once. What is kept is either one time mean per
layer (`mean`, float32) or all frames (`frames`, float16). Shards are written one by one and renamed
when complete, so an interrupted extraction goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from upstream import audio
from upstream.base import SAMPLE_RATE, Hidden, Upstream
from upstream.errors import UserError
from upstream.progress import progress

SHARD_SECONDS = 600.0
Reduce = Literal["mean", "frames"]


class Clip(NamedTuple):
    """A piece of audio: a file, or the part of it between two times in seconds."""

    path: str
    start: float | None
    end: float | None


@cache
def length(clip: Clip) -> float:
    """Seconds of a clip; a header is read once per process. Raises UserError."""
    return audio.seconds(*clip)


class Features(Protocol):
    """Features of N utterances by index."""

    layers: int
    dim: int
    lens: Tensor  # [N] frames

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D] (or [L, B, D] for means) and lens [B]."""


class Means:
    """Time means in memory: [N, L, D] float32."""

    def __init__(self, values: Tensor, lens: Tensor) -> None:
        self.values, self.lens = values, lens
        _, self.layers, self.dim = values.shape

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return self.values[rows].transpose(0, 1), self.lens[rows]


class Frames:
    """All frames of all layers, float16 on disk, memory-mapped shard by shard."""

    def __init__(self, shards: list[np.ndarray], place: np.ndarray, lens: Tensor) -> None:
        self.shards, self.place, self.lens = shards, place, lens  # place [N, 2]: shard, first row
        _, self.layers, self.dim = shards[0].shape

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        lens = self.lens[torch.as_tensor(indices)]
        x = torch.zeros(len(indices), int(lens.max()), self.layers, self.dim)
        for row, index in enumerate(indices):
            shard, first = self.place[index]
            n = int(self.lens[index])
            x[row, :n] = torch.from_numpy(self.shards[shard][first : first + n].astype(np.float32))
        return x.permute(2, 0, 1, 3), lens


class Recomputed:
    """Frames computed again for every batch: what is left when they do not fit the disk budget."""

    def __init__(self, upstream: Upstream, clips: Sequence[Clip]) -> None:
        self.upstream, self.clips = upstream, clips
        self.layers, self.dim = upstream.num_layers, upstream.dim
        samples = [length(clip) * SAMPLE_RATE for clip in clips]
        # only used to sort batches by length; the true lengths come with each batch
        self.lens = (torch.tensor(samples) / upstream.stride).long()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        hidden = forward(self.upstream, [audio.load(*self.clips[i]) for i in indices])
        return hidden.layers.cpu(), hidden.lens.cpu()


def forward(upstream: Upstream, wavs: list[Tensor]) -> Hidden:
    """Hidden states of unpadded waves [N_i]; a batch that does not fit in memory is halved."""
    device = next((p.device for p in upstream.parameters()), torch.device("cpu"))
    batch, lens = audio.pad(wavs)
    try:
        with torch.inference_mode():
            return upstream(batch.to(device), lens.to(device))
    except torch.cuda.OutOfMemoryError:
        if len(wavs) == 1:
            raise
    torch.cuda.empty_cache()
    print(f"out of GPU memory with {len(wavs)} utterances: trying two halves", flush=True)
    halves = [forward(upstream, half) for half in (wavs[::2], wavs[1::2])]
    frames = max(h.layers.shape[2] for h in halves)
    lens = torch.empty(len(wavs), dtype=torch.long, device=device)
    layers = halves[0].layers.new_zeros(
        len(halves[0].layers), len(wavs), frames, halves[0].layers.shape[3]
    )
    for offset, half in enumerate(halves):
        layers[:, offset::2, : half.layers.shape[2]] = half.layers
        lens[offset::2] = half.lens
    return Hidden(layers, lens)


def gigabytes(upstream: Upstream, clips: Sequence[Clip]) -> float:
    """Disk that a frame cache of these clips takes."""
    seconds = sum(map(length, clips))
    per_second = SAMPLE_RATE / upstream.stride * upstream.num_layers * upstream.dim * 2
    return seconds * per_second / 1e9


def key(clips: Sequence[Clip]) -> str:
    """12 hex digits over which files (path, size, time of change) and which parts of them."""
    digest = hashlib.sha256()
    for clip in clips:
        try:
            stat = os.stat(clip.path)
        except OSError as error:
            raise UserError(f"{clip.path}: no such audio file") from error
        digest.update(f"{clip} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def extract(
    upstream: Upstream,
    clips: Sequence[Clip],
    reduces: Sequence[Reduce],
    place: Path,
    what: str = "features",
    batch_seconds: float = 32.0,
) -> None:
    """Pass `clips` through the upstream once and keep what is missing under `place`.

    Raises UserError for unreadable audio and for hidden states that are not finite.
    """
    plan = _shards(clips, batch_seconds)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror})") from error
    missing = [k for k in range(len(plan)) if not all(_there(place, k, r) for r in reduces)]
    batches = [(k, b) for k in missing for b in plan[k]]
    kept: dict[Reduce, list[np.ndarray]] = {r: [] for r in reduces}
    lens: list[int] = []
    upstream.eval()
    for (k, indices), wavs in progress(_read(clips, batches), what, len(batches)):
        hidden = forward(upstream, wavs)
        means = hidden.mean()
        if not torch.isfinite(means).all():
            raise UserError(
                f"{clips[indices[0]].path}: the upstream gives NaN or infinite hidden states"
            )
        for reduce in reduces:
            kept[reduce] += [_rows(means)] if reduce == "mean" else _frames(hidden)
        lens += hidden.lens.tolist()
        if indices is plan[k][-1]:
            _write(place / f"lens-{k}.npy", np.array(lens))
            for reduce, parts in kept.items():
                _write(place / f"{reduce}-{k}.npy", np.concatenate(parts))
                parts.clear()
            lens.clear()


def complete(clips: Sequence[Clip], reduce: Reduce, place: Path) -> bool:
    """Whether everything is there."""
    return place.is_dir() and all(_there(place, k, reduce) for k in range(len(_shards(clips))))


def opened(clips: Sequence[Clip], reduce: Reduce, place: Path) -> Features:
    """Features of `clips` in their order, as `extract` left them under `place`."""
    plan = _shards(clips)
    shards = [np.load(place / f"{reduce}-{k}.npy", mmap_mode="r") for k in range(len(plan))]
    lens = torch.zeros(len(clips), dtype=torch.long)
    where = np.zeros((len(clips), 2), dtype=np.int64)
    for k, shard in enumerate(plan):
        indices = [i for b in shard for i in b]
        frames = np.load(place / f"lens-{k}.npy")
        lens[indices] = torch.from_numpy(frames)
        where[indices, 0] = k
        where[indices, 1] = np.cumsum(frames) - frames
    if reduce == "frames":
        return Frames(shards, where, lens)
    values = torch.empty(len(clips), *shards[0].shape[1:])
    for shard, mapped in zip(plan, shards):
        values[[i for b in shard for i in b]] = torch.from_numpy(np.array(mapped))
    return Means(values, lens)


def _there(place: Path, shard: int, reduce: Reduce) -> bool:
    return (place / f"{reduce}-{shard}.npy").exists()


def _rows(means: Tensor) -> np.ndarray:
    """[L, B, D] -> [B, L, D]."""
    return means.transpose(0, 1).cpu().numpy()


def _frames(hidden: Hidden) -> list[np.ndarray]:
    """[T_i, L, D] float16 per utterance, without padding."""
    frames = hidden.layers.permute(1, 2, 0, 3).to(torch.float16).cpu().numpy()
    return [item[:n] for item, n in zip(frames, hidden.lens.tolist())]


def _shards(clips: Sequence[Clip], batch_seconds: float = 32.0) -> list[list[list[int]]]:
    """Shards of batches of indices, longest first, so that a batch wastes little on padding.

    Which rows a shard holds must not depend on the batch size: it may differ when resuming.
    """
    seconds = [length(clip) for clip in clips]
    shards: list[list[int]] = []
    filled = SHARD_SECONDS
    for i in sorted(range(len(seconds)), key=lambda i: (-seconds[i], i)):
        if filled >= SHARD_SECONDS:
            shards.append([])
            filled = 0.0
        shards[-1].append(i)
        filled += seconds[i]
    return [_batches(shard, seconds, batch_seconds) for shard in shards]


def _batches(order: list[int], seconds: list[float], batch_seconds: float) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * seconds[batches[-1][0]] > batch_seconds:
            batches.append([])
        batches[-1].append(i)
    return batches


def _read(
    clips: Sequence[Clip], batches: list[tuple[int, list[int]]]
) -> Iterator[tuple[tuple[int, list[int]], list[Tensor]]]:
    """Batches with their audio, read and resampled two batches ahead in threads."""

    def read(batch: tuple[int, list[int]]) -> list[Tensor]:
        return [audio.load(*clips[i]) for i in batch[1]]

    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(read, batch) for batch in batches[:2]]
        for n, batch in enumerate(batches):
            wavs = ahead.pop(0).result()
            if n + 2 < len(batches):
                ahead.append(pool.submit(read, batches[n + 2]))
            yield batch, wavs


def _write(path: Path, array: np.ndarray) -> None:
    """Temp and rename: a file that exists is complete."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def free_gigabytes(folder: Path) -> float:
    """Free disk where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9
