"""Audio files by content: what the features of a moved, copied or edited file are found under.

Headers and content digests are remembered in a small SQLite file beside the cache, under each
file's size, times and inode, so that a corpus is read once and only looked at afterwards.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from upstream import audio
from upstream.common.errors import UserError
from upstream.common.progress import progress

INDEX = "files.sqlite"  # its usual name
QUIET = 2.0  # seconds: two changes this close may leave the same times (NFS, FAT)
THREADS = 8
TOGETHER = 500  # paths in one question to the index; old builds of SQLite take 999
SAVE_EVERY = 2_000  # files; an interrupted first look goes on from here
LEAST = 0.001  # seconds; a shorter part may hold no sample: audio.py decides


class Clip(NamedTuple):
    """A piece of audio: a file, or the part of it between two times in seconds."""

    path: str
    start: float | None
    end: float | None
    seconds: float  # of this part, from the file's header
    digest: str  # 16 hex digits over the whole file's content

    @property
    def key(self) -> str:
        """Identity of this piece of audio, wherever its file lies."""
        if self.start is None and self.end is None:
            return self.digest
        return f"{self.digest}:{self.start or 0.0}-{'' if self.end is None else self.end}"

    def part(self, start: float, end: float) -> Clip:
        """The window between two times in seconds of the file, which must lie inside the file."""
        return self._replace(start=start, end=end, seconds=end - start)

    def load(self) -> Tensor:
        """[N] float32 at 16 kHz. Raises UserError."""
        return audio.load(self.path, self.start, self.end)


def clips(parts: Sequence[tuple[str, float | None, float | None]], index: Path) -> list[Clip]:
    """A `Clip` for each (path, start, end), from headers and contents remembered in `index`.

    Files whose size, times and inode are as remembered are not opened. Raises UserError for a
    missing or unreadable file, a part outside its file, and an index that cannot be written.
    """
    whole = _whole(list(dict.fromkeys(path for path, _, _ in parts)), index)
    return [
        Clip(path, start, end, _seconds(path, start, end, whole[path].seconds), whole[path].digest)
        for path, start, end in parts
    ]


def digest(path: str | Path) -> str:
    """16 hex digits (BLAKE2b) over a file's content. Raises UserError."""
    found = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return found.hexdigest()


def require_unchanged(members: Iterable[Clip]) -> None:
    """Raises UserError if a file is no longer what its clip was made from."""
    for path, expected in {(clip.path, clip.digest) for clip in members}:
        if digest(path) != expected:
            raise UserError(f"{path}: changed during this run; the same command reads it again")


def _seconds(path: str, start: float | None, end: float | None, whole: float) -> float:
    """As audio.seconds says, which is asked only where its answer may be an error."""
    first, last = start or 0.0, whole if end is None else end
    if first >= 0 and last <= whole and last - first > LEAST:
        return last - first
    return audio.seconds(path, start, end)


class _Row(NamedTuple):
    """What the index remembers of a file."""

    path: str  # absolute
    stamp: str
    seconds: float
    digest: str

    @property
    def check(self) -> int:
        """SQLite notices damage to its structure, but not a changed digit."""
        return zlib.crc32(repr(tuple(self)).encode("utf-8", "surrogatepass"))


def _whole(paths: list[str], index: Path) -> dict[str, _Row]:
    """The rows of whole files."""
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{index.parent}: cannot be written ({error.strerror})") from error
    try:
        return _remembered(paths, index)
    except sqlite3.OperationalError as error:  # locked for a minute, a full disk, no permission
        raise UserError(f"{index}: cannot be used ({error})") from error
    except sqlite3.DatabaseError:  # damaged
        index.unlink(missing_ok=True)
        Path(f"{index}-journal").unlink(missing_ok=True)
        return _remembered(paths, index)


def _remembered(paths: list[str], index: Path) -> dict[str, _Row]:
    with closing(sqlite3.connect(index, timeout=60)) as database:
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path TEXT PRIMARY KEY, stamp TEXT, seconds REAL, digest TEXT, crc INTEGER)"
            )
        names = {path: os.path.abspath(path) for path in paths}
        known = _known(database, list(names.values()))
        found = {}
        for path, name in names.items():
            row = known.get(name)
            if row and row.stamp == _stamp(path):
                found[path] = row
        new = [path for path in paths if path not in found]
        rows = []
        for count, (path, row, quiet) in enumerate(_read(new), 1):
            found[path] = row
            if quiet:
                rows.append((*row, row.check))
            if len(rows) == SAVE_EVERY or count == len(new):
                with database:
                    database.executemany("REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)
                rows.clear()
    return found


def _known(database: sqlite3.Connection, paths: list[str]) -> dict[str, _Row]:
    found = {}
    for first in range(0, len(paths), TOGETHER):
        some = paths[first : first + TOGETHER]
        marks = ",".join("?" * len(some))
        for *content, crc in database.execute(f"SELECT * FROM files WHERE path IN ({marks})", some):
            row = _Row(*content)
            if row.check == crc:
                found[row.path] = row
    return found


def _read(paths: list[str]) -> Iterator[tuple[str, _Row, bool]]:
    """(path, row, whether it may be remembered) of files that the index does not know."""

    def read(path: str) -> tuple[str, _Row, bool]:
        stamp = _stamp(path)
        row = _Row(os.path.abspath(path), stamp, audio.seconds(path), digest(path))
        # a file in the making could change again and keep its times: it is read again next time
        return path, row, stamp == _stamp(path) and time.time() - os.stat(path).st_ctime > QUIET

    with ThreadPoolExecutor(THREADS) as pool:
        yield from progress(pool.map(read, paths), "reading audio files", len(paths))


def _stamp(path: str) -> str:
    """What changes with a file: os.utime restores its mtime, but nothing its ctime."""
    try:
        stat = os.stat(path)
    except OSError:
        return ""  # audio.py knows what to say
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
