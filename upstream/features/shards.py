"""One shard of features on disk: written whole or not at all, verified before it is believed.

    <name>.npy, <name>.scales.npy   rows of its clips
    <name>.json                     whose rows they are, with checksums; written last
    <name>.lock                     only while it is written, or left by a killed process

Without a valid json there is no shard. Locks are flock(2): the system frees a killed process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from upstream.common.errors import UserError
from upstream.features.clips import Clip
from upstream.features.codec import Array, Mapped

FORMAT = 1  # raise when the same audio and weights give other features than before
BLOCK = 1 << 22  # bytes read at once
USED = "used"  # an entry's lock; its time is the entry's last use
AGAIN = "the same command computes it again"

_verified: set[tuple[int, ...]] = set()  # stamps of array files whose checksum was right


class Shard(NamedTuple):
    """A finished shard, as its json describes it."""

    path: Path  # without ending
    keys: list[str]  # of its clips, in the order of their rows
    lens: list[int]  # frames
    shape: list[int]  # of a row: [L, D], or [C] of a CNN
    seconds: float
    arrays: dict[str, tuple[int, int]]  # bytes and CRC-32 of each file
    error: float  # relative RMS error of int8, 0 for the other kinds

    def file(self, array: str) -> Path:
        return _file(self.path, array)

    def verify(self) -> None:
        """Raises UserError, and removes the shard, if a byte of its arrays has changed.

        The files are read once per process.
        """
        for array, (_, crc) in self.arrays.items():
            path = self.file(array)
            try:
                stat = path.stat()
                stamp = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if stamp in _verified:
                    continue
                right = _checksum(path) == crc
            except OSError:
                right = False
            if not right:
                with exclusive(self.path.with_suffix(".lock")):
                    discard(self.path)
                raise UserError(f"{path}: damaged on disk; removed, {AGAIN}")
            _verified.add(stamp)

    def map(self) -> dict[str, Mapped]:
        """Its arrays, verified and memory-mapped. Raises UserError."""
        self.verify()
        return {name: np.load(self.file(name), mmap_mode="r") for name in self.arrays}


def read(path: Path) -> Shard | None:
    """The shard at `path` (without ending), None if there is no whole one."""
    try:
        content, crc = path.with_suffix(".json").read_bytes().splitlines()
        if zlib.crc32(content) != int(crc):
            return None
        found = json.loads(content)
        if found.pop("format") != FORMAT:
            return None
        shard = Shard(path, **found)
        sizes = [shard.file(array).stat().st_size for array in shard.arrays]
    except (OSError, ValueError):  # not there; not ours
        return None
    return shard if sizes == [size for size, _ in shard.arrays.values()] else None


def read_all(folder: Path) -> list[Shard]:
    """Every whole shard in a folder."""
    found = (read(path.with_suffix("")) for path in sorted(folder.glob("*.json")))
    return [shard for shard in found if shard]


def discard(path: Path) -> None:
    """Remove every file of the shard at `path`, the json first; its lock must be held."""
    path.with_suffix(".json").unlink(missing_ok=True)
    for file in path.parent.glob(f"{path.name}.*"):
        file.unlink(missing_ok=True)


class Writer:
    """A shard in the making: rows go to disk as they come, and nobody sees any before `commit`.

    As a context it holds the shard's lock, for which a second process with the same clips waits,
    and leaves a whole shard or nothing. Raises UserError where it cannot write.
    """

    def __init__(self, folder: Path, clips: Sequence[Clip]) -> None:
        """The name of the shard follows from the `clips` it is going to hold."""
        keys = "\n".join(clip.key for clip in clips).encode()
        self.path = folder / hashlib.blake2b(keys, digest_size=8).hexdigest()
        self.columns: dict[str, _Column] = {}
        self.clips: list[Clip] = []
        self.lens: list[int] = []
        self.errors: list[float] = []

    def __enter__(self) -> Writer:
        self.entry = use(self.path.parent)  # or it could be evicted meanwhile
        self.lock = exclusive(self.path.with_suffix(".lock"))
        _clean(self.path.parent, self.path.name)
        return self

    def add(self, clip: Clip, arrays: dict[str, Array], frames: int, error: float) -> None:
        """Append the rows of one clip."""
        for name, array in arrays.items():
            if name not in self.columns:
                self.columns[name] = _Column(_file(self.path, name), array)
            self.columns[name].append(array)
        self.clips.append(clip)
        self.lens.append(frames)
        self.errors.append(error)

    def commit(self) -> None:
        """Make the rows visible."""
        content = {
            "format": FORMAT,
            "keys": [clip.key for clip in self.clips],
            "lens": self.lens,
            "shape": self.columns[""].shape,
            "seconds": sum(clip.seconds for clip in self.clips),
            "error": (sum(e * e for e in self.errors) / len(self.errors)) ** 0.5,
            "arrays": {name: column.close() for name, column in self.columns.items()},
        }
        body = json.dumps(content).encode()
        replace(self.path.with_suffix(".json"), body + b"\n%d\n" % zlib.crc32(body))

    def __exit__(self, *_: object) -> None:
        for column in self.columns.values():
            column.file.close()
        if read(self.path) is None:
            discard(self.path)
        self.path.with_suffix(".lock").unlink(missing_ok=True)
        self.lock.close()
        self.entry.close()


class _Column:
    """One .npy file that grows; its checksum is computed on the way."""

    def __init__(self, path: Path, first: Array) -> None:
        self.path, self.rows, self.crc = path, 0, 0
        self.type, self.shape = first.dtype.str, first.shape[1:]
        with writing(path):
            self.temporary = path.with_suffix(".tmp")
            self.file = self.temporary.open("wb")
            self._header()

    def _header(self) -> None:
        # NumPy pads the header so that the number of rows may grow
        shape = (self.rows, *self.shape)
        facts = {"descr": self.type, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, facts)

    def append(self, array: Array) -> None:
        with writing(self.path):
            self.file.write(array.data)
        self.crc = zlib.crc32(array.data, self.crc)
        self.rows += len(array)

    def close(self) -> tuple[int, int]:
        """Finish the file: its bytes and checksum, as `_checksum` reads it."""
        with writing(self.path):
            size = self.file.tell()
            self.file.seek(0)
            self._header()
            length = self.file.tell()
            self.file.close()
            with self.temporary.open("rb") as file:
                header = file.read(length)
            os.replace(self.temporary, self.path)
        return size, zlib.crc32(header, self.crc)


def _checksum(path: Path) -> int:
    """CRC-32 of a .npy file: of its data, then of its header, which is written last."""
    with path.open("rb") as file:
        start = file.read(10)
        file.seek(10 + int.from_bytes(start[8:], "little"))
        crc = 0
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
        file.seek(0)
        return zlib.crc32(file.read(10 + int.from_bytes(start[8:], "little")), crc)


def _file(path: Path, array: str) -> Path:
    return path.with_name(f"{path.name}.{array}.npy" if array else f"{path.name}.npy")


def _clean(folder: Path, own: str) -> None:
    """Remove what killed processes and damaged disks have left: files without a whole shard."""
    for name in {path.name.split(".")[0] for path in folder.iterdir()} - {USED, own}:
        if read(folder / name):
            continue
        with contextlib.suppress(BlockingIOError), exclusive(folder / f"{name}.lock", wait=False):
            if not read(folder / name):
                discard(folder / name)


def use(folder: Path) -> IO[str]:
    """Note that an entry is used now; until the result is closed nobody evicts it."""
    with writing(folder):
        lock = _locked(folder / USED, fcntl.LOCK_SH)
        os.utime(folder / USED)
    return lock


def exclusive(path: Path, wait: bool = True) -> IO[str]:
    """An exclusive lock until the result is closed. BlockingIOError if taken and not `wait`."""
    with writing(path):
        return _locked(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _locked(path: Path, how: int) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("a"))
                fcntl.flock(file, how)
                # its owner may have removed it meanwhile: the lock of such a file guards nothing
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    stack.pop_all()
                    return file
            except FileNotFoundError:
                pass


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk as one line. BlockingIOError is a lock's and passes."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
