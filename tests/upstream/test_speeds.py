"""Frames are kept where reading them back is faster than computing them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from downstream.run import schedule
from tests import tiny
from tests.test_cli import call
from upstream import load
from upstream.features import speeds
from upstream.features.speeds import Speeds


def test_by_hand() -> None:
    """1 MB for a second of audio, ten times: 0.11 s at 100 MB/s, against 10 x 0.02 s."""
    slow = Speeds(encoder=50, decoder=1000, disk=100e6)
    assert slow.pays(1e6, 10) and not slow.pays(1e6, 1)
    fast = Speeds(encoder=10_000, decoder=2000, disk=1e9)  # decoding, 0.5 ms, bounds computing
    assert not fast.pays(1e6, 100)
    assert fast.pays(1e5, 100)
    assert "read in 1 ms, encoded in 0.1 and decoded in 0.5, and heard 100 times" in fast.told(
        1e6, 100
    )


def test_what_is_measured_is_of_this_machine(tmp_path: Path, tones: Path) -> None:
    from upstream.features.clips import clips

    files = [(str(p), None, None) for p in sorted(tones.rglob("*.wav"))]
    upstream = load(str(tiny.hf_folder(tmp_path, "hubert"))).eval()
    found = speeds.measure(upstream, clips(files, tmp_path / "index"), tmp_path / "cache", 32.0)
    assert found.encoder > 1 and found.decoder > 1 and found.disk > 1e5
    assert not list((tmp_path / "cache").iterdir())
    assert speeds.measure(upstream, [], tmp_path / "cache", 32.0) is found, "once"


@pytest.mark.parametrize(("disk", "kept"), [(1e12, True), (1e3, False)])
def test_a_run_follows_it(
    disk: float, kept: bool, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As on a GPU: where the device is not the CPU, what was measured decides."""
    monkeypatch.setattr(speeds, "measure", lambda *_: Speeds(100, 100, disk))
    pays = schedule._pays
    monkeypatch.setattr(
        schedule, "_pays", lambda u, t, o: pays(u, t, Elsewhere(o)),
    )  # fmt: skip
    folder = tiny.hf_folder(tmp_path, "hubert")
    words = ("--upstream", folder, "--suite", suite, "--downstream", "word", "--workers", 1)
    assert call(*words, "--results", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert f"word: frames are {'kept' if kept else 'computed anew'}: " in out
    assert bool(list((tmp_path / "r" / "cache").glob("*/float16"))) is kept


class Elsewhere:
    """Options whose device only moving an upstream can tell from the CPU."""

    def __init__(self, options: schedule.RunOptions) -> None:
        self.options, self.device = options, Device("cpu")

    def __getattr__(self, name: str) -> object:
        return getattr(self.options, name)


class Device(str):
    """`cpu` for torch, and for nobody else."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__
