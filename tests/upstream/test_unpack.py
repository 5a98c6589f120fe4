"""Archives of strangers: nothing leaves the folder, and nothing grows for ever."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.corpora import fault
from upstream.common import unpack as module
from upstream.common.unpack import unpack

LARGEST = 1_000_000


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for info, content in members:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(path: Path, *members: tuple[str, bytes, int]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with nothing but a canary beside the target."""
    (tmp_path / "canary").write_text("alive")
    return tmp_path


def untouched(room: Path) -> bool:
    outside = [p.name for p in room.iterdir() if p.name not in ("a.tgz", "a.zip", "out")]
    return outside == ["canary"] and (room / "canary").read_text() == "alive"


def written(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_both_kinds_unpack_to_the_same_files(room: Path) -> None:
    files = {"c/wav/a.wav": b"abc" * 999, "c/README": b"", "c/deep/er/ü.txt": "é".encode()}
    tar(room / "a.tgz", (member("./c", tarfile.DIRTYPE), b""),
        *((member(name), content) for name, content in files.items()))  # fmt: skip
    zipped(room / "a.zip", ("c/", b"", 0o040755), *((n, c, 0o100644) for n, c in files.items()))
    for name in ("a.tgz", "a.zip"):
        unpack(room / name, room / "out" / name, LARGEST)
        assert written(room / "out" / name) == files
        modes = [p.stat().st_mode for p in (room / "out" / name).rglob("*.wav")]
        assert not any(mode & (stat.S_ISUID | stat.S_IXUSR) for mode in modes)


def test_a_zip_without_modes_is_read(room: Path) -> None:
    unpack(zipped(room / "a.zip", ("b", b"x", 0)), room / "out", LARGEST)
    assert written(room / "out") == {"b": b"x"}


@pytest.mark.parametrize(
    "name",
    ["../canary", "x/../../canary", "/tmp/canary", "..", "a/..", "..\\canary", "C:\\x", "C:x",
     "a\nb", "\x1b[2J", "a\u202eb"],
)  # fmt: skip
def test_a_name_that_leads_out_is_refused(name: str, room: Path) -> None:
    tar(room / "a.tgz", (member("fine"), b"x"), (member(name), b"dead"))
    zipped(room / "a.zip", ("fine", b"x", 0), (name, b"dead", 0))
    for archive in ("a.tgz", "a.zip"):
        line = fault(unpack, room / archive, room / "out" / archive, LARGEST)
        assert "leads elsewhere" in line and "\x1b" not in line
        assert untouched(room) and list(written(room / "out" / archive)) == ["fine"]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "../canary"),
        (tarfile.SYMTYPE, "fine"),
        (tarfile.SYMTYPE, "/etc"),
        (tarfile.LNKTYPE, "../canary"),
        (tarfile.LNKTYPE, "fine"),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
    ],
)
def test_links_and_devices_are_refused(kind: bytes, target: str, room: Path) -> None:
    link = member("link", kind, target)
    tar(room / "a.tgz", (member("fine"), b"x"), (link, b""), (member("link/in"), b"dead"))
    assert "link or a device" in fault(unpack, room / "a.tgz", room / "out", LARGEST)
    assert untouched(room) and list(written(room / "out")) == ["fine"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_of_a_zip_are_refused(kind: int, room: Path) -> None:
    zipped(room / "a.zip", ("link", b"../canary", kind | 0o777), ("link/in", b"dead", 0))
    assert "link or a device" in fault(unpack, room / "a.zip", room / "out", LARGEST)
    assert untouched(room) and not written(room / "out")


def test_a_bomb_stops_at_what_is_allowed(room: Path) -> None:
    zeros = bytes(20_000_000)
    tar(room / "a.tgz", (member("zeros"), zeros))
    zipped(room / "a.zip", *((f"z{i}", zeros, 0) for i in range(2)))
    for name in ("a.tgz", "a.zip"):
        assert (room / name).stat().st_size < 100_000
        line = fault(unpack, room / name, room / "out" / name, LARGEST)
        assert "unpacks to more than its recipe allows" in line
        assert sum(map(len, written(room / "out" / name).values())) <= LARGEST


def test_a_zip_whose_table_lies_about_sizes_is_no_way_round(room: Path) -> None:
    zipped(room / "a.zip", ("z", bytes(20_000_000), 0))
    content = (room / "a.zip").read_bytes()
    place = content.rindex(b"PK\x01\x02") + 24
    (room / "a.zip").write_bytes(content[:place] + struct.pack("<I", 10) + content[place + 4 :])
    fault(unpack, room / "a.zip", room / "out", LARGEST)
    assert sum(map(len, written(room / "out").values())) <= LARGEST


def test_a_tar_with_an_endless_name_is_refused(room: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10**9
    with gzip.open(room / "a.tgz", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(1_000_000))
    assert "a header of 1000000000 bytes" in fault(unpack, room / "a.tgz", room / "out", LARGEST)


def test_a_sparse_file_is_refused(room: Path) -> None:
    info = member("sparse", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"7" * 11 + b"\0"  # claims 8 GB
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with gzip.open(room / "a.tgz", "wb") as file:
        file.write(bytes(header) + bytes(2048))
    assert "link or a device" in fault(unpack, room / "a.tgz", room / "out", LARGEST)
    assert not written(room / "out")


def test_too_many_files_are_refused(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS", 5)
    zipped(room / "a.zip", *((str(i), b"", 0) for i in range(6)))
    assert "more than 5 files" in fault(unpack, room / "a.zip", room / "out", LARGEST)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_archive_is_one_line(share: float, room: Path) -> None:
    noise = bytes((i * i * 31 + i // 7) % 251 for i in range(60_000))
    tar(room / "a.tgz", (member("a"), noise), (member("b"), noise[::-1]))
    zipped(room / "a.zip", ("a", noise, 0), ("b", noise[::-1], 0))
    for name in ("a.tgz", "a.zip"):
        content = (room / name).read_bytes()
        (room / name).write_bytes(content[: int(share * len(content))])
        line = fault(unpack, room / name, room / "out" / name, LARGEST)
        assert "damaged or truncated" in line


def test_any_changed_byte_of_content_is_noticed(room: Path) -> None:
    noise = bytes((i * i * 31 + i // 7) % 251 for i in range(6_000))
    for name in ("a.tgz", "a.zip"):
        tar(room / "a.tgz", (member("a"), noise))
        zipped(room / "a.zip", ("a", noise, 0))
        content = bytearray((room / name).read_bytes())
        for place in range(100, len(content) - 120, 97):
            content[place] ^= 1
            (room / name).write_bytes(content)
            fault(unpack, room / name, room / "out" / f"{name}-{place}", LARGEST)
            content[place] ^= 1


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b", b"PK", b"PK\x03\x04", b"BZh9"])
def test_what_is_no_archive_is_one_line(content: bytes, room: Path) -> None:
    (room / "a.zip").write_bytes(content)
    line = fault(unpack, room / "a.zip", room / "out", LARGEST)
    assert ("web page" in line) == (content == b"<html>")


def test_a_file_that_comes_twice_or_as_a_folder_is_refused(room: Path) -> None:
    tar(room / "a.tgz", (member("a"), b"1"), (member("a"), b"2"))
    assert "File exists" in fault(unpack, room / "a.tgz", room / "out" / "1", LARGEST)
    tar(room / "a.tgz", (member("a"), b"1"), (member("a/b"), b"2"))
    assert "cannot be written" in fault(unpack, room / "a.tgz", room / "out" / "2", LARGEST)


def test_a_password_is_one_line(room: Path) -> None:
    zipped(room / "a.zip", ("a", b"secret", 0))
    content = bytearray((room / "a.zip").read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (room / "a.zip").write_bytes(content)
    assert "password" in fault(unpack, room / "a.zip", room / "out", LARGEST)
