"""The store: complete or absent, verified, shared by processes, and bounded."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from upstream.base import Hidden, Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.features import extract as cache
from upstream.features import shards
from upstream.features.clips import Clip, clips
from upstream.features.store import Entry, Store


class Logging(Upstream):
    """A user's own class: three numbers per 10 ms, and a line in a file per utterance."""

    num_layers, dim, stride = 2, 3, 160

    def __init__(self, log: Path, scale: float = 1.0) -> None:
        super().__init__()
        self.log = log
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        with self.log.open("a") as file:
            file.write("x" * len(wavs))
        frames = lens // self.stride
        x = wavs[:, : int(frames.max()) * self.stride].unflatten(1, (-1, self.stride))[:, :, :3]
        return Hidden(torch.stack([x, 2 * x]) * self.scale, frames)

    def passed(self) -> int:
        return len(self.log.read_text()) if self.log.exists() else 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def upstream(tmp_path: Path) -> Logging:
    return Logging(tmp_path / "log")


@pytest.fixture
def some(tmp_path: Path) -> list[Clip]:
    return made(tmp_path, 6)


def made(folder: Path, count: int) -> list[Clip]:
    rng = np.random.default_rng(0)
    parts = []
    for i in range(count):
        path = folder / f"{i}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(1_600 + 320 * i), 16_000)
        parts.append((str(path), None, None))
    return clips(parts, folder / "files.json")


def clear(store: Store, prefix: str = "") -> list[Entry]:
    """Remove all that is not in use, of the upstreams whose fingerprints begin with `prefix`."""
    chosen = [entry for entry in store.entries() if entry.fingerprint.startswith(prefix)]
    return [entry for entry in chosen if store.remove(entry)]


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_missing_keeps_order_and_names_none_twice(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    cache.extract(upstream, some[2:4], ["mean"], store)
    asked = [some[5], some[2], some[0], some[5], some[3]]
    assert store.missing(upstream.fingerprint(), "mean", asked) == [some[5], some[0]]
    assert store.missing(upstream.fingerprint(), "float16", some) == some


def test_clips_are_found_whichever_list_they_came_with(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    cache.extract(upstream, some[:3], ["float16"], store)
    cache.extract(upstream, some[1:], ["float16"], store)
    assert upstream.passed() == len(some), "none passed twice"
    order = [some[4], some[0], some[2], some[4]]
    features = store.open(upstream.fingerprint(), "float16", order)
    x, lens = features.batch([0, 1, 2, 3])
    for row, clip in enumerate(order):
        wav = clip.load()
        n = len(wav) // 160
        assert lens[row] == features.lens[row] == n
        expected = wav[: n * 160].view(n, 160)[:, :3]
        assert torch.allclose(x[1, row, :n], 2 * expected, atol=1e-3)
        assert not x[:, row, n:].any()


def test_reading_a_corpus_takes_the_memory_of_a_batch(store: Store) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def peak() -> int:
        return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024  # MiB

    made = [Clip("", None, None, 1.0, f"{i:016d}") for i in range(64)]
    for first in range(0, 64, 16):
        with shards.Writer(store.folder("f", "float16"), made[first : first + 16]) as writer:
            for clip in made[first : first + 16]:
                writer.add(clip, {"rows": np.ones((1 << 10, 2, 1 << 10), np.float16)}, 1 << 10, 0.0)
            writer.commit()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak()
    features = store.open("f", "float16", made)  # 256 MiB
    assert sum(int(features.batch([i])[0].sum()) for i in range(64)) == 64 << 21
    assert peak() - before < 64


def test_open_of_what_is_not_there_is_one_line(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    cache.extract(upstream, some[:2], ["mean"], store)
    with pytest.raises(UserError, match="features are gone; the same command"):
        store.open(upstream.fingerprint(), "mean", some)


@pytest.mark.parametrize("kind", ["mean", "float16", "int8"])
@pytest.mark.parametrize("place", [9, 60, 200, -1])  # header's length, header, data, last byte
def test_a_damaged_byte_is_found_on_first_touch(
    store: Store, upstream: Logging, some: list[Clip], kind: cache.Kind, place: int
) -> None:
    fingerprint = upstream.fingerprint()
    cache.extract(upstream, some, [kind], store)
    files = list(store.folder(fingerprint, kind).rglob("*.npy"))
    for file in files:
        damage(file, place)
    with pytest.raises(UserError, match="damaged on disk; removed, the same command") as error:
        features = store.open(fingerprint, kind, some)
        features.batch([0])
    assert "\n" not in str(error.value)
    left = [name for name in names(store.folder(fingerprint, kind)) if "reading" not in name]
    assert left == ["used"]
    assert store.missing(fingerprint, kind, some) == some
    cache.extract(upstream, some, [kind], store)
    store.open(fingerprint, kind, some).batch([0])


def test_a_damaged_scale_is_found(store: Store, upstream: Logging, some: list[Clip]) -> None:
    cache.extract(upstream, some, ["int8"], store)
    damage(next(store.folder(upstream.fingerprint(), "int8").rglob("scales.npy")), -1)
    with pytest.raises(UserError, match=r"scales\.npy: damaged"):
        store.open(upstream.fingerprint(), "int8", some).batch([0])


def test_a_damaged_json_or_short_array_is_no_shard(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    folder = store.folder(upstream.fingerprint(), "float16")
    for ending, harm in (("json", lambda p: damage(p, 40)), ("npy", lambda p: os.truncate(p, 200))):
        cache.extract(upstream, some, ["float16"], store)
        harm(next(folder.rglob(f"*.{ending}")))
        assert store.missing(upstream.fingerprint(), "float16", some) == some
        # its leftovers go when anything is written, whatever the new shard is called
        cache.extract(upstream, some[:2], ["float16"], store)
        assert len(names(folder)) == 2  # the shard, used
        clear(store)


def test_a_shard_that_is_damaged_is_written_again(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    folder = store.folder(upstream.fingerprint(), "mean")
    cache.extract(upstream, some, ["mean"], store)
    before = names(folder)
    (folder / before[0] / "shard.json").unlink()
    cache.extract(upstream, some, ["mean"], store)
    assert names(folder) == before and store.missing(upstream.fingerprint(), "mean", some) == []


def test_a_killed_extraction_leaves_nothing_that_counts(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    """In a process that dies in the middle of a shard, as by kill -9."""
    process = multiprocessing.get_context("fork").Process(target=_die, args=(store, upstream, some))
    process.start()
    process.join()
    assert process.exitcode == 9
    folder = store.folder(upstream.fingerprint(), "int8")
    assert any(name.startswith(".part-") for name in names(folder))
    assert any(name.startswith("reading-") for name in names(folder))
    assert store.missing(upstream.fingerprint(), "int8", some) == some
    assert not store.entries()[0].busy
    cache.extract(upstream, some[1:], ["int8"], store)  # another shard: cleans up all the same
    assert len(names(folder)) == 2  # the shard, used
    shard = folder / min(names(folder))
    assert names(shard) == ["rows.npy", "scales.npy", "shard.json"]


def _die(store: Store, upstream: Logging, some: list[Clip]) -> None:
    with shards.Writer(store.folder(upstream.fingerprint(), "int8"), some) as writer:
        rows: dict[str, np.ndarray] = {
            "rows": np.zeros((9, 2, 3), np.int8),
            "scales": np.ones((9, 2)),
        }
        writer.add(some[0], rows, 9, 0.0)
        writer.columns["rows"].close()  # the first array is done, the second is not
        os._exit(9)


def test_an_error_in_the_middle_leaves_nothing(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    Path(some[0].path).write_bytes(b"gone")  # the shortest, which comes last
    with pytest.raises(UserError, match="cannot be read as audio"):
        cache.extract(upstream, some, ["mean", "int8"], store, batch_seconds=0.2)
    for kind in ("mean", "int8"):
        assert names(store.folder(upstream.fingerprint(), kind)) == ["used"]


def test_two_processes_share_the_work(store: Store, upstream: Logging, some: list[Clip]) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    args = (barrier, store, upstream.log, some)
    processes = [context.Process(target=_extract, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert upstream.passed() == len(some), "each utterance passed in one of the two"
    assert store.missing(upstream.fingerprint(), "float16", some) == []
    store.open(upstream.fingerprint(), "float16", some).batch(range(len(some)))
    assert not list(store.root.rglob("*.lease")) and not list(store.root.rglob(".part-*"))


def test_a_killed_writers_work_is_taken_over_at_once(
    store: Store, upstream: Logging, some: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process computes a shard and is killed; the other, which waited, computes it."""
    monkeypatch.setattr(disk, "LEASE_SECONDS", 1e6)  # a lease of another host's would be so old
    context = multiprocessing.get_context("fork")
    held, killed = context.Event(), context.Event()
    process = context.Process(target=_hold_and_die, args=(store, upstream, some, held, killed))
    process.start()
    held.wait()
    threading.Thread(target=process.join).start()  # or its number would stay in use
    killed.set()
    take_over = threading.Thread(
        target=cache.extract, args=(upstream, some, ["mean"], store), daemon=True
    )
    take_over.start()
    take_over.join(300)
    assert not take_over.is_alive(), "waited in vain"
    assert store.missing(upstream.fingerprint(), "mean", some) == [] and upstream.passed() == 6


def _hold_and_die(store: Store, upstream: Logging, some: list[Clip], held: Any, die: Any) -> None:
    with shards.Writer(store.folder(upstream.fingerprint(), "mean"), cache.shards(some)[0]):
        held.set()
        die.wait()
        time.sleep(0.5)  # the other one waits by now
        os._exit(9)


def _extract(barrier: object, store: Store, log: Path, some: list[Clip]) -> None:
    cache.SHARD_SECONDS = 0.25  # several shards
    barrier.wait()  # type: ignore[attr-defined]
    cache.extract(Logging(log), some, ["mean", "float16"], store)


@contextmanager
def read_elsewhere(folder: Path) -> Iterator[None]:
    """Another process reads an entry."""
    context = multiprocessing.get_context("fork")
    begun, ended = context.Event(), context.Event()
    process = context.Process(target=_read, args=(folder, begun, ended))
    process.start()
    begun.wait()
    try:
        yield
    finally:
        ended.set()
        process.join()


def _read(folder: Path, begun: Any, ended: Any) -> None:
    with shards.reading(folder):
        begun.set()
        ended.wait()


@pytest.fixture
def three(store: Store, tmp_path: Path, some: list[Clip]) -> list[str]:
    """Fingerprints of three upstreams, least recently used first."""
    found = []
    for scale in (1.0, 2.0, 3.0):
        one = Logging(tmp_path / "log", scale)
        cache.extract(one, some, ["float16"], store, name=f"scale {scale:g}")
        found.append(one.fingerprint())
    used(store, found)
    return found


def used(store: Store, fingerprints: list[str]) -> None:
    """Make them the least recently used first, long ago."""
    for age, fingerprint in enumerate(fingerprints):
        os.utime(store.folder(fingerprint, "float16") / "used", (1e9 + age, 1e9 + age))


def test_entries_tell_what_there_is(store: Store, three: list[str], some: list[Clip]) -> None:
    entries = store.entries()
    assert [entry.fingerprint for entry in entries] == three
    first = entries[0]
    assert (first.kind, first.name, first.clips) == ("float16", "scale 1", len(some))
    assert first.hours * 3600 == pytest.approx(sum(clip.seconds for clip in some))
    files = store.folder(three[0], "float16").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    assert first.gigabytes == size / 1e9 and first.used == 1e9
    assert not any(entry.busy for entry in entries)


def test_the_least_recently_used_goes_first(
    store: Store, three: list[str], some: list[Clip]
) -> None:
    store.open(three[0], "float16", some)  # used now, and closed again
    size = store.entries()[0].gigabytes
    assert store.evict(0, 3.5 * size, set()) == []
    gone = store.evict(round(1e9 * size), 3.5 * size, set())
    assert [entry.fingerprint for entry in gone] == [three[1]]
    assert [entry.fingerprint for entry in store.entries()] == [three[2], three[0]]
    assert not (store.root / three[1]).exists()


def test_what_is_kept_or_in_use_is_not_evicted(
    store: Store, three: list[str], some: list[Clip]
) -> None:
    size = store.entries()[0].gigabytes
    with read_elsewhere(store.folder(three[0], "float16")):
        used(store, three)
        assert [entry.busy for entry in store.entries()] == [True, False, False]
        gone = store.evict(0, 2.5 * size, {(three[1], "float16")})
        assert [entry.fingerprint for entry in gone] == [three[2]]
        # more than can go: nothing is thrown away in vain
        assert store.evict(round(5e9 * size), 2.5 * size, set()) == []
        assert [entry.fingerprint for entry in clear(store)] == [three[1]]
    features = store.open(three[0], "float16", some)  # in use by this process
    assert clear(store) == []
    features.batch([0])
    del features
    assert [entry.fingerprint for entry in clear(store, three[0][:6])] == [three[0]]
    assert list(store.root.iterdir()) == []


def test_clear_goes_by_fingerprint(store: Store, three: list[str]) -> None:
    (store.root / "f00" / "1.gone").mkdir(parents=True)  # of a killed process
    assert [entry.fingerprint for entry in clear(store, three[1][:8])] == [three[1]]
    assert [entry.fingerprint for entry in store.entries()] == [three[0], three[2]]
    assert [entry.fingerprint for entry in clear(store)] == [three[0], three[2]]
    assert list(store.root.iterdir()) == []


def test_a_reader_killed_on_another_host_keeps_nothing_for_ever(
    store: Store, three: list[str]
) -> None:
    folder = store.folder(three[0], "float16")
    with shards.reading(folder):
        marker = next(folder.glob("reading-*"))
        content = marker.read_text()
    mine, foreign = (socket.gethostname(), str(os.getpid())), ("elsewhere", "1")
    for before, after in zip(mine, foreign):
        content = content.replace(before, after)
    marker.write_text(content)
    assert shards.in_use(folder)
    os.utime(marker, (time.time() - 3_600,) * 2)
    assert not shards.in_use(folder) and not marker.exists()


def test_an_entry_that_goes_while_it_is_begun_anew(
    store: Store, upstream: Logging, some: list[Clip]
) -> None:
    """Readers and eviction side by side: whole features or one clear line, never half."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_churn, args=(store, upstream, some, number)) for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def _churn(store: Store, upstream: Logging, some: list[Clip], number: int) -> None:
    for _ in range(6):
        if number == 0:
            clear(store)
            continue
        cache.extract(upstream, some, ["float16"], store)
        try:
            x, _ = store.open(upstream.fingerprint(), "float16", some).batch([0, 5])
        except UserError as error:
            assert "features are gone; the same command" in str(error)
        else:
            assert x.any()


def test_a_store_that_cannot_be_written_is_one_line(
    tmp_path: Path, upstream: Logging, some: list[Clip]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        cache.extract(upstream, some, ["mean"], Store(tmp_path / "file" / "cache"))


def test_a_read_that_fails_for_now_removes_nothing(
    store: Store, three: list[str], some: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = shards.read_all(store.folder(three[0], "float16"))
    files = {path for path in store.root.rglob("*") if path.is_file()}

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    for name in ("_checksum", "_stamp"):
        with monkeypatch.context() as patch:
            patch.setattr(shards, name, fail)
            with pytest.raises(disk.Unreadable, match="Input/output error"):
                features[0].verify()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_stamp", fail)
        with pytest.raises(disk.Unreadable), shards.Writer(store.folder(three[0], "float16"), some):
            pass
    assert files <= {path for path in store.root.rglob("*") if path.is_file()}
    features[0].verify()


def test_what_is_called_otherwise_stays(store: Store, three: list[str], some: list[Clip]) -> None:
    """Only what this program makes is removed, whatever lies in the folder of an entry."""
    folder = store.folder(three[0], "float16")
    (folder / "holiday").mkdir()
    (folder / "holiday" / "photo.jpg").write_text("mine")
    with shards.Writer(folder, some[:1]):
        pass
    assert (folder / "holiday" / "photo.jpg").read_text() == "mine"
    entry = next(entry for entry in store.entries() if entry.fingerprint == three[0])
    assert store.foreign(entry) == ["holiday"] and not store.remove(entry)
    assert (folder / "holiday" / "photo.jpg").read_text() == "mine"
