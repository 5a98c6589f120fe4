"""Clips: a file is known by its content, looked at once, and never believed unchanged wrongly."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import soundfile

from upstream import audio
from upstream.common.errors import UserError
from upstream.features import clips as audiofiles
from upstream.features.clips import Clip, clips


@pytest.fixture(autouse=True)
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that tests have just written count as written long ago."""
    monkeypatch.setattr(audiofiles, "QUIET", -1.0)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    return path


def one(path: Path, index: Path, start: float | None = None, end: float | None = None) -> Clip:
    return clips([(str(path), start, end)], index)[0]


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths whose content is read from now on."""
    paths: list[str] = []
    real = audiofiles.digest

    def digest(path: str) -> str:
        paths.append(path)
        return real(path)

    monkeypatch.setattr(audiofiles, "digest", digest)
    return paths


def test_an_unchanged_file_is_read_once(
    wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "i.sqlite"
    first = one(wav, index)
    assert first.seconds == 1.0 and len(first.digest) == 16
    read = opened(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert one(wav, index) == first
    assert one(Path("a.wav"), index).key == first.key
    assert not read


def test_changed_content_is_seen_though_size_and_time_are_the_same(
    wav: Path, tmp_path: Path
) -> None:
    index = tmp_path / "i.sqlite"
    before, stat = one(wav, index), wav.stat()
    content = bytearray(wav.read_bytes())
    content[-2] ^= 1
    wav.write_bytes(content)
    os.utime(wav, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (wav.stat().st_size, wav.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = one(wav, index)
    assert after.key != before.key
    with pytest.raises(UserError, match=r"a\.wav: changed during this run"):
        audiofiles.require_unchanged([after, before])


def test_a_file_in_the_making_is_not_remembered(
    wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audiofiles, "QUIET", 2.0)
    index = tmp_path / "i.sqlite"
    one(wav, index)
    read = opened(monkeypatch)
    one(wav, index)
    assert read == [str(wav)]


def test_moved_and_copied_files_keep_their_key(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "i.sqlite"
    before = one(wav, index)
    copied = shutil.copy(wav, tmp_path / "copy.wav")
    moved = wav.rename(tmp_path / "moved.wav")
    assert one(Path(copied), index).key == one(moved, index).key == before.key


def test_parts_have_their_own_keys_and_lengths(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "i.sqlite"
    whole, part = one(wav, index), one(wav, index, 0.25, 0.75)
    assert part.key != whole.key and part.seconds == 0.5
    assert whole.part(0.25, 0.75) == part
    assert one(wav, index, 0.0, 0.75).key == one(wav, index, None, 0.75).key
    late = one(wav, index, 0.5, 1.2)  # lists are often rounded up a little
    assert late.seconds == audio.seconds(wav, 0.5, 1.2) == 0.5
    assert len(part.load()) == 8_000
    assert np.array_equal(part.load(), audio.load(wav)[4_000:12_000])


@pytest.mark.parametrize(("start", "end"), [(2.0, 3.0), (-0.1, 0.5), (0.5, 0.5), (0.0, 1.6)])
def test_a_part_outside_the_file_is_the_error_of_audio(
    wav: Path, tmp_path: Path, start: float, end: float
) -> None:
    with pytest.raises(UserError) as expected:
        audio.seconds(wav, start, end)
    with pytest.raises(UserError) as found:
        one(wav, tmp_path / "i.sqlite", start, end)
    assert str(found.value) == str(expected.value)


def test_unreadable_files_are_the_errors_of_audio(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "i.sqlite"
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("gone.wav", "text.wav", "empty.wav", "."):
        with pytest.raises(UserError) as expected:
            audio.seconds(tmp_path / name)
        with pytest.raises(UserError) as found:
            clips([(str(wav), None, None), (str(tmp_path / name), None, None)], index)
        assert str(found.value) == str(expected.value)


def test_a_damaged_index_is_made_again(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "i.sqlite"
    expected = one(wav, index)
    index.write_bytes(b"not a database" * 500)
    assert one(wav, index) == expected
    content = index.read_bytes()
    index.write_bytes(content.replace(expected.digest.encode(), b"0" * 16))
    assert one(wav, index) == expected, "a changed digit is noticed"
    index.write_bytes(content[: len(content) // 2])
    assert one(wav, index) == expected
    with sqlite3.connect(index) as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (1,)


def test_an_index_that_cannot_be_written_is_one_line(wav: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        one(wav, tmp_path)  # a folder
    with pytest.raises(UserError, match="cannot be written"):
        one(wav, wav / "i.sqlite")
