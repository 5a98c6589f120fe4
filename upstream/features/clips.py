"""Audio files by content: what the features of a moved, copied or edited file are found under.

Headers and content digests are remembered in a file beside the cache, the index, under each audio
file's size, times and inode: a corpus is read once and only looked at afterwards.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upstream import audio
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "files.json"  # its usual name
QUIET = 2.0  # seconds: two changes this close may leave the same times (NFS, FAT)
THREADS = 8
CHUNK = 32  # files that a thread reads at a time
# A killed first look goes on from what was saved. Saving writes the whole index: it may take a
# twentieth of the time, so that many files cost no more each than few.
SAVE_SECONDS = 10.0
SAVE_SHARE = 0.05
TIMES = re.compile(r"([0-9.]+(?:e[-+]?[0-9]+)?)-([0-9.]+(?:e[-+]?[0-9]+)?)?")  # of a clip's key
DIGEST = re.compile(r"[0-9a-f]{16}")
# What the fields of a row of the index are; an older index has no channels and no rate.
ROW_TYPES = {(str, number, str, *sizes) for number in (float, int) for sizes in ((), (int, int))}
LEAST = 0.001  # seconds; a shorter part may hold no sample: audio.py decides


class Piece(NamedTuple):
    """What a corpus asks for: a file, a part of it in seconds, one channel or their average."""

    path: str
    start: float | None = None
    end: float | None = None
    channel: int | None = None  # counted from 0


class Clip(NamedTuple):
    """A piece of audio: a file, or the part of it between two times in seconds."""

    path: str
    start: float | None
    end: float | None
    seconds: float  # of this part, from the file's header
    digest: str  # 16 hex digits over the whole file's content
    channel: int | None = None  # counted from 0; None: the average of all
    channels: int = 1  # of the file
    rate: int = 16_000  # of the file, in Hz

    @property
    def key(self) -> str:
        """Identity of this piece of audio, wherever its file lies."""
        content = self.digest if self.channel is None else f"{self.digest}@{self.channel}"
        if self.start is None and self.end is None:
            return content
        return f"{content}:{self.start or 0.0}-{'' if self.end is None else self.end}"

    def part(self, start: float, end: float) -> Clip:
        """The window between two times in seconds, which must lie inside the file."""
        return self._replace(start=start, end=end, seconds=end - start)

    def load(self) -> Tensor:
        """[N] float32 at 16 kHz. Raises UserError."""
        return audio.load(self.path, self.start, self.end, self.channel)


def clips(parts: Iterable[tuple[Any, ...]], index: Path) -> list[Clip]:
    """A `Clip` for each `Piece`, from headers and contents remembered in `index`.

    parts: Pieces, or (path, start, end). Files whose size, times and inode are as remembered are
    not opened. Raises UserError for a missing or unreadable file, a part outside its file, a
    channel that it does not have, and an index that cannot be written.
    """
    pieces = list(itertools.starmap(Piece, parts))
    rows = _rows(list(dict.fromkeys(piece.path for piece in pieces)), index)
    return [_clip(piece, rows[piece.path]) for piece in pieces]


def _clip(piece: Piece, row: _Row) -> Clip:
    path, start, end, channel = piece
    if channel is not None and not 0 <= channel < row.channels:
        audio.require_channel(path, channel)
    if start is None and end is None:
        length = row.seconds
    else:
        length = _seconds(path, start, end, row.seconds)
    return Clip(path, start, end, length, row.digest, channel, row.channels, row.rate)


class Heard:
    """Audio by content, channel and time, to ask what else shares some of it."""

    def __init__(self, keys: Iterable[str]) -> None:
        """keys: of clips."""
        self.whole: set[str] = set()  # digests of files that were heard to their end, all channels
        self.spans: dict[str, list[tuple[float, float]]] = {}
        self.channels: dict[str, list[str]] = {}  # digest -> contents
        for key in keys:
            if ":" not in key and "@" not in key:
                self.whole.add(key)
                continue
            content, _, times = key.partition(":")
            match = TIMES.fullmatch(times)  # a key without times is the whole file
            start, end = match.groups() if match else ("0", None)
            self.spans.setdefault(content, []).append((float(start), float(end or "inf")))
        for content, spans in self.spans.items():
            self.channels.setdefault(content.partition("@")[0], []).append(content)
            spans[:] = _joined(spans)

    def shares(self, clip: Clip) -> bool:
        """Whether the clip overlaps with what was heard, in a channel or in the average of all."""
        if clip.digest in self.whole:
            return True
        first, last = clip.start or 0.0, math.inf if clip.end is None else clip.end
        for content in self.channels.get(clip.digest, ()):
            channel = content.partition("@")[2]
            if channel and clip.channel is not None and channel != str(clip.channel):
                continue
            spans = self.spans[content]
            before = bisect.bisect_left(spans, (last, -math.inf)) - 1
            if before >= 0 and first < spans[before][1]:
                return True
        return False


def _joined(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """In order, those that overlap as one: the last that begins before a time ends last."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def overlapping(heard: Collection[str], clips: Iterable[Clip]) -> list[Clip]:
    """The clips that share audio with clip keys `heard`: the same file and overlapping time."""
    return list(filter(Heard(heard).shares, clips))


def digest(path: str | Path) -> str:
    """16 hex digits (BLAKE2b) over a file's content. Raises UserError."""
    content = hashlib.blake2b(digest_size=8)
    disk.require_file(path)
    try:
        with open(path, "rb", buffering=0) as file:
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
    channels: int = 0  # 0: an older index did not say; it is read again
    rate: int = 0


FIELDS = len(_Row._fields)


def _rows(paths: list[str], index: Path) -> dict[str, _Row]:
    """Rows by path. Of two writers of the index the last wins: a lost row is only read again."""
    remembered = _load(index)
    rows: dict[str, _Row] = {}
    for path in paths:
        row = remembered.get(_absolute(path))
        if row and row.channels and row.stamp == _stamp(path):
            rows[path] = row
    unread = [path for path in paths if path not in rows]
    if not unread:
        return rows
    fresh: dict[str, _Row] = {}
    saved, due = time.monotonic(), SAVE_SECONDS
    try:
        for path, row in progress(_read_all(unread), "reading audio files", len(unread)):
            rows[path] = row
            # a file in the making could change again and keep its times: it is read again next time
            if row.stamp == _stamp(path) and time.time() - _changed(row.stamp) > QUIET:
                fresh[_absolute(path)] = row
            if fresh and time.monotonic() - saved > due:
                begun = time.monotonic()
                _save(index, fresh)
                saved = time.monotonic()
                due = max(SAVE_SECONDS, (saved - begun) / SAVE_SHARE)
    finally:  # a file that cannot be read does not cost what was read before it
        if fresh:
            _save(index, fresh)
    return rows


def _absolute(path: str) -> str:
    """As os.path.abspath, which is slow where there is nothing to do."""
    text = os.fspath(path)
    plain = text.startswith("/") and "//" not in text and "/." not in text
    return text if plain else os.path.abspath(text)


def _read_all(paths: Sequence[str]) -> Iterator[tuple[str, _Row]]:
    """Rows in the order of the paths. Raises UserError for the first that cannot be read."""
    chunks = [paths[first : first + CHUNK] for first in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for chunk, rows in zip(chunks, pool.map(_read_some, chunks)):
                for path, row in zip(chunk, rows):
                    if isinstance(row, UserError):
                        raise row
                    yield path, row
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read_some(paths: Sequence[str]) -> list[_Row | UserError]:
    """The row of each; instead of the first that cannot be read why, and no more."""
    rows: list[_Row | UserError] = []
    for path in paths:
        try:
            rows.append(_read(path))
        except UserError as error:
            return [*rows, error]
    return rows


def _save(index: Path, rows: dict[str, _Row]) -> None:
    """Add rows to what is in the index by now. Raises UserError if it cannot be written."""
    merged = _load(index) | rows
    disk.write_checked(index, merged)
    rows.clear()


def _load(index: Path) -> dict[str, _Row]:
    """Absolute path -> row; nothing where the index is not there or damaged."""
    rows = disk.read_checked(index)
    known = rows.items() if isinstance(rows, dict) else ()
    # a later version may have more fields: what it says of those is not known
    return {path: _Row(*row[:FIELDS]) for path, row in known if _is_row(row)}


def _is_row(row: Any) -> bool:
    """Whether the index may hold it: nobody but this program writes there, says the folder."""
    if not isinstance(row, list) or tuple(map(type, row[:FIELDS])) not in ROW_TYPES:
        return False
    if len(row) >= FIELDS and (row[3] < 0 or row[4] < 0):
        return False
    return 0 <= row[1] < math.inf and DIGEST.fullmatch(row[2]) is not None


def _read(path: str) -> _Row:
    stamp, facts = _stamp(path), audio.facts(path)
    return _Row(stamp, facts.seconds, digest(path), facts.channels, facts.rate)


def _stamp(path: str) -> str:
    """What changes with a file: os.utime restores its mtime, but nothing its ctime."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return ""  # audio.py knows what to say
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _changed(stamp: str) -> float:
    """When the file of a `_stamp` last changed, in seconds as time.time(); gone: just now."""
    return int(stamp.split()[2]) / 1e9 if stamp else math.inf
