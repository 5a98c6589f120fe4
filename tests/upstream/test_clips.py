"""Clips: a file is known by its content, looked at once, and never believed unchanged wrongly."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.counting import calls
from upstream import audio
from upstream.common import disk
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
    index = tmp_path / "files.json"
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
    index = tmp_path / "files.json"
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
    index = tmp_path / "files.json"
    one(wav, index)
    read = opened(monkeypatch)
    one(wav, index)
    assert read == [str(wav)]


def test_moved_and_copied_files_keep_their_key(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    before = one(wav, index)
    copied = shutil.copy(wav, tmp_path / "copy.wav")
    moved = wav.rename(tmp_path / "moved.wav")
    assert one(Path(copied), index).key == one(moved, index).key == before.key


def test_parts_have_their_own_keys_and_lengths(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
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
        one(wav, tmp_path / "files.json", start, end)
    assert str(found.value) == str(expected.value)


def test_unreadable_files_are_the_errors_of_audio(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("gone.wav", "text.wav", "empty.wav", "."):
        with pytest.raises(UserError) as expected:
            audio.seconds(tmp_path / name)
        with pytest.raises(UserError) as found:
            clips([(str(wav), None, None), (str(tmp_path / name), None, None)], index)
        assert str(found.value) == str(expected.value)


def test_a_damaged_index_is_made_again(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    expected = one(wav, index)
    content = index.read_bytes()
    for damaged in (
        b"not an index" * 500,
        content.replace(expected.digest.encode(), b"0" * 16),
        content[: len(content) // 2],
        b"",
        b"[" * 100_000,
    ):
        index.write_bytes(damaged)
        assert one(wav, index) == expected
        assert index.read_bytes() == content


def test_two_writers_lose_no_more_than_rows(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    copied = Path(shutil.copy(wav, tmp_path / "b.wav"))
    one(wav, index)
    one(copied, index)
    assert len(audiofiles._load(index)) == 2, "the rows of both"


def test_an_interrupted_first_look_goes_on(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    paths = [shutil.copy(wav, tmp_path / f"{number}.wav") for number in range(5)]
    (tmp_path / "4.wav").write_text("not audio")
    with pytest.raises(UserError, match=r"4\.wav: cannot be read as audio"):
        clips([(path, None, None) for path in paths], index)
    assert len(audiofiles._load(index)) == 4


def test_a_killed_first_look_goes_on_and_saving_is_a_small_part_of_it(
    wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many files there are: each is written in a bounded number of savings."""
    paths = [shutil.copy(wav, tmp_path / f"{number}.wav") for number in range(40)]
    monkeypatch.setattr(audiofiles, "SAVE_SECONDS", 1.0)
    clock, saved = [0.0], []
    monkeypatch.setattr(audiofiles.time, "monotonic", lambda: clock[0])
    real_stamp, real_save = audiofiles._stamp, audiofiles._save

    def stamp(path: str) -> str:
        clock[0] += 0.05
        return real_stamp(path)

    def save(index: Path, rows: dict[str, audiofiles._Row]) -> None:
        real_save(index, rows)
        saved.append(len(audiofiles._load(index)))
        clock[0] += 0.2  # so that the next is due 4 s later

    monkeypatch.setattr(audiofiles, "_stamp", stamp)
    monkeypatch.setattr(audiofiles, "_save", save)
    clips([(path, None, None) for path in paths], tmp_path / "files.json")
    assert saved[0] < saved[-1] == 40 and len(saved) <= 3


def test_an_older_index_is_read_again(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    expected = one(wav, index)
    rows = audiofiles._load(index)
    disk.write_checked(index, {path: row[:3] for path, row in rows.items()})
    assert one(wav, index) == expected
    assert audiofiles._load(index) == rows


def test_a_channel_is_audio_of_its_own(tmp_path: Path) -> None:
    path, index = tmp_path / "a.wav", tmp_path / "files.json"
    wave = np.random.default_rng(0).standard_normal((16_000, 2)) / 10
    soundfile.write(path, wave, 16_000, subtype="FLOAT")
    pieces = [(str(path), 0.0, 0.5, channel) for channel in (None, 0, 1)]
    mixed, left, right = clips(pieces, index)
    assert len({mixed.key, left.key, right.key}) == 3 and mixed.channels == 2
    assert np.allclose(left.load(), wave[:8000, 0]) and np.allclose(right.load(), wave[:8000, 1])
    assert audiofiles.overlapping([left.key], [mixed, left, right]) == [mixed, left]
    assert audiofiles.overlapping([mixed.key], [mixed, left, right]) == [mixed, left, right]
    assert audiofiles.overlapping([left.key], [left._replace(start=0.5, end=1.0)]) == []
    with pytest.raises(UserError, match=r"a\.wav: has no channel 2, 0 to 1"):
        clips([(str(path), None, None, 2)], index)


def test_an_index_of_twice_the_size_is_twice_the_work(tmp_path: Path) -> None:
    """Seconds are measured by tests/bench/tables.py."""
    row = audiofiles._Row("123456 1700000000000000000 1700000000000000000 123", 4.5, "0" * 16)
    work = []
    for size in (2_000, 4_000):
        rows = {f"/data/corpus/speaker-{n:06d}/utterance.flac": row for n in range(size)}
        index = tmp_path / "files.json"
        work.append(calls(partial(disk.write_checked, index, rows)))
        work[-1] += calls(partial(audiofiles._load, index))
        assert audiofiles._load(index) == rows
    assert work[1] < 2.1 * work[0]
    assert work[1] < 10 * 4_000, "a few calls a row"


def test_an_index_that_cannot_be_written_is_one_line(wav: Path, tmp_path: Path) -> None:
    for index in (tmp_path, wav / "files.json"):
        with pytest.raises(UserError, match="cannot be written"):
            one(wav, index)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(UserError, match="is a pipe"):
        one(tmp_path / "a.wav", tmp_path / "files.json")
    with pytest.raises(UserError, match="cannot be a file's name"):
        one(Path("a\0.wav"), tmp_path / "files.json")


def test_overlap_is_by_content_and_time(wav: Path, tmp_path: Path) -> None:
    index = tmp_path / "files.json"
    copied = Path(shutil.copy(wav, tmp_path / "copy.wav"))
    other = tmp_path / "other.wav"
    soundfile.write(other, np.zeros(16_000), 16_000)
    early, late = one(wav, index, 1e-5, 0.4), one(wav, index, 0.5, 0.9)
    tail, whole = one(copied, index, 0.8), one(copied, index)
    members = [early, late, tail, whole, one(other, index)]
    assert audiofiles.overlapping({early.key}, members) == [early, whole]
    assert audiofiles.overlapping([late.key], members) == [late, tail, whole]
    assert audiofiles.overlapping({tail.key}, members) == [late, tail, whole]
    assert audiofiles.overlapping({whole.key}, members) == members[:4]
    assert audiofiles.overlapping({one(wav, index, 0.4, 0.5).key}, members) == [whole], "they touch"
    assert audiofiles.overlapping(set(), members) == []
    assert audiofiles.overlapping({f"{whole.digest}:nonsense"}, members) == members[:4]
