"""Files that processes on several hosts may share: written whole, and leased while in the making.

Nothing here relies on flock(2), which NFS and Lustre may ignore: a lease is a marker file that its
holder keeps refreshing (filelock's SoftFileLease), and a file appears by one rename.

A results folder may come from a stranger. What is read is opened only if it is a regular file of a
sane size; what is written or removed below a guarded folder never goes through a link. All of the
project writes, removes and renames with the functions of this module (tests/test_structure.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from upstream.common.errors import UserError

LEASE = ".lease"
LEASE_SECONDS = 60.0  # a lease that was not refreshed for so long is anybody's; all must agree
BLANK_SECONDS = 5.0  # a lease whose holder was killed before it wrote its name is anybody's then
PART = ".part-"  # how the name of a file in the making begins
UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(UMASK)


RECORD_BYTES = 64 << 20  # a JSON record of one cell, upstream or choice has some kilobytes
TABLE_BYTES = 4 << 30  # predictions and the index of audio files: a line for each utterance
_guarded: set[str] = set()  # absolute paths


class Unreadable(UserError):
    """A read that failed for now, such as EIO, ESTALE or too many open files: no sign of damage."""


def guard(folder: str | Path) -> None:
    """From now on nothing below `folder` is written or removed through a link.

    The folder itself may be a link, and may come into being later.
    """
    _guarded.add(os.path.abspath(folder))


def refuse_links(path: str | Path) -> None:
    """Raises UserError for a link between a guarded folder and `path`, or where `path` ends.

    So for a pipe or a device: below a results folder this program makes files and folders only.
    """
    place = os.path.abspath(path)
    for root in _guarded:
        if not place.startswith(root.rstrip("/") + "/"):
            continue
        current = root
        for part in place[len(root) :].strip("/").split("/"):
            current = os.path.join(current, part)
            try:
                mode = os.lstat(current).st_mode
            except OSError:  # not there yet, or whoever writes is told
                break
            if stat.S_ISLNK(mode):
                raise UserError(
                    f"{current}: is a link, and nothing in a results folder is written or removed "
                    "through one; remove the link (--results itself may be one)"
                )
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise UserError(f"{current}: is a pipe or a device, not a file; remove it")


def require_file(path: str | Path) -> os.stat_result:
    """Size and times of a regular file; UserError for anything else, which might block a reader."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # NUL, or half a character
        raise UserError(f"{str(path)!r}: cannot be a file's name ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is a pipe or a device, not a file; copy its content to a file")
    return status


@contextlib.contextmanager
def open_file(path: str | Path, most: int | None = None) -> Iterator[BinaryIO]:
    """A regular file of at most so many bytes, to read. Raises UserError; of a read that failed
    for now Unreadable.
    """
    require_file(path)
    try:
        # a pipe that took the file's place meanwhile must not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}: is no longer a file")
            if most is not None and status.st_size > most:
                raise UserError(
                    f"{path}: too large ({status.st_size} bytes; at most {most} are read)"
                )
            yield file
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise Unreadable(f"{path}: cannot be read ({reason})") from error


def read(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most so many bytes. Raises UserError, as `open_file`."""
    with open_file(path, most) as file:
        return file.read()


def read_record(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises UserError, as `open_file`, also for what is none."""
    try:
        record = json.loads(read(path, RECORD_BYTES))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error!s:.100})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: is not a JSON object")
    return record


def write(path: Path, content: str | bytes) -> None:
    """A file that is there whole or not at all, even after a power cut. Raises UserError."""
    with writing(path), whole(path) as part, part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_checked(path: Path, data: Any) -> None:
    """Write `data` as a line of JSON and its CRC-32, for `read_checked`. Raises UserError."""
    body = json.dumps(data).encode()
    write(path, body + b"\n%d\n" % zlib.crc32(body))


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote; None where it is not there, not ours or damaged.

    Raises Unreadable for a read that failed for now.
    """
    try:
        body, crc = read(path, TABLE_BYTES).splitlines()
        return json.loads(body) if zlib.crc32(body) == int(crc) else None
    except Unreadable as error:
        if isinstance(error.__cause__, NotADirectoryError):  # a file in a folder's place
            return None
        raise
    except (ValueError, RecursionError):
        return None


def append(path: Path, text: str) -> None:
    """Write at the end of a file, which is made if it is not there. Raises UserError."""
    refuse_links(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with writing(path), os.fdopen(os.open(path, flags, 0o666), "ab") as file:
        file.write(text.encode(errors="backslashreplace"))


def touch(path: Path) -> None:
    """Make an empty file, or note the time of one that is there. Raises UserError."""
    append(path, "")
    with writing(path):
        os.utime(path, follow_symlinks=False)


def make_folder(path: Path) -> None:
    """Make a folder with those above it, unless it is there. Raises UserError."""
    refuse_links(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file; one that is not there is none. Raises UserError.

    A link that stands in its place goes: what it points to stays.
    """
    refuse_links(path.parent)
    with writing(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder and, as far as that works, what is in it. Raises UserError for a link.

    Links in it go, what they point to stays (shutil.rmtree never follows one).
    """
    refuse_links(path)
    shutil.rmtree(path, ignore_errors=True)


def rename(path: Path, other: Path) -> None:
    """Give a file or folder another name at once. Raises UserError for links, else OSError."""
    refuse_links(path)
    refuse_links(other)
    os.replace(path, other)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to, moved to `path` if all went well: nobody ever sees half a file.

    Its name is unique on every host. A killed process leaves it behind; see `lease`. Raises
    UserError for a link in the way, else OSError; see `writing`.
    """
    refuse_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{PART}{uuid.uuid4().hex}{path.suffix[:20]}"
    try:
        yield part
        if part.is_file():  # safetensors writes for the owner alone
            part.chmod(0o666 & ~UMASK)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # what the body raised says more
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def removed(folder: Path) -> Iterator[Path]:
    """A place in `folder` to write to, which is gone afterwards: a trial. Raises UserError."""
    make_folder(folder)
    part = folder / f"{PART}{uuid.uuid4().hex}"
    try:
        yield part
    finally:
        remove_file(part)


# Claims that asked in vain: only one that asks again can tell how long the holder has been silent.
_refused: dict[str, Any] = {}


@contextlib.contextmanager
def lease(folder: Path, *, wait: bool, name: str = LEASE) -> Iterator[bool]:
    """Claim the work in `folder`: True while it is ours.

    Another holder is waited for, or, without `wait`, False comes at once. A killed one's claim is
    free at once on its own host, after LEASE_SECONDS elsewhere, and what it left half-written goes.
    Should one that froze wake up again, both write the same whole files. Raises UserError.
    """
    import filelock  # 30 ms

    place = str((folder / name).absolute())
    make_folder(folder)
    with writing(folder):
        claim = _refused.pop(place, None) or filelock.SoftFileLease(
            place, lease_duration=LEASE_SECONDS, thread_local=False
        )
        while not claim.is_locked:
            refuse_links(place)
            _remove_blank(place)
            try:
                claim.acquire(blocking=False)
            except filelock.Timeout:
                pass
            except filelock.LeaseSettingsMismatch as error:
                raise UserError(f"{place}: is no lease of this program; delete it") from error
            if claim.is_locked:
                break
            _require_lease(place)
            if not wait:
                break
            time.sleep(0.2)
    if not claim.is_locked:
        _refused[place] = claim
        yield False
        return
    try:
        for part in folder.glob(f"{PART}*") if name == LEASE else ():
            with contextlib.suppress(UserError):
                remove_file(part)
        yield True
    finally:
        claim.release()


def _require_lease(place: str) -> None:
    """Raises UserError for a marker that filelock would wait for without end: no lease of ours."""
    try:
        age = abs(time.time() - os.lstat(place).st_mtime)
        with open_file(place) as file:
            text = file.read(1024)
    except FileNotFoundError:
        return
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise
    if text and b"\nmode=lease\n" not in text and age > BLANK_SECONDS:
        raise UserError(f"{place}: is no lease of this program; delete it")


def _remove_blank(place: str) -> None:
    """Remove a marker without a holder's name, for which filelock would wait for ever.

    It is taken aside first: of two that want to remove it one may meanwhile hold a new one.
    """
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(place)
        if status.st_size or time.time() - status.st_mtime < BLANK_SECONDS:
            return
        aside = f"{place}.{uuid.uuid4().hex}"
        os.rename(place, aside)
        if os.stat(aside).st_size:
            with contextlib.suppress(FileExistsError):
                os.link(aside, place)
        os.unlink(aside)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk as one line about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{path}: cannot be written ({reason}); check its permissions and the free space"
        ) from error


def free_bytes(folder: Path) -> int:
    """Free disk where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
