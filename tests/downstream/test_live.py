"""The screen of a long run, what becomes of failures, and the signs of life of processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest

import benchmark
from downstream.run import beats, execute, live
from downstream.run.beats import Beat
from downstream.run.cell import Identity
from downstream.run.schedule import CellJob, Pass, Request, Round, RunOptions, Work
from tests import tiny
from tests.conftest import ROOT
from upstream.common.errors import UserError
from upstream.features.clips import Clip

BROKEN = """
import itertools
import torch
from upstream.base import Hidden, Upstream, valid

class Frames(Upstream):
    num_layers, dim, stride = 1, 160, 160
    calls = itertools.count()

    def forward(self, wavs, lens):
        print("printed by a worker\\nand more", flush=True)
        if {broken} and next(self.calls) > 30:  # survives the check of its promises
            raise RuntimeError("gone\\nwrong")
        frames = wavs[:, : wavs.shape[1] // 160 * 160].unflatten(1, (-1, 160))
        lens = lens // 160
        return Hidden((frames * valid(lens, frames.shape[1])[:, :, None])[None], lens)
"""


def cell(upstream: str, task: str, seed: int) -> CellJob:
    identity = Identity(upstream, "f", "")
    return CellJob(Request(upstream, upstream), identity, Path(task), seed, 0, task)


def work(*names: str) -> Work:
    cells = [cell(name, task, seed) for name in names for task in ("asr", "sid") for seed in (0, 1)]
    clip = Clip("a.wav", None, None, 30.0, "k")
    passes = [Pass(Request(name, name), [clip, clip], ["mean"]) for name in names]
    return Work([], 5, [Round(passes, cells)])


@pytest.mark.parametrize("width, height", [(39, 12), (100, 24), (5, 2), (1, 1)])
def test_the_screen_keeps_to_its_terminal(tmp_path: Path, width: int, height: int) -> None:
    """Whatever names there are: wide letters, letters upon letters, escapes, very long ones."""
    names = ["模型" * 40, "e\u0301" * 60, "\x1b[2J<script>\n", "x" * 300]
    tally = live.Tally(work(*names), tmp_path)
    for number, name in enumerate(names):
        beat = [f"{name}: asr seed 0", "elsewhere", 4000.0, "w", 300, 600]
        (tmp_path / f"{number}.json").write_text(json.dumps(beat))
    (tmp_path / "torn.json").write_text('["a", ')
    tally.end(cell(names[2], "sid", 0), "\x1b[2J went\nwrong", 1.0, failed=True)
    lines = tally.frame(width, height)
    assert len(lines) <= height
    assert all(live.columns(line) <= width and line.isprintable() for line in lines), lines
    if width == 100:
        assert lines[0].startswith("0 of 16 cells · 4 running · 1 failed · 5 kept before · 0 of 4")
        assert sum("300/600  67 min  elsewhere" in line for line in lines) == 4
        assert lines[-1].startswith("failed: ?[2J<script>?: sid seed 0: ?[2J went?wrong")


def test_the_time_left_counts_what_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes took 6 s, two asr cells 10 s each, in 16 s; one more is half done, two sid to do."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    todo = work("a")
    tally = live.Tally(todo, tmp_path)
    tally.end(todo.rounds[0].passes[0], "", 6.0, failed=False)
    assert tally.left([]) is None, "no cell has ended"
    tally.end(cell("a", "asr", 0), "a: asr seed 0: WER 1", 10.0, failed=False)
    now += 16.0
    # 16 s of work in 16 s, of 30 to go 5 are done
    assert tally.left([Beat("a: asr seed 1", "h", 5.0)]) == pytest.approx(16 * 25 / 21)
    tally.end(cell("a", "asr", 1), f"a: asr seed 1: {live.ELSEWHERE}", 0.0, failed=False)
    assert tally.left([]) == pytest.approx(16 * 20 / 26), "somebody else's work counts"
    for seed in (0, 1):
        tally.end(cell("a", "sid", seed), "done", 10.0, failed=False)
    assert tally.left([]) is None


def test_signs_of_life_come_and_go(tmp_path: Path) -> None:
    with beats.beating(tmp_path, "job"):
        deadline = time.monotonic() + 300
        while not (found := beats.read(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [beat.job for beat in found] == ["job"]
    assert not list(tmp_path.iterdir())
    for age, kept in ((beats.STALE + 5, True), (beats.OLD + 5, False)):
        dead = tmp_path / "dead.json"
        dead.write_text('["job", "h", 1.0]')
        os.utime(dead, (time.time() - age,) * 2)
        assert beats.read(tmp_path) == [] and dead.exists() == kept
    with beats.beating(tmp_path / "dead.json" / "no folder", "job"):
        pass  # nobody sees it, but it is done


def test_what_fails_leaves_the_rest_alone(
    suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pass that fails is told once for all of its cells; mended, the same command ends it."""
    results, mine = tmp_path / "r", tmp_path / "mine.py"
    base = tiny.hf_folder(tmp_path)
    words = ["--upstream", f"{mine}:Frames,{base}", "--suite", str(suite), "--results"]
    words += [str(results), "--workers", "1", "--seeds", "1"]
    mine.write_text(BROKEN.format(broken=True))
    assert benchmark.main(words) == 2
    out, err = capfd.readouterr()
    assert f"failed: {mine}:Frames: features: unforeseen RuntimeError at mine.py:13 (gone w" in out
    assert f"{base.name}: word seed 0: WER " in out and "\nupstream" in out, "and the table"
    *_, one, last = err.splitlines()
    assert one.startswith(f"failed: {mine}:Frames: word seed 0 and 1 more: unforeseen Runtime")
    log = results / "errors.log"
    assert last == (
        "benchmark.py: 2 of 4 cells failed; the same command tries them again; "
        f"{log} has more"
    )  # fmt: skip
    assert log.read_text().count("Traceback") == 1
    mine.write_text(BROKEN.format(broken=False))
    assert benchmark.main(words) == 0
    assert len(list(results.rglob("score.json"))) == 4


@pytest.mark.parametrize("good, done", [((), 3), ((2,), 5), ((3, 6, 9, 12), 12)])
def test_what_fails_everywhere_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[int, ...], done: int
) -> None:
    """Three in a row of two upstreams and two tasks are nobody's own."""
    jobs = [cell(name, task, seed) for seed in (0, 1, 2) for name, task in
            (("a", "asr"), ("b", "asr"), ("b", "sid"), ("a", "sid"))]  # fmt: skip
    seen = []

    def fail(job: CellJob, options: RunOptions) -> str:
        seen.append(job)
        if len(seen) in good:
            return "done"
        raise UserError("no space left")

    monkeypatch.setattr(execute, "compute", fail)
    how = RunOptions(tmp_path, workers=1, device="cpu")
    with pytest.raises(UserError) as caught:
        execute.run(Work([], 0, [Round([], jobs)]), how)
    assert len(seen) == done
    if done < 12:
        assert str(caught.value) == "stopped after 3 failures in a row, the last: no space left"
    else:
        assert isinstance(caught.value, execute.Unfinished)
        assert caught.value.lines == ["failed: a: asr seed 0 and 7 more: no space left"]


def on_terminal(words: list[str], until: str, send: bytes) -> tuple[str, int]:
    """What the command writes to a terminal of 60 columns; `send` is typed once it says `until`."""
    child, terminal = pty.fork()
    if child == 0:
        line = [sys.executable, str(ROOT / "benchmark.py"), *words]
        os.execvpe(line[0], line, {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"})
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    text = b""
    with contextlib.suppress(OSError):  # the end
        while chunk := os.read(terminal, 4096):
            text += chunk
            if send and until.encode() in text:
                os.write(terminal, send)
                send = b""
    os.close(terminal)
    return text.decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_terminal_shows_one_screen_and_keeps_what_is_printed(suite: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(BROKEN.format(broken=True))
    names = f"{mine}:Frames,{tiny.hf_folder(tmp_path)}"
    words = ["--upstream", names, "--suite", str(suite), "--workers", "2", "--results"]
    text, status = on_terminal([*words, str(tmp_path / "r")], "", b"")
    assert status == 2, text
    assert "printed by a worker\nand more\n" in text.replace("\x1b[J", "")
    frames = text.split("\x1b[J")
    assert any("0 of 8 cells" in frame for frame in frames)
    assert any("4 failed" in frame and "word seed 1" in frame for frame in frames)
    assert "-0: word seed 1: WER" in text, "the line of a finished cell"
    assert frames[-1].startswith("upstream ") and " running" not in frames[-1], (
        "the last frame is wiped"
    )

    words[1], words[5] = names.split(",")[1], "1"
    words += [str(tmp_path / "stopped"), "--set", "train.steps=1000000"]
    text, status = on_terminal(words, "/1000000", b"\x03")
    assert status == 130
    assert text.endswith("\nstopped; the same command goes on from here\n"), text[-300:]
