"""Real processes on one results folder: they share the work, survive each other, and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.test_cli import ROOT, call

PATIENCE = 300.0  # seconds; a busy machine imports torch for half a minute


class Command:
    """`benchmark.py` in a session of its own."""

    def __init__(self, log: Path, *words: object) -> None:
        self.log = log
        line = [sys.executable, str(ROOT / "benchmark.py"), *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                line, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def alive(self) -> bool:
        """Whether any process of the session is left."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def begin(*words: object) -> Command:
        started.append(Command(tmp_path / f"log-{len(started)}", *words))
        return started[-1]

    yield begin
    for command in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)
        command.process.wait()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def table(output: str) -> str:
    """What is printed when all is done, without what there was to do and what it cost."""
    lines = output[output.index("upstream ") :].splitlines()
    return "\n".join(line for line in lines if " of memory, " not in line)


@pytest.fixture
def alone(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """A command in this process, which has imported all of it; its output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*words: object) -> str:
        assert call(*words, "--workers", 1) == 0
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def files(results: Path) -> dict[str, bytes]:
    """What must not depend on who computed it."""
    return {
        str(path.relative_to(results)): path.read_bytes()
        for path in results.rglob("*")
        if path.name in ("predictions.jsonl", "model.safetensors", "heard.txt")
    }


def test_identical_commands_share_the_work(
    recipes: Path, tmp_path: Path, start: Callable[..., Command], alone: Callable[..., str]
) -> None:
    """Fine-tuning, merging, passes and cells: each is done once, by one of three processes."""
    words = ("--upstream", "merged", "--suite", recipes, "--results")
    together = [start(*words, tmp_path / "shared", "--workers", 1) for _ in range(3)]
    due = table(alone(*words, tmp_path / "alone"))
    for command in together:
        assert command.end() == 0, command.output
        assert "Traceback" not in command.output
        assert table(command.output) == due.replace("alone", "shared")
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert len(list((tmp_path / "shared").rglob("score.json"))) == 12
    lines = [line for command in together for line in command.output.splitlines()]
    assert sum(" s)" in line and "seed" in line for line in lines) == 12, "each cell once"


def test_a_killed_command_leaves_its_work_to_the_other(
    suite: Path, tmp_path: Path, start: Callable[..., Command], alone: Callable[..., str]
) -> None:
    base = tiny.hf_folder(tmp_path)
    words = ("--upstream", base, "--suite", suite, "--results")
    shared = tmp_path / "shared"
    killed = start(*words, shared, "--workers", 2)
    until(lambda: list(shared.glob("*@*/*/*/seed*/.lease*")))
    other = start(*words, shared, "--workers", 1)
    os.killpg(killed.process.pid, signal.SIGKILL)
    alone(*words, tmp_path / "alone")
    assert other.end() == 0, other.output
    assert files(shared) == files(tmp_path / "alone")
    assert "Traceback" not in other.output


@pytest.mark.parametrize(
    "send, numbers",
    [
        pytest.param(os.killpg, [signal.SIGHUP], marks=pytest.mark.slow),
        pytest.param(os.kill, [signal.SIGTERM], marks=pytest.mark.slow),
        (os.killpg, [signal.SIGINT, signal.SIGINT, signal.SIGINT]),
    ],
    ids=["terminal lost", "parent terminated", "Ctrl-C thrice"],
)
def test_a_stopped_command_ends_its_workers(
    suite: Path,
    tmp_path: Path,
    start: Callable[..., Command],
    send: Callable[[int, int], None],
    numbers: list[int],
) -> None:
    results = tmp_path / "r"
    command = start(
        "--upstream", tiny.hf_folder(tmp_path), "--suite", suite, "--results", results,
        "--workers", 2, "--set", "train.steps=1000000",
    )  # fmt: skip
    until(lambda: len(list(results.glob("*@*/*/*/seed*/.lease*"))) >= 2)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            send(command.process.pid, number)
        time.sleep(0.2)
    assert command.process.wait(PATIENCE) == 130
    until(lambda: not command.alive())
    assert command.output.endswith("\nstopped; the same command goes on from here\n")
    assert "Traceback" not in command.output


SWALLOWED = """
import os, signal, time
from upstream.common import stop
stop.GRACE, stop.AGAIN = 0.5, 1.0
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
with stop.stoppable():
    try:
        Last()
        time.sleep(60)
    except KeyboardInterrupt:
        print("stopped")
"""


def test_an_interruption_that_python_drops_comes_again() -> None:
    words = [sys.executable, "-c", SWALLOWED]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "Exception ignored" in done.stderr and done.stdout == "stopped\n"


@pytest.mark.slow
def test_nohup_goes_on(suite: Path, tmp_path: Path, start: Callable[..., Command]) -> None:
    """What ignores hang-ups from the start still does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        results = tmp_path / "r"
        words = ("--upstream", tiny.hf_folder(tmp_path), "--suite", suite, "--results", results)
        command = start(*words, "--workers", 2)
    finally:
        signal.signal(signal.SIGHUP, before)
    until(lambda: list(results.glob("*@*/*/*/seed*/.lease*")))
    os.killpg(command.process.pid, signal.SIGHUP)
    assert command.end() == 0, command.output
