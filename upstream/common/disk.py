"""Files that processes on several hosts may share: written whole, and leased while in the making.

Nothing here relies on flock(2), which NFS and Lustre may ignore: a lease is a marker file that its
holder keeps refreshing (filelock's SoftFileLease), and a file appears by one rename.
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
from typing import Any

from upstream.common.errors import UserError

LEASE = ".lease"
LEASE_SECONDS = 60.0  # a lease that was not refreshed for so long is anybody's; all must agree
BLANK_SECONDS = 5.0  # a lease whose holder was killed before it wrote its name is anybody's then
PART = ".part-"  # how the name of a file in the making begins
UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(UMASK)


def require_file(path: str | Path) -> os.stat_result:
    """Size and times of a regular file; UserError for anything else, which might block a reader."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # NUL, or half a character
        raise UserError(f"{str(path)!r}: cannot be a file's name ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is a pipe or a device, not a file; copy its content to a file")
    return status


def read(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most so many bytes. Raises UserError."""
    size = require_file(path).st_size
    if most is not None and size > most:
        raise UserError(f"{path}: too large ({size} bytes; at most {most} are read)")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


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
    """What `write_checked` wrote; None where it is not there, not ours or damaged."""
    try:
        body, crc = path.read_bytes().splitlines()
        return json.loads(body) if zlib.crc32(body) == int(crc) else None
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to, moved to `path` if all went well: nobody ever sees half a file.

    Its name is unique on every host. A killed process leaves it behind; see `lease`.
    """
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
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        claim = _refused.pop(place, None) or filelock.SoftFileLease(
            place, lease_duration=LEASE_SECONDS, thread_local=False
        )
        while not claim.is_locked:
            _remove_blank(place)
            with contextlib.suppress(filelock.Timeout):
                claim.acquire(blocking=False)
            if claim.is_locked or not wait:
                break
            time.sleep(0.2)
    if not claim.is_locked:
        _refused[place] = claim
        yield False
        return
    try:
        for part in folder.glob(f"{PART}*") if name == LEASE else ():
            with contextlib.suppress(OSError):
                part.unlink()
        yield True
    finally:
        claim.release()


def _remove_blank(place: str) -> None:
    """Remove a marker without a holder's name, for which filelock would wait for ever.

    It is taken aside first: of two that want to remove it one may meanwhile hold a new one.
    """
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(place)
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
