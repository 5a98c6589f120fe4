"""Features on disk, by content: what there is, what is missing, and what may go.

    <root>/<fingerprint>/about.json         name and source, for people
    <root>/<fingerprint>/<kind>/<shard>.*   rows of up to ten minutes of audio (shard.py)

Rows are found by the content of their audio, whichever list of utterances they were extracted
with: tasks that share utterances share their features.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from upstream.common.errors import UserError
from upstream.features import shards as shard
from upstream.features.clips import Clip
from upstream.features.codec import KINDS, Features, Frames, Kind, Means, Rows


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


@dataclass(frozen=True)
class Store:
    """A folder of features."""

    root: Path

    def folder(self, fingerprint: str, kind: Kind) -> Path:
        """Where the shards of an entry are."""
        return self.root / fingerprint / kind

    def missing(self, fingerprint: str, kind: Kind, clips: Sequence[Clip]) -> list[Clip]:
        """The clips whose features are not there: in order, none twice."""
        there = {key for one in shard.read_all(self.folder(fingerprint, kind)) for key in one.keys}
        wanted: dict[str, Clip] = {}
        for clip in clips:
            wanted.setdefault(clip.key, clip)
        return [clip for key, clip in wanted.items() if key not in there]

    def open(self, fingerprint: str, kind: Kind, clips: Sequence[Clip]) -> Features:
        """Features in the order of `clips`, memory-mapped; not evicted while they are alive.

        A shard's checksum is verified when a process first touches it. Raises UserError for
        features that are gone, and in `batch` for a damaged shard, which is removed.
        """
        folder = self.folder(fingerprint, kind)
        lock = shard.use(folder)
        shards = shard.read_all(folder)
        where: dict[str, tuple[int, int, int]] = {}  # shard, first row, frames
        for number, one in enumerate(shards):
            rows = [1] * len(one.lens) if kind == "mean" else one.lens
            firsts = (np.cumsum(rows) - rows).tolist()
            where.update(zip(one.keys, zip([number] * len(rows), firsts, one.lens)))
        try:
            found = np.array([where[clip.key] for clip in clips])
        except KeyError as error:
            lock.close()
            raise UserError(f"{folder}: features are gone; {shard.AGAIN}") from error
        lens = torch.from_numpy(found[:, 2].copy())
        opened = Rows([one.map for one in shards], found[:, :2], lens, shards[0].shape, lock)
        return Means(opened) if kind == "mean" else Frames(opened)

    def error(self, fingerprint: str, clips: Sequence[Clip]) -> float:
        """Relative RMS error of the int8 features of `clips`, measured when they were written."""
        shards = shard.read_all(self.folder(fingerprint, "int8"))
        errors = {key: one.error for one in shards for key in one.keys}
        return sum(errors[clip.key] for clip in clips) / len(clips)

    def entries(self) -> list[Entry]:
        """What there is, least recently used first."""
        folders = [path for path in self.root.glob("*/*") if path.name in KINDS and path.is_dir()]
        return sorted(map(_entry, folders), key=lambda entry: entry.used)

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
        """Remove one entry; False if it is in use."""
        folder = self.folder(entry.fingerprint, entry.kind)
        if not folder.is_dir():
            return False
        try:
            with shard.exclusive(folder / shard.USED, wait=False):
                # renamed first: another process may begin the entry anew while its files go
                os.rename(folder, folder.with_name(f"{time.time_ns()}.gone"))
        except BlockingIOError:
            return False
        for gone in self.root.glob("*/*.gone"):  # a killed process's too
            shutil.rmtree(gone, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process may be as far, or begin anew
                if not any(path.is_dir() for path in gone.parent.iterdir()):
                    (gone.parent / "about.json").unlink(missing_ok=True)
                    gone.parent.rmdir()
        return True

    def describe(self, fingerprint: str, name: str, source: str) -> None:
        """Say whose features these are."""
        path = self.root / fingerprint / "about.json"
        if not path.exists():
            shard.replace(path, json.dumps({"name": name, "source": source}).encode())


def free_bytes(folder: Path) -> int:
    """Free disk where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _entry(folder: Path) -> Entry:
    shards = shard.read_all(folder)
    try:
        name = json.loads((folder.parent / "about.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError):
        name = ""
    used = folder / shard.USED
    try:
        shard.exclusive(used, wait=False).close()
        busy = False
    except BlockingIOError:
        busy = True
    return Entry(
        folder.parent.name,
        cast(Kind, folder.name),
        name,
        len({key for one in shards for key in one.keys}),
        sum(one.seconds for one in shards) / 3600,
        sum(map(_size, folder.iterdir())) / 1e9,
        used.stat().st_mtime,
        busy,
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # renamed by its writer meanwhile
        return 0
