"""Audio files by content: what the features of a moved, copied or edited file are found under.

Headers and content digests are remembered in a file beside the cache, under each audio file's size,
times and inode, so that a corpus is read once and only looked at afterwards.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from upstream import audio
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress

INDEX = "files.json"  # its usual name
QUIET = 2.0  # seconds: two changes this close may leave the same times (NFS, FAT)
THREADS = 8
SAVE_EVERY = 2_000  # files; an interrupted first look goes on from here
TIMES = re.compile(r"([0-9.]+(?:e[-+]?[0-9]+)?)-([0-9.]+(?:e[-+]?[0-9]+)?)?")  # of a clip's key
DIGEST = re.compile(r"[0-9a-f]{16}")
ROWS = ([str, float, str], [str, int, str])  # types of a row of the index
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
        """The window between two times in seconds, which must lie inside the file."""
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


def overlapping(heard: Collection[str], clips: Iterable[Clip]) -> list[Clip]:
    """The clips that share audio with clip keys `heard`: the same file and overlapping time."""
    spans = defaultdict(list)
    for key in heard:
        content, _, times = key.partition(":")
        match = TIMES.fullmatch(times)  # a key without times is the whole file
        start, end = match.groups() if match else ("0", None)
        spans[content].append((float(start), float(end or "inf")))
    return [
        clip
        for clip in clips
        if any(
            start < (clip.end or math.inf) and (clip.start or 0.0) < end
            for start, end in spans[clip.digest]
        )
    ]


def digest(path: str | Path) -> str:
    """16 hex digits (BLAKE2b) over a file's content. Raises UserError."""
    content = hashlib.blake2b(digest_size=8)
    disk.require_file(path)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return content.hexdigest()


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

    stamp: str
    seconds: float
    digest: str


def _whole(paths: list[str], index: Path) -> dict[str, _Row]:
    """Rows by path. Of two writers of the index the last wins: a lost row is only read again."""
    known = _load(index)
    rows: dict[str, _Row] = {}
    for path in paths:
        row = known.get(os.path.abspath(path))
        if row and row.stamp == _stamp(path):
            rows[path] = row
    unknown = [path for path in paths if path not in rows]
    fresh: dict[str, _Row] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        read = progress(pool.map(_read, unknown), "reading audio files", len(unknown))
        for count, (row, path) in enumerate(zip(read, unknown), 1):
            rows[path] = row
            # a file in the making could change again and keep its times: it is read again next time
            if row.stamp == _stamp(path) and time.time() - os.stat(path).st_ctime > QUIET:
                fresh[os.path.abspath(path)] = row
            if fresh and (len(fresh) == SAVE_EVERY or count == len(unknown)):
                disk.write_checked(index, _load(index) | fresh)
                fresh.clear()
    return rows


def _load(index: Path) -> dict[str, _Row]:
    """Absolute path -> row; nothing where the index is not there or damaged."""
    rows = disk.read_checked(index)
    known = rows.items() if isinstance(rows, dict) else ()
    return {path: _Row(*row) for path, row in known if _is_row(row)}


def _is_row(row: Any) -> bool:
    """Whether the index may hold it: nobody but this program writes there, says the folder."""
    if not isinstance(row, list) or [type(value) for value in row] not in ROWS:
        return False
    return 0 <= row[1] < math.inf and bool(DIGEST.fullmatch(row[2]))


def _read(path: str) -> _Row:
    return _Row(_stamp(path), audio.seconds(path), digest(path))


def _stamp(path: str) -> str:
    """What changes with a file: os.utime restores its mtime, but nothing its ctime."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return ""  # audio.py knows what to say
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
