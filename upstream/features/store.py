"""Features on disk, by content: what there is, what is missing, and what may go.

    <root>/<fingerprint>/about.json          name and source, for people
    <root>/<fingerprint>/<kind>/<shard>/*    rows of up to ten minutes of audio (shards.py)

Rows are found by the content of their audio: tasks that share utterances share their features.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from upstream.common import disk
from upstream.common.errors import UserError
from upstream.features import device as on_gpu
from upstream.features import shards
from upstream.features.clips import Clip
from upstream.features.codec import Features, Kind
from upstream.features.shards import Array, Shard

ABOUT = "about.json"
PRECISION = "precision.json"  # how far hidden states in low precision are from float32
FINGERPRINT = re.compile(r"[0-9a-f]{1,64}")
GONE = re.compile(r"[0-9]+\.gone")  # an entry that is being removed
IN_MEMORY = 4e9  # bytes of means that are held in memory: VoxCeleb1's three and more


class Entry(NamedTuple):
    """Everything of one kind from one upstream."""

    fingerprint: str
    kind: Kind
    name: str
    clips: int
    hours: float
    gigabytes: float
    used: float  # time stamp of the last use
    busy: bool  # a living process reads or writes it


class Kept:
    """Features on disk; the outputs of a CNN count as one layer. Means are in memory if they fit.

    table: [N, 4] shard, first row, frames and error of each utterance. reading: keeps the entry
    from being evicted as long as this lives.
    """

    def __init__(self, kind: Kind, shelf: list[Shard], table: Array, reading: object) -> None:
        self.shelf, self.reading, self.mean = shelf, reading, kind == "mean"
        self.verified: set[int] = set()
        self.place = table[:, :2].astype(np.int64)
        self.lens = torch.from_numpy(table[:, 2].astype(np.int64))
        self.error = float(np.square(table[:, 3]).mean() ** 0.5)
        *layers, self.dim = shelf[0].arrays["rows"].shape
        self.layers = layers[0] if layers else 1
        self.resident: on_gpu.Resident | None = None
        self.values: Tensor | None = None  # all means [L, N, D]
        if self.mean and 4 * len(table) * self.layers * self.dim <= IN_MEMORY:
            self.values, _ = self.batch(range(len(table)))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As of `Features`. Raises UserError for a damaged shard."""
        chosen = torch.as_tensor(indices)
        lens = self.lens[chosen]
        if self.values is not None:
            return self.values[:, chosen], lens
        counts = [1] * len(lens) if self.mean else lens.tolist()
        # NumPy asks for large pages, PyTorch does not: small ones take as long as the copying
        zeros = np.zeros((self.layers, len(counts), max(counts), self.dim), np.float32)
        x = torch.from_numpy(zeros)
        for row, (index, n) in enumerate(zip(indices, counts)):
            arrays = {name: torch.from_numpy(array) for name, array in self._read(index, n).items()}
            place = x[:, row, :n]
            # converts into place, without a float32 copy, and several times faster than NumPy
            place.copy_(arrays["rows"].view(n, self.layers, self.dim).transpose(0, 1))
            if "scales" in arrays:
                place *= arrays["scales"].T[:, :, None]
        return x[:, :, 0] if self.mean else x, lens

    def rows(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """What is kept of them, as it is kept, for a device to decode: [B, T, L, ...], lens [B].

        Raises UserError for a damaged shard.
        """
        lens = self.lens[torch.as_tensor(indices)]
        counts = [1] * len(lens) if self.mean else lens.tolist()
        whole: dict[str, Array] = {}
        for row, (index, n) in enumerate(zip(indices, counts)):
            for name, array in self._read(index, n).items():
                if name not in whole:
                    shape = (len(counts), max(counts), *array.shape[1:])
                    whole[name] = np.zeros(shape, array.dtype)
                whole[name][row, :n] = array
        return {name: torch.from_numpy(array) for name, array in whole.items()}, lens

    def on(
        self, device: torch.device, order: Iterable[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Each of `order` with its batch on a GPU, where all stays if there is room."""
        if self.resident is None and on_gpu.fits(self, device):
            self.resident = on_gpu.Resident(self, device)
        if self.resident is None:
            yield from on_gpu.batches(self, order, device)
        else:
            for indices in order:
                yield indices, *self.resident.batch(indices)

    def _read(self, index: int, count: int) -> dict[str, Array]:
        """The arrays of an utterance's rows."""
        number, first = self.place[index].tolist()
        shard = self.shelf[number]
        if number not in self.verified:
            shard.verify()
            self.verified.add(number)
        return {array: shard.read(array, first, count) for array in shard.arrays}


@dataclass(frozen=True)
class Store:
    """A folder of features."""

    root: Path  # `cache` in a results folder

    def __post_init__(self) -> None:
        disk.guard(self.root.parent)

    def folder(self, fingerprint: str, kind: Kind) -> Path:
        """Where the shards of an entry are."""
        return self.root / fingerprint / kind

    def missing(self, fingerprint: str, kind: Kind, clips: Sequence[Clip]) -> list[Clip]:
        """The clips whose features are not there: in order, none twice."""
        shelf = shards.read_all(self.folder(fingerprint, kind))
        kept = {key for shard in shelf for key in shard.keys}
        wanted = {clip.key: clip for clip in clips}
        return [clip for key, clip in wanted.items() if key not in kept]

    def open(self, fingerprint: str, kind: Kind, clips: Sequence[Clip]) -> Features:
        """Features in the order of `clips`, memory-mapped; not evicted while they are alive.

        A shard's checksum is verified when a process first touches it. Raises UserError for
        features that are gone, and in `batch` for a damaged shard, which is removed.
        """
        folder = self.folder(fingerprint, kind)
        reading = contextlib.ExitStack()
        reading.enter_context(shards.reading(folder))
        shelf = shards.read_all(folder)
        places: dict[str, tuple[int, int, int, float]] = {}  # shard, first row, frames, error
        for number, shard in enumerate(shelf):
            row = 0
            for key, frames in zip(shard.keys, shard.lens):
                places[key] = (number, row, frames, shard.error)
                row += 1 if kind == "mean" else frames
        try:
            table = np.array([places[clip.key] for clip in clips])
        except KeyError as error:
            raise UserError(f"{folder}: features are gone; {shards.AGAIN}") from error
        arrays = [{name: c[3:] for name, c in shard.arrays.items()} for shard in shelf]
        if any(each != arrays[0] for each in arrays):
            raise UserError(f"{folder}: its shards differ in shape; remove the folder")
        return Kept(kind, shelf, table, reading)

    def entries(self) -> list[Entry]:
        """What there is, least recently used first."""
        folders = [home / kind for home in self._homes() for kind in get_args(Kind)]
        found = [_entry(folder) for folder in folders if _is_folder(folder)]
        return sorted(found, key=lambda entry: entry.used)

    def _homes(self) -> list[Path]:
        """The folders of all fingerprints; links and other names are none of ours."""
        if not _is_folder(self.root):
            return []
        named = (path for path in self.root.iterdir() if FINGERPRINT.fullmatch(path.name))
        return sorted(path for path in named if _is_folder(path))

    def evict(
        self, bytes_needed: int, budget_gb: float, keep: set[tuple[str, Kind]]
    ) -> list[Entry]:
        """Remove the least recently used entries until `bytes_needed` more fit the budget.

        Entries in `keep` and those in use stay; if all others together are too little, all stay.
        """
        entries = self.entries()
        excess = sum(entry.gigabytes for entry in entries) + bytes_needed / 1e9 - budget_gb
        free = [e for e in entries if (e.fingerprint, e.kind) not in keep and not e.busy]
        gone: list[Entry] = []
        if excess <= sum(entry.gigabytes for entry in free):
            for entry in free:
                if excess > 0 and self.remove(entry):
                    excess -= entry.gigabytes
                    gone.append(entry)
        return gone

    def remove(self, entry: Entry) -> bool:
        """Remove one entry; False if it is in use, or not all in it is ours: `foreign`."""
        folder = self.folder(entry.fingerprint, entry.kind)
        disk.refuse_links(folder)
        with shards.door(self.root):
            if not _is_folder(folder) or shards.in_use(folder):
                return False
            if shards.foreign(folder):
                return False
            # renamed first: another process may begin the entry anew while its files go
            with disk.writing(folder):
                disk.rename(folder, folder.with_name(f"{time.time_ns()}.gone"))
        for home in self._homes():
            for gone in home.iterdir():
                if GONE.fullmatch(gone.name) and _is_folder(gone):  # a killed process's too
                    disk.remove_folder(gone)
            with contextlib.suppress(OSError):  # another process may be as far, or begin anew
                if {path.name for path in home.iterdir()} <= {ABOUT, PRECISION}:
                    for name in (ABOUT, PRECISION):
                        disk.remove_file(home / name)
                    home.rmdir()
        return True

    def foreign(self, entry: Entry) -> list[str]:
        """What lies in the folder of an entry and is none of ours."""
        return shards.foreign(self.folder(entry.fingerprint, entry.kind))

    def describe(self, fingerprint: str, name: str, source: str) -> None:
        """Say whose features these are."""
        path = self.root / fingerprint / ABOUT
        if disk.read_checked(path) is None:
            disk.write_checked(path, {"name": name, "source": source})


def _entry(folder: Path) -> Entry:
    shelf = shards.read_all(folder)
    about = disk.read_checked(folder.parent / ABOUT)
    name = about.get("name") if isinstance(about, dict) else ""
    return Entry(
        folder.parent.name,
        cast(Kind, folder.name),
        name if isinstance(name, str) and name.isprintable() else "",
        len({key for shard in shelf for key in shard.keys}),
        sum(shard.seconds for shard in shelf) / 3600,
        sum(map(_size, folder.rglob("*"))) / 1e9,
        _status(folder / shards.USED).st_mtime,
        shards.in_use(folder),
    )


def _size(path: Path) -> int:
    status = _status(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, and no link to one."""
    return stat.S_ISDIR(_status(path).st_mode)


def _status(path: Path) -> os.stat_result:
    """Of a path itself, whatever it points to; zeros if it is gone."""
    try:
        return path.lstat()
    except OSError:  # renamed by its writer meanwhile
        return os.stat_result([0] * 10)
