"""A file from the web: bounded, resumed where the line broke, from nobody but who was named."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress

TRIES = 5
PAUSE = 1.0  # seconds before the second try; twice as long before each further one
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20
PROGRESS = 1 << 16  # bytes: a try that brought as many is no failed one
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP's errors that may be over soon
RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class Source(NamedTuple):
    """Where a file is, and whom else its host may send us to."""

    url: str
    largest: int  # bytes
    hosts: Sequence[str] = ()


class _Broken(Exception):
    """The line broke, or the server is busy: another try may do."""


class _Stale(_Broken):
    """What is on disk does not belong to what the server has."""


def download(source: Source, place: Path, what: str) -> None:
    """Fill `place`, a file that may hold the beginning from an earlier call.

    A server that knows the file as it was (If-Range with its ETag or date) sends the rest; any
    other sends the whole. Raises UserError for what no further try can mend, for a file above
    `largest`, and after five tries; what came is kept for the next call.
    """
    fault, tries = _Broken(), 0
    while tries < TRIES:
        before = _size(place)
        if tries:
            time.sleep(PAUSE * 2 ** (tries - 1))
        try:
            return _fetch(source, place, what)
        except _Stale as error:
            place.unlink(missing_ok=True)
            fault = error
        except _Broken as error:
            fault = error
        tries = 1 if _size(place) >= before + PROGRESS else tries + 1
    raise UserError(f"{source.url}: {fault}, {TRIES} times; the same command goes on from here")


def _fetch(source: Source, place: Path, what: str) -> None:
    """One try. Raises _Broken where another may do, else UserError."""
    start, validator = _size(place), _validator(place)
    headers = {"User-Agent": "speech-ft-bench", "Accept-Encoding": "identity"}
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = _open(source, headers)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
            return  # all of it came before
        if error.code == 416:
            raise _Stale("it has no such part of the file") from error
        if error.code in PASSING:
            raise _Broken(f"HTTP status {error.code}") from error
        raise UserError(f"{source.url}: HTTP status {error.code}") from error
    with response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        part = RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status != 206:
            start = 0
        elif part is None or int(part[1]) != start:
            raise _Stale("the server sent another part of the file than was asked for")
        else:  # perhaps not all of the rest
            total = int(part[2])
        if total is not None and total > source.largest:
            _refuse_size(source, place)
        if not start:
            place.unlink(missing_ok=True)
        _note_validator(place, response.headers)
        blocks = _blocks(response)
        megabytes = None if total is None else -(-total // BLOCK)
        with disk.writing(place), place.open("r+b" if start else "wb") as file:
            file.seek(start)
            for block in progress(blocks, f"fetching {what}, MiB", megabytes, start // BLOCK):
                if file.tell() + len(block) > source.largest:
                    _refuse_size(source, place)
                file.write(block)
            file.truncate()
    if total is not None and _size(place) != total:
        raise _Broken(f"{_size(place)} of {total} bytes came")


def _open(source: Source, headers: dict[str, str]) -> Any:
    _require_web(source.url)
    opener = urllib.request.build_opener(_Redirects(source))
    try:
        return opener.open(urllib.request.Request(source.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _Broken(f"no answer ({getattr(error, 'reason', error) or error!r})") from error


def _blocks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(BLOCK)
        except (http.client.HTTPException, OSError) as error:
            raise _Broken(f"the line broke ({error!r})") from error
        if not block:
            return
        yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to a host that is named, and never from https to http."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        first, other = urlsplit(self.source.url), urlsplit(newurl)
        _require_web(newurl)
        if other.hostname not in (first.hostname, *self.source.hosts):
            cure = "if that is right, add the host to `hosts`"
            raise UserError(f"{self.source.url}: sends us to {newurl!r:.200}; {cure}")
        if first.scheme == "https" != other.scheme:
            raise UserError(f"{self.source.url}: sends us to {newurl!r:.200}, without encryption")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_web(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url!r:.200}: an address begins with https:// or http://")


def _refuse_size(source: Source, place: Path) -> NoReturn:
    place.unlink(missing_ok=True)
    fault = f"is larger than the {source.largest} bytes that its recipe allows"
    raise UserError(f"{source.url}: {fault}")


def _size(place: Path) -> int:
    return place.stat().st_size if place.exists() else 0


def _beside(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def _validator(place: Path) -> str:
    """What tells whether the file is still the one that `place` holds the beginning of."""
    content = disk.read_checked(_beside(place))
    return content if isinstance(content, str) else ""


def _note_validator(place: Path, headers: Any) -> None:
    tag = headers.get("ETag", "")
    if not tag.startswith('"'):  # a weak one does not promise the same bytes
        tag = headers.get("Last-Modified", "")
    disk.write_checked(_beside(place), tag)


def forget(place: Path) -> None:
    """Remove `place` and what is noted beside it."""
    for path in (place, _beside(place)):
        path.unlink(missing_ok=True)
