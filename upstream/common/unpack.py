"""Archives of strangers: plain files and folders inside the folder meant for them, nothing else."""

from __future__ import annotations

import gzip
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress

MEMBERS = 500_000
BLOCK = 1 << 20
LONGEST_HEADER = 1 << 16  # bytes of a long name or of pax records, which tarfile reads at once
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
DAMAGED = (EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


class Member(NamedTuple):
    """A plain file in an archive, open at its beginning; None: a folder."""

    name: str
    content: IO[bytes] | None


def unpack(archive: Path, folder: Path, largest: int) -> None:
    """Write what a .zip or .tar.gz holds below the new `folder`, at most `largest` bytes.

    No link is ever made, so that no name can lead out. Raises UserError for a link, a device, a
    name that leads elsewhere or comes twice, for more than was allowed, and for a damaged or
    truncated archive. What was written by then stays.
    """
    with disk.writing(folder):
        folder.mkdir(parents=True)
    left = largest
    try:
        members = progress(_members(archive, largest), f"unpacking {archive.name}")
        for number, member in enumerate(members):
            if number >= MEMBERS:
                raise UserError(f"{archive}: holds more than {MEMBERS} files")
            target = folder.joinpath(*_parts(archive, member.name))
            with disk.writing(target):
                if member.content is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    left = _copy(archive, member.content, file, left)
    except DAMAGED as error:
        raise UserError(f"{archive}: is damaged or truncated ({error})") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile's, for a method or a password
        raise UserError(f"{archive}: cannot be unpacked ({error})") from error


def _copy(archive: Path, content: IO[bytes], file: IO[bytes], left: int) -> int:
    """Copy at most `left` bytes; what then is left of them."""
    while block := content.read(BLOCK):
        left -= len(block)
        if left < 0:
            raise UserError(f"{archive}: unpacks to more than its recipe allows")
        file.write(block)
    return left


def _parts(archive: Path, name: str) -> tuple[str, ...]:
    """A name as parts of a path. Raises UserError if it leads out or has odd characters."""
    parts = PurePosixPath(name).parts
    odd = not name.isprintable() or "\\" in name or re.match("[A-Za-z]:", name)
    if odd or name.startswith("/") or ".." in parts:
        raise UserError(f"{archive}: holds {name!r:.200}, which leads elsewhere; it is refused")
    return parts


def _members(archive: Path, largest: int) -> Iterator[Member]:
    with archive.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"PK":
        yield from _zip_members(archive)
    elif magic[:2] == b"\x1f\x8b":
        yield from _tar_members(archive, largest)
    else:
        page = "; it looks like a web page" if magic.lstrip()[:1] == b"<" else ""
        raise UserError(f"{archive}: is no .zip and no .tar.gz{page}")


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = info.external_attr >> 28  # the type in a Unix mode; 0: not said
            if info.is_dir() and kind in (0, 4):
                yield Member(info.filename, None)
            elif kind in (0, 8):
                with file.open(info) as content:
                    yield Member(info.filename, content)
            else:
                _refuse(archive, info.filename)


def _tar_members(archive: Path, largest: int) -> Iterator[Member]:
    with gzip.open(archive) as stream:
        bounded: Any = _Bounded(archive, stream, largest)
        with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_Info) as file:
            for info in file:
                if info.isdir():
                    yield Member(info.name, None)
                elif info.isreg() and not info.issparse():
                    yield Member(info.name, file.extractfile(info))
                else:
                    _refuse(archive, info.name)
        while bounded.read(BLOCK):  # gzip's checksum comes last
            pass


def _refuse(archive: Path, name: str) -> None:
    fault = "which is a link or a device; nothing of the kind is unpacked"
    raise UserError(f"{archive}: holds {name!r:.200}, {fault}")


class _Bounded:
    """A stream that ends with an error before it has given far more than `largest` bytes.

    A tar holds half a kilobyte and the padding for each file beside its content.
    """

    def __init__(self, archive: Path, stream: gzip.GzipFile, largest: int) -> None:
        self.archive, self.stream = archive, stream
        self.left = largest + 2048 * MEMBERS

    def read(self, size: int) -> bytes:
        try:
            block = self.stream.read(size)
        except gzip.BadGzipFile as error:  # an OSError, as if of the disk that is written to
            raise tarfile.ReadError(str(error)) from error
        self.left -= len(block)
        if self.left < 0:
            raise UserError(f"{self.archive}: unpacks to more than its recipe allows")
        return block


class _Info(tarfile.TarInfo):
    """A member whose headers are short."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Info:
        """As of TarInfo. Raises tarfile.HeaderError for a name or records without end."""
        info = super().frombuf(buf, encoding, errors)
        if info.type in HEADERS and info.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {info.size} bytes")
        return info
