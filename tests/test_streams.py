"""What a command does when its output is closed, its user impatient, or its error enormous."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import ROOT, call
from upstream.common import disk
from upstream.common.errors import LONGEST, UserError, bounded, near_miss, one_line
from upstream.common.output import unbroken


def test_a_run_whose_reader_left_does_its_work(suite: Path, tmp_path: Path) -> None:
    words = ("--upstream", "fbank", "--suite", suite, "--workers", 1, "--results", tmp_path / "r")
    line = [sys.executable, str(ROOT / "benchmark.py"), *map(str, words)]
    reader, writer = os.pipe()
    process = subprocess.Popen(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(reader)
    os.close(writer)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Broken" not in said and "Traceback" not in said
    assert {"table.md", "table.csv"} <= {path.name for path in (tmp_path / "r").iterdir()}
    heads = list((tmp_path / "r").rglob("*.safetensors"))
    assert heads
    for path in heads:  # readable for whom the umask lets read
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~disk.UMASK


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_writing_goes_on_after_the_reader_left(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file, monkeypatch.context() as change:
        change.setattr(sys, stream, file)
        with unbroken():
            for _ in range(3):
                print("x" * 100_000, file=getattr(sys, stream), flush=True)
            print("never flushed", file=getattr(sys, stream))
        assert getattr(sys, stream) is file


def test_any_name_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    with unbroken():
        print("größer \udc80")
    assert raw.getvalue() == b"gr\\xf6\\xdfer \\udc80\n"


@pytest.mark.parametrize("wait", [0.08, 0.2])
def test_ctrl_c_at_once_is_no_traceback(wait: float) -> None:
    """Before the first line of benchmark.py the interpreter itself still writes one."""
    code = (
        "import os, signal, sys, threading, time, runpy\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['benchmark.py', 'list', 'tasks']\n"
        "def stop():\n"
        "    while 'argparse' not in sys.modules: pass\n"
        f"    time.sleep({wait} / 10); os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        f"runpy.run_path({str(ROOT / 'benchmark.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


def test_no_error_line_is_longer_than_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"name_{number}" for number in range(100_000)]
    assert near_miss("name_1x", names).startswith("; did you mean name_1")
    assert len(near_miss("quite another", names)) < 1000
    assert "and 99960 more" in near_miss("quite another", names)
    for error in (UserError("x" * 900_000), ValueError("y" * 900_000)):
        assert len(one_line(error, "more")) < LONGEST + 100
    assert bounded("a\n b") == "a b"
    for words in (
        ("describe", "z" * 100_000),
        ("list", "z" * 100_000),
        ("--upstream", "fbank", "--suite", "s" * 100_000),
        ("--upstream", "fbank", "--set", "t" * 100_000),
        ("cache", "clear", "c" * 100_000, "--results", tmp_path),
    ):
        assert call(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert len(line) < LONGEST + 200


def test_counts_of_passes_do_not_begin_anew() -> None:
    from downstream.run.schedule import Request, _passes
    from upstream.features.clips import Clip

    clips = {str(n): Clip(f"{n}.wav", None, None, 400.0, str(n)) for n in range(3)}
    names = [job.name for job in _passes(Request("tiny", "tiny"), {"mean": clips})]
    assert names == [f"tiny: features, part {n} of 3" for n in (1, 2, 3)]
    one = dict(list(clips.items())[:1])
    assert [job.name for job in _passes(Request("a", "a"), {"mean": one})] == ["a: features"]
