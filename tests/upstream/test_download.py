"""Downloads from a server that may be hostile or only unlucky."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.corpora import fault
from tests.web import Request, Server, serve
from upstream.common import download as module
from upstream.common.download import Source, download

BODY = bytes(range(256)) * 20_000  # 5 MB
LARGEST = 10_000_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "TIMEOUT", 2.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    yield from serve()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "file"


def whole(request: Request, etag: str = '"1"', body: bytes = BODY) -> None:
    """An honest server: the rest where the file is still the same, else all of it."""
    if "Range" in request.headers and request.headers["If-Range"] == etag:
        if request.start == len(body):
            request.reply(416, Content_Range=f"bytes */{len(body)}")
            return
        part = f"bytes {request.start}-{len(body) - 1}/{len(body)}"
        request.reply(206, body[request.start :], Content_Range=part, ETag=etag)
    else:
        request.reply(200, body, ETag=etag)


def cut(count: int, first: Callable[[Request], None]) -> Callable[[Request], None]:
    """Answer `first` to so many requests, then honestly."""
    left = [count]

    def answer(request: Request) -> None:
        left[0] -= 1
        (first if left[0] >= 0 else whole)(request)

    return answer


def test_a_file_comes_whole_and_once(server: Server, place: Path) -> None:
    server.answer = whole
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and len(server.asked) == 1
    download(Source(server.url, LARGEST), place, "x")  # killed before it was unpacked
    assert place.read_bytes() == BODY and server.asked[1]["Range"] == f"bytes={len(BODY)}-"


def test_a_broken_line_goes_on_where_it_broke(server: Server, place: Path) -> None:
    half = len(BODY) // 2
    server.answer = cut(1, lambda r: r.reply(200, BODY[:half], len(BODY), ETag='"1"'))
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY
    assert server.asked[1]["Range"] == f"bytes={half}-" and server.asked[1]["If-Range"] == '"1"'


def test_another_call_goes_on_as_well(server: Server, place: Path) -> None:
    server.answer = lambda r: r.reply(200, BODY[:3_000_000], len(BODY), ETag='"1"')
    line = fault(download, Source(server.url, LARGEST), place, "x")
    assert "3000000 of 5120000 bytes came, 5 times; the same command goes on" in line
    server.answer = whole
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and server.asked[-1]["Range"] == "bytes=3000000-"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(status: int, server: Server, place: Path) -> None:
    server.answer = cut(3, lambda r: r.reply(status))
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and len(server.asked) == 4
    server.answer = lambda r: r.reply(status)
    assert f"HTTP status {status}" in fault(
        download, Source(server.url, LARGEST), place.with_name("other"), "x"
    )


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_is_not_there_is_asked_for_once(status: int, server: Server, place: Path) -> None:
    server.answer = lambda r: r.reply(status)
    assert f"HTTP status {status}" in fault(download, Source(server.url, LARGEST), place, "x")
    assert len(server.asked) == 1


def beginning(place: Path, server: Server, content: bytes = BODY[:1000]) -> None:
    server.answer = lambda r: r.reply(200, content, len(BODY), ETag='"1"')
    fault(download, Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == content
    server.asked.clear()


def test_a_server_that_ignores_ranges_sends_all_again(server: Server, place: Path) -> None:
    beginning(place, server)
    server.answer = lambda r: r.reply(200, BODY, ETag='"1"')
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and "Range" in server.asked[0]


@pytest.mark.parametrize("part", ["bytes 0-4/5", "bytes 7-8/9", "bytes x", "", "items 1000-2/3"])
def test_a_part_that_was_not_asked_for_is_not_taken(part: str, server: Server, place: Path) -> None:
    beginning(place, server)
    server.answer = cut(1, lambda r: r.reply(206, BODY[:4000], Content_Range=part, ETag='"1"'))
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and "Range" not in server.asked[1]


def test_a_server_that_sends_it_in_parts_is_asked_for_all_of_them(
    server: Server, place: Path
) -> None:
    def piecemeal(request: Request) -> None:
        piece = BODY[request.start : request.start + 300_000]
        part = f"bytes {request.start}-{request.start + len(piece) - 1}/{len(BODY)}"
        request.reply(206, piece, Content_Range=part, ETag='"1"')

    server.answer = piecemeal
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and len(server.asked) == 18


def test_a_file_that_changed_is_not_mixed(server: Server, place: Path) -> None:
    beginning(place, server, b"old" * 1000)
    server.answer = lambda r: whole(r, '"2"')
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY


@pytest.mark.parametrize("tag", ['W/"1"', ""])
def test_without_a_strong_tag_or_date_it_begins_anew(tag: str, server: Server, place: Path) -> None:
    server.answer = lambda r: r.reply(200, BODY[:1000], len(BODY), ETag=tag)
    fault(download, Source(server.url, LARGEST), place, "x")
    server.answer = whole
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY and not any("Range" in asked for asked in server.asked)


def test_a_beginning_beyond_the_end_is_dropped(server: Server, place: Path) -> None:
    beginning(place, server, BODY[:2000])
    server.answer = cut(1, lambda r: r.reply(416, Content_Range="bytes */5"))
    download(Source(server.url, LARGEST), place, "x")
    assert place.read_bytes() == BODY


@pytest.mark.parametrize("claimed", [True, False])
def test_more_than_is_allowed_is_refused(claimed: bool, server: Server, place: Path) -> None:
    def endless(request: Request) -> None:
        request.send_response(200)
        request.end_headers()  # no length: until the line is closed
        with pytest.raises(OSError):
            while True:
                request.wfile.write(BODY)
        request.close_connection = True

    server.answer = whole if claimed else endless
    line = fault(download, Source(server.url, 1_500_000), place, "x")
    assert "larger than the 1500000 bytes that its recipe allows" in line and not place.exists()


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("http://localhost:{port}/other", "sends us to 'http://localhost"),
        ("file:///etc/passwd", "HTTP status 302"),
        ("ftp://127.0.0.1/x", "begins with https:// or http://"),
        ("//evil.example/x", "sends us to 'http://evil.example"),
    ],
)
def test_a_redirect_elsewhere_is_refused(
    target: str, part: str, server: Server, place: Path
) -> None:
    target = target.format(port=server.server_address[1])
    server.answer = lambda r: r.reply(302, Location=target)
    assert part in fault(download, Source(server.url, LARGEST), place, "x")
    assert not place.exists() and len(server.asked) == 1


def test_a_redirect_to_a_named_host_is_followed(server: Server, place: Path) -> None:
    target = f"http://localhost:{server.server_address[1]}/other"
    server.answer = cut(1, lambda r: r.reply(302, Location=target))
    download(Source(server.url, LARGEST, ["localhost"]), place, "x")
    assert place.read_bytes() == BODY and len(server.asked) == 2


def test_a_redirect_in_circles_ends(server: Server, place: Path) -> None:
    server.answer = lambda r: r.reply(302, Location=server.url)
    assert "302" in fault(download, Source(server.url, LARGEST), place, "x")


def test_from_https_nobody_leads_to_http() -> None:
    follow = module._Redirects(Source("https://a.example/x", 1)).redirect_request
    line = fault(follow, None, None, 302, "", {}, "http://a.example/x")
    assert "without encryption" in line


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = fault(download, Source(f"http://127.0.0.1:{port}/x", 1), place, "x")
    assert "no answer" in line and "refused" in line


def test_a_silent_server_is_one_line(
    server: Server, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    monkeypatch.setattr(module, "TRIES", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        assert "2 times" in fault(download, Source(url, 1), place, "x")


def test_other_addresses_are_refused(place: Path) -> None:
    for url in ("file:///etc/passwd", "ftp://x/y", "/etc/passwd", "data:,x"):
        assert "begins with https://" in fault(download, Source(url, 10), place, "x")
