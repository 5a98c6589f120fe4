"""Files of several processes: whole or not at all, and one holder at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from upstream.common import disk
from upstream.common.errors import UserError

FORK = multiprocessing.get_context("fork")
PATIENCE = 300.0  # seconds until a wait counts as vain, on a busy machine too


def _hold(folder: Path, line: Any) -> None:
    with disk.lease(folder, wait=True) as ours:
        (folder / f"{disk.PART}mine").write_text("half")
        line.send(ours)
        line.recv()


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    """The number of another process that holds the lease of `folder`."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(folder, there))
    process.start()
    assert here.recv() and process.pid
    reaper = threading.Thread(target=process.join)  # the number of a dead process is in use so long
    reaper.start()
    try:
        yield process.pid
    finally:
        here.send("done")
        reaper.join()


def held(folder: Path) -> bool:
    with disk.lease(folder, wait=False) as ours:
        return not ours


def until_free(folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while held(folder):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with holder(folder):
        assert held(folder)
        assert (folder / f"{disk.PART}mine").exists(), "who holds nothing removes nothing"
        with disk.lease(folder, wait=False, name="other.lease") as ours:
            assert ours
    with disk.lease(folder, wait=True) as ours:
        assert ours and held(folder), "not even for another thread of this process"
        assert os.listdir(folder) == [disk.LEASE], "what was left half-written is gone"
    assert not os.listdir(folder)


def test_a_killed_holder_is_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEASE_SECONDS", 1e6)  # nobody lives to see that one end
    with holder(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
        until_free(tmp_path)
        with disk.lease(tmp_path, wait=True) as ours:
            assert ours and os.listdir(tmp_path) == [disk.LEASE]


def test_a_holder_killed_before_it_wrote_its_name_is_not_waited_for(tmp_path: Path) -> None:
    marker = tmp_path / disk.LEASE
    marker.touch()
    assert held(tmp_path), "its holder may be about to write"
    old = time.time() - disk.BLANK_SECONDS
    os.utime(marker, (old, old))
    with disk.lease(tmp_path, wait=True) as ours:
        assert ours and marker.stat().st_size and held(tmp_path)
    assert not os.listdir(tmp_path)


def test_of_those_who_remove_a_blank_marker_one_holds_the_lease(tmp_path: Path) -> None:
    for _ in range(10):
        marker = tmp_path / "count.lease"
        marker.touch()
        os.utime(marker, (0, 0))
        processes = [FORK.Process(target=_count, args=(tmp_path, 1)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert (tmp_path / "count").read_text() == "40"


def test_a_frozen_holder_is_taken_over_when_its_lease_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LEASE_SECONDS", 3.0)
    with holder(tmp_path) as pid:
        time.sleep(4.0)
        assert held(tmp_path), "it lives: its lease is refreshed"
        os.kill(pid, signal.SIGSTOP)
        with disk.lease(tmp_path, wait=True) as ours:
            assert ours
            os.kill(pid, signal.SIGCONT)
            time.sleep(3.0)
            assert held(tmp_path), "the one that wakes up does not take it back"


def _count(folder: Path, rounds: int) -> None:
    for _ in range(rounds):
        with disk.lease(folder, wait=True, name="count.lease"):
            path = folder / "count"
            number = int(path.read_text()) if path.exists() else 0
            time.sleep(0.002)
            path.write_text(str(number + 1))


def test_asking_again_and_again_takes_over_from_a_silent_holder_as_waiting_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder on another host that was killed: nobody can see that its process is gone."""
    monkeypatch.setattr(disk, "LEASE_SECONDS", 1.5)
    with holder(tmp_path) as number:
        os.kill(number, signal.SIGSTOP)
        begun = time.monotonic()
        until_free(tmp_path)
        os.kill(number, signal.SIGCONT)
        assert time.monotonic() - begun >= 1.5


def test_two_processes_never_hold_it_together(tmp_path: Path) -> None:
    processes = [FORK.Process(target=_count, args=(tmp_path, 8)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "24"


def test_a_lease_ends_with_an_error_and_with_its_last_reference(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk.lease(tmp_path, wait=False):
        raise KeyError
    assert not held(tmp_path)
    context = disk.lease(tmp_path, wait=False)
    context.__enter__()
    assert held(tmp_path)
    del context
    assert not held(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/nowhere")):
        with (
            pytest.raises(UserError, match=r"written \(.+\); check"),
            disk.lease(folder, wait=True),
        ):
            pass
        with pytest.raises(UserError, match="cannot be written"):
            disk.write(folder / "a", "b")


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    disk.write(path, "before")
    with pytest.raises(KeyError), disk.whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and os.listdir(path.parent) == ["a.txt"]
    disk.write(path, b"after")
    assert path.read_text() == "after" and os.listdir(path.parent) == ["a.txt"]


def _write(path: Path, number: int) -> None:
    for _ in range(30):
        disk.write(path, str(number) * 10_000)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    disk.write(path, "0" * 10_000)
    processes = [FORK.Process(target=_write, args=(path, number)) for number in (1, 2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        content = path.read_text()
        assert len(content) == 10_000 and len(set(content)) == 1
    assert os.listdir(tmp_path) == ["a"]


def test_a_changed_byte_of_a_checked_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert disk.read_checked(path) is None
    disk.write_checked(path, {"é\udc80": [1.5, None]})
    assert disk.read_checked(path) == {"é\udc80": [1.5, None]}
    content = path.read_bytes()
    for place in range(len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert disk.read_checked(path) is None, place


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("abc")
    assert disk.read(path) == b"abc" and disk.read(path, most=3) == b"abc"
    with pytest.raises(UserError, match=r"a: too large \(3 bytes; at most 2 are read\)"):
        disk.read(path, most=2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in {
        "b": "no such file",
        ".": "is a folder",
        "pipe": "is a pipe or a device",
        "loop": "cannot be read",
        "a/b": "cannot be read",
        "x" * 300: "cannot be read",
        "a\0": "cannot be a file's name",
        "\ud800": "cannot be a file's name",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            disk.read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_free_space_of_a_folder_to_be(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "not" / "yet") > 0


def test_nothing_below_a_guarded_folder_goes_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_guarded", set())
    outside, real = tmp_path / "outside", tmp_path / "real"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    real.mkdir()
    root = tmp_path / "results"
    root.symlink_to(real)  # the folder itself may be one
    disk.guard(root)
    disk.write(root / "a" / "b.txt", "fine")
    (real / "link").symlink_to(outside)
    (real / "dangling").symlink_to(outside / "new")
    (real / "loop").symlink_to("loop")
    (real / "file").symlink_to(outside / "mine.txt")
    os.mkfifo(real / "pipe")
    for name in ("link", "dangling", "loop", "file", "pipe", "link/mine.txt", "link/a/b"):
        path = root / name
        acts: list[Any] = [
            lambda p: disk.write(p, "x"), lambda p: disk.append(p, "x"), disk.touch,
            disk.make_folder, disk.remove_folder, lambda p: disk.rename(p, root / "c"),
            lambda p: disk.lease(p, wait=True).__enter__(),
            lambda p: disk.lease(root, wait=True, name=p.name).__enter__(),
        ]  # fmt: skip
        for act in acts[: None if "/" not in name else -1]:
            with pytest.raises(UserError, match=r"is a (link|pipe)"):
                act(path)
    disk.remove_file(root / "file")  # the link goes, what it points to stays
    assert [p.name for p in outside.iterdir()] == ["mine.txt"]
    assert (outside / "mine.txt").read_text() == "mine"
    assert not os.path.lexists(root / "file")


@pytest.mark.parametrize("text", ["1\nhost\n", "filelock/2\npid=1\nhost=x\nmode=exclusive\n", "x"])
def test_a_claim_of_another_kind_is_not_waited_for(tmp_path: Path, text: str) -> None:
    marker = tmp_path / disk.LEASE
    for when in (0, time.time() + 1e6):
        marker.write_text(text)
        os.utime(marker, (when, when))
        with pytest.raises(UserError, match="is no lease"), disk.lease(tmp_path, wait=True):
            pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_a_read_that_fails_for_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "a.json"
    disk.write_checked(path, {"a": 1})

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        for read in (disk.read, disk.read_checked, disk.read_record):
            with pytest.raises(disk.Unreadable, match=r"a\.json: cannot be read"):
                read(path)
    assert disk.read_checked(path) == {"a": 1}
