"""One shard of features on disk: a folder that appears whole or not at all, verified when read.

<name>/rows.npy, <name>/scales.npy   rows of its clips
<name>/shard.json                    whose rows they are, with checksums
<name>.lease                         while it is written (see upstream/common/disk.py)
reading-*.lease                      one for each process that uses the shards of the entry
.part-<name>-*/                      a shard in the making, or left by a killed process
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
import stat
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from upstream.common import disk
from upstream.common.errors import UserError
from upstream.features.clips import Clip

Array = np.ndarray[Any, np.dtype[Any]]
FORMAT = 3  # raise when the same audio and weights give other features than before
BLOCK = 1 << 22  # bytes read at once
JSON = "shard.json"
USED = "used"  # its time is the entry's last use
AGAIN = "the same command computes it again"
NAME = re.compile(r"[0-9a-f]{16}")  # of a shard's folder
PART_NAME = re.compile(rf"{re.escape(disk.PART)}([0-9a-f]{{16}})-[0-9a-f]{{32}}")
READER = re.compile(r"reading-[0-9a-f]{32}\.lease")
KINDS = ("<f4", "<f2", "|i1")  # NumPy's names of what rows hold


class Column(NamedTuple):
    """A .npy file of rows. NumPy would read its header with `ast`, which Python 3.11 does not
    bear in two threads at once."""

    bytes: int
    crc: int  # CRC-32
    offset: int  # bytes before the first row
    kind: str  # a NumPy dtype
    shape: list[int]  # of a row


class Shard(NamedTuple):
    """A finished shard, as its json describes it."""

    path: Path  # its folder
    keys: list[str]  # of its clips, in the order of their rows
    lens: list[int]  # frames
    seconds: float
    arrays: dict[str, Column]  # of a row of "rows" the shape is [L, D], or [C] of a CNN
    error: float  # relative RMS error of int8, 0 for the other kinds

    def file(self, array: str) -> Path:
        return self.path / f"{array}.npy"

    def verify(self) -> None:
        """Once per process. Raises UserError, and removes the shard, if a byte has changed.

        Raises Unreadable for a read that failed for now, and removes nothing.
        """
        for array, column in self.arrays.items():
            path = self.file(array)
            try:
                right = _checksum(path, *_stamp(path)) == column.crc
            except FileNotFoundError:
                right = False
            except OSError as error:
                raise disk.Unreadable(f"{path}: cannot be read ({error.strerror})") from error
            if not right:
                with _claim(self.path, wait=True):
                    disk.remove_folder(self.path)
                raise UserError(f"{path}: damaged on disk; removed, {AGAIN}")

    def read(self, array: str, first: int, count: int) -> Array:
        """Some rows of an array. Raises UserError if they are gone.

        Not mapped into memory: a mapping costs a page fault every 4 kB in every epoch.
        """
        column, file = self.arrays[array], self.file(array)
        kind, width = np.dtype(column.kind), math.prod(column.shape)
        offset = column.offset + first * width * kind.itemsize
        try:
            flat = np.fromfile(file, kind, width * count, "", offset)
        except FileNotFoundError as error:  # another process found it damaged
            raise UserError(f"{file}: gone; run the same command again") from error
        except OSError as error:
            raise disk.Unreadable(f"{file}: cannot be read ({error.strerror})") from error
        if len(flat) != width * count:
            raise UserError(f"{file}: is not what {JSON} says; remove its folder, {AGAIN}")
        return flat.reshape(count, *column.shape)


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes with a file. Raises FileNotFoundError for what is no regular file."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(file)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def read(path: Path) -> Shard | None:
    """The shard in the folder `path`, None if there is no whole one.

    Raises Unreadable where that cannot be told for now: it must not count as damaged.
    """
    try:
        shard = _described(path, *_stamp(path / JSON))
        sizes = [_stamp(shard.file(array))[-1] for array in shard.arrays] if shard else []
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise disk.Unreadable(f"{path}: cannot be read ({error.strerror})") from error
    whole = shard and sizes == [column.bytes for column in shard.arrays.values()]
    return shard if whole else None


@functools.cache
def _described(path: Path, *stamp: int) -> Shard | None:
    """What a shard's json says, parsed once per process: every pass looks at all shards.

    None for another format, or if it cannot be what `Writer.commit` wrote.
    """
    facts = disk.read_checked(path / JSON)
    try:
        if facts.pop("format") != FORMAT:
            return None
        facts["arrays"] = {name: Column(*facts["arrays"][name]) for name in facts["arrays"]}
        shard = Shard(path, **facts)
        return shard if _sound(shard) else None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _sound(shard: Shard) -> bool:
    """Whether the numbers of a description fit each other, so that reading stays in the files."""
    keys, lens = shard.keys, shard.lens
    if not all(isinstance(key, str) for key in keys) or len(keys) != len(lens):
        return False
    counts = [*lens, *(n for column in shard.arrays.values() for n in column.shape)]
    if not all(type(n) is int and n > 0 for n in counts) or "rows" not in shard.arrays:
        return False
    numbers = (shard.seconds, shard.error)
    if not all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in numbers):
        return False
    for name, (size, _, offset, kind, shape) in shard.arrays.items():
        if name not in ("rows", "scales") or kind not in KINDS:
            return False
        row = math.prod(shape) * np.dtype(kind).itemsize
        if offset < 10 or (size - offset) not in (row * len(keys), row * sum(lens)):
            return False
    return True


def read_all(folder: Path) -> list[Shard]:
    """Every whole shard of an entry."""
    paths = sorted(path for path in _entries(folder) if NAME.fullmatch(path.name))
    return [shard for shard in map(read, paths) if shard]


def _entries(folder: Path) -> list[Path]:
    """What is in an entry's folder; nothing if it is not there."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise disk.Unreadable(f"{folder}: cannot be read ({error.strerror})") from error


def foreign(folder: Path) -> list[str]:
    """Names in an entry's folder that this program does not make."""
    ours = re.compile(
        rf"{NAME.pattern}|{re.escape(disk.PART)}.*|{USED}"
        rf"|({NAME.pattern}|reading-[0-9a-f]{{32}})\.lease(\..*)?"
    )
    return [path.name for path in _entries(folder) if not ours.fullmatch(path.name)]


class Writer:
    """A shard in the making: rows go to disk as they come, and nobody sees any before `commit`.

    As a context it holds the shard's lease, for which a second process with the same clips waits,
    and leaves a whole shard or nothing. Raises UserError where it cannot write.
    """

    def __init__(self, folder: Path, clips: Sequence[Clip]) -> None:
        """The name of the shard follows from the `clips` it is going to hold."""
        self.wanted = frozenset(clips)
        keys = "\n".join(clip.key for clip in clips).encode()
        self.path = folder / hashlib.blake2b(keys, digest_size=8).hexdigest()
        self.part = folder / f"{disk.PART}{self.path.name}-{uuid.uuid4().hex}"
        self.columns: dict[str, BinaryIO] = {}  # .npy files that grow
        self.types: dict[str, tuple[str, list[int]]] = {}  # with the shape of a row
        self.rows = 0
        self.clips: list[tuple[Clip, int, float]] = []  # with frames and error

    def __enter__(self) -> Writer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading(self.path.parent))  # or it could be evicted meanwhile
            stack.enter_context(_claim(self.path, wait=True))
            _clean(self.path)
            stack.callback(disk.remove_folder, self.part)
            disk.make_folder(self.part)
            self.stack = stack.pop_all()
        return self

    def add(self, clip: Clip, arrays: dict[str, Array], frames: int, error: float) -> None:
        """Append the rows of one clip."""
        with disk.writing(self.path):
            for name, array in arrays.items():
                if name not in self.columns:
                    self.columns[name] = (self.part / f"{name}.npy").open("wb")
                    self.types[name] = array.dtype.str, list(array.shape[1:])
                    self._header(name)
                self.columns[name].write(array.data)
        self.rows += len(arrays["rows"])
        self.clips.append((clip, frames, error))

    def _header(self, name: str) -> None:
        # NumPy pads the header so that the number of rows may grow
        kind, shape = self.types[name]
        facts = {"descr": kind, "fortran_order": False, "shape": (self.rows, *shape)}
        np.lib.format.write_array_header_1_0(self.columns[name], facts)

    def commit(self) -> None:
        """Make the rows visible."""
        clips, lens, errors = zip(*self.clips)
        arrays: dict[str, Column] = {}
        with disk.writing(self.path):
            for name, file in self.columns.items():
                size = file.tell()
                file.seek(0)
                self._header(name)
                offset = file.tell()
                file.close()
                crc = _checksum(self.part / f"{name}.npy")
                arrays[name] = Column(size, crc, offset, *self.types[name])
            facts = {
                "format": FORMAT,
                "keys": [clip.key for clip in clips],
                "lens": lens,
                "seconds": sum(clip.seconds for clip in clips),
                "error": (sum(e * e for e in errors) / len(errors)) ** 0.5,
                "arrays": arrays,
            }
            disk.write_checked(self.part / JSON, facts)
            disk.rename(self.part, self.path)

    def __exit__(self, *_: object) -> None:
        for file in self.columns.values():
            file.close()
        self.stack.close()


@functools.cache
def _checksum(path: Path, *stamp: int) -> int:
    """CRC-32 of a .npy file: of its data, then of its header."""
    with path.open("rb") as file:  # regular, as its stamp tells
        start = file.read(10)
        header = start + file.read(int.from_bytes(start[8:], "little"))
        crc = 0
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return zlib.crc32(header, crc)


def _claim(path: Path, wait: bool) -> contextlib.AbstractContextManager[bool]:
    """The lease of the shard at `path`: whoever holds it may write or remove the shard."""
    return disk.lease(path.parent, wait=wait, name=f"{path.name}.lease")


def _clean(mine: Path) -> None:
    """Remove what killed processes and damaged disks have left in the entry; `mine` is claimed.

    Only folders that are called like a shard, or like one in the making, can be that.
    """
    for path in _entries(mine.parent):
        part = PART_NAME.fullmatch(path.name)
        if not part and not NAME.fullmatch(path.name):
            continue
        disk.refuse_links(path)
        shard = path.with_name(part[1]) if part else path
        if not part and read(path):
            continue
        claim = contextlib.nullcontext(True) if shard == mine else _claim(shard, wait=False)
        with claim as ours:
            if ours and (part or not read(path)):
                disk.remove_folder(path)


def door(root: Path) -> contextlib.AbstractContextManager[bool]:
    """The lease of a whole store, held for moments: while a use is noted or an entry goes."""
    return disk.lease(root, wait=True, name="door.lease")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Use an entry, which is noted as its last use: nobody evicts it meanwhile."""
    with contextlib.ExitStack() as stack:
        with door(folder.parents[1]):
            name = f"reading-{uuid.uuid4().hex}.lease"
            stack.enter_context(disk.lease(folder, wait=False, name=name))
            disk.touch(folder / USED)
        yield


def in_use(folder: Path) -> bool:
    """Whether a living process uses the entry; what dead ones left is removed."""
    for marker in _entries(folder):
        if not READER.fullmatch(marker.name):
            continue
        with contextlib.suppress(FileNotFoundError):
            # one look cannot tell whether another host's process lives, but its holder refreshes it
            if abs(time.time() - marker.lstat().st_mtime) > 10 * disk.LEASE_SECONDS:
                disk.remove_file(marker)
                continue
        with disk.lease(folder, wait=False, name=marker.name) as dead:
            if not dead:
                return True
    return False
