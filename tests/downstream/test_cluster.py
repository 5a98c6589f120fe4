"""Servers on a cluster: the same bytes as one process, servers killed, heads that are gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from downstream.run import queue
from downstream.run.cluster import ENGINES, Server, asked
from downstream.run.executors import Outcome
from tests import tiny
from tests.test_cli import ROOT, call
from upstream.common.errors import UserError

LOCAL = "slurm:cluster=local:jobs=2"  # submitit's own executor of jobs on one machine


def predictions(results: Path) -> dict[str, bytes]:
    files = results.glob("*@*/*/*@*/seed*/predictions.jsonl")
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


def words(suite: Path, results: Path, executor: str) -> list[object]:
    upstream = suite.parent / "upstream"
    if not upstream.exists():
        tiny.hf_folder(suite.parent, "wavlm").rename(upstream)
    names = f"{upstream},fbank"
    return ["--upstream", names, "--suite", suite, "--results", results, "--executor", executor]


def servers(folder: Path) -> list[int]:
    """Processes that serve below a results folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in line and any(str(folder).encode() in w for w in line):
            found.append(int(place.name))
    return found


def killing(folder: Path, most: int, stop: threading.Event) -> list[int]:
    """Kill servers with -9 as they appear, until so many are dead."""
    killed: list[int] = []

    def hunt() -> None:
        while len(killed) < most and not stop.wait(0.3):
            for number in servers(folder)[: most - len(killed)]:
                if number not in killed:
                    os.kill(number, signal.SIGKILL)
                    killed.append(number)

    threading.Thread(target=hunt, daemon=True).start()
    return killed


def same_as_one_process(suite: Path, tmp_path: Path, executor: str) -> None:
    assert call(*words(suite, tmp_path / "one", "local"), "--workers", 1) == 0
    assert call(*words(suite, tmp_path / "many", executor)) == 0
    assert predictions(tmp_path / "one") == predictions(tmp_path / "many") != {}
    assert not list((tmp_path / "many" / "cache" / "queue").glob("*")), "nothing stays"


def test_submitit_gives_the_same_bytes_whoever_is_killed(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()
    killed = killing(tmp_path / "many", 1, stop)
    same_as_one_process(suite, tmp_path, LOCAL)
    stop.set()
    assert len(killed) == 1
    assert "2 jobs of slurm:cluster=local:jobs=2 started; logs: " in capsys.readouterr().out
    assert call("plan", *words(suite, tmp_path / "new", LOCAL)) == 0
    assert "in 2 CPU jobs of slurm" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_ray_gives_the_same_bytes(suite: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    same_as_one_process(suite, tmp_path, "ray:jobs=2")


class Hopeless:
    """A cluster on which everything dies."""

    local = True

    def __init__(self, options: dict[str, object]) -> None:
        self.started = 0

    def start(self, folder: Path, count: int) -> list[int]:
        self.started += count
        return list(range(count))

    def over(self, server: int) -> str:
        return "killed by the administrator"

    def stop(self, servers: list[int]) -> None:
        pass


def test_if_all_are_killed_again_and_again_it_says_so(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "slurm", Hopeless)
    assert call(*words(suite, tmp_path / "many", "slurm:jobs=2")) == 2
    err = capsys.readouterr().err
    assert "7 jobs ended before the work was done" in err and "the same command goes on" in err
    assert "killed by the administrator" in err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("slrum", "did you mean slurm"),
        ("local:jobs=3", "local has no option jobs"),
        ("slurm:jobs=0", "not a whole number"),
        ("slurm:jobs=two", "not a whole number"),
        ("slurm:cluster=nowhere", "nowhere"),
        ("slurm:cluster=local:partitoin=gpu", "partitoin"),
        ("slurm:cluster=local:timeout_min=soon", "timeout_min"),
        ("slurm:jobs=2:jobs=3", "given twice"),
        ("slurm:jobs=[", "not valid YAML"),
    ],
)
def test_bad_executors_are_one_line(
    spec: str, message: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call_words = words(suite, tmp_path / "r", spec)
    capsys.readouterr()
    assert call(*call_words) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
    assert not (tmp_path / "r" / "cache" / "queue").exists()


def test_workers_are_of_this_machine(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words(suite, tmp_path / "r", LOCAL), "--workers", 2) == 2
    assert "write --executor slurm:jobs=N" in capsys.readouterr().err


def test_a_job_is_a_gpus_where_one_is_asked_for() -> None:
    assert asked("slurm:gpus_per_node=1").gpus and asked("ray:num_gpus=0.5").gpus
    assert not asked("slurm").gpus and asked("ray:jobs=7").jobs == 7


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert call(*words(suite, tmp_path / "r", LOCAL)) == 2
    assert "pip install -e '.[slurm]'" in capsys.readouterr().err


def test_a_job_that_is_warned_asks_to_be_queued_again(tmp_path: Path) -> None:
    """submitit calls this where SLURM preempts a job, or its time is over."""
    again = Server(tmp_path).checkpoint()
    assert isinstance(again.function, Server) and again.function.folder == tmp_path


def double(number: int) -> str | None:
    if number == 13:
        raise UserError("unlucky")
    return str(2 * number)


def test_jobs_of_a_queue_are_done_by_whoever_serves(tmp_path: Path) -> None:
    with queue.heading(tmp_path, threads=1) as head:
        threads = [threading.Thread(target=queue.serve, args=(head.folder,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for numbers in (range(20), range(5)):  # two stages
            found = dict(head.execute(double, numbers, lambda: None))
            assert {n: outcome.line for n, outcome in found.items()} == {
                n: "unlucky" if n == 13 else str(2 * n) for n in numbers
            }
            assert not any(outcome.trace for n, outcome in found.items() if n != 13)
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()


def test_what_was_begun_is_finished_without_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "SILENCE", 1.0)
    head = queue.Queue(tmp_path, threads=1)
    with pytest.raises(ZeroDivisionError):  # the head dies
        list(head.execute(double, range(4), lambda: 1 // 0))
    server = threading.Thread(target=queue.serve, args=(tmp_path,), daemon=True)
    server.start()
    server.join(300)
    assert not server.is_alive(), "waits for the head for ever"
    ended = [Outcome(*json.loads((tmp_path / "0" / f"{n}.json").read_text())) for n in range(4)]
    assert [outcome.line for outcome in ended] == ["0", "2", "4", "6"]


@pytest.mark.slow
def test_ctrl_c_ends_the_servers(suite: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmark.py", *map(str, words(suite, tmp_path / "r", LOCAL))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not servers(tmp_path / "r") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and b"the same command goes on" in out
    while servers(tmp_path / "r") and time.monotonic() < deadline + 30:
        time.sleep(0.2)
    assert not servers(tmp_path / "r")


def test_fine_tuning_is_a_job_too(
    recipes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from merging.tuning.loop import Loop

    def never(*_: object) -> None:
        raise AssertionError("the head has no GPU to fine-tune on")

    monkeypatch.setattr(Loop, "_update", never)
    names = ["--upstream", "merged:seed=0,1", "--suite", recipes, "--results", tmp_path / "r"]
    assert call(*names, "--downstream", "label", "--executor", LOCAL) == 0
    said = capsys.readouterr().out
    for name in ("finetuned:seed=0", "finetuned:seed=1", "merged:seed=0", "merged:seed=1"):
        assert f"{name}: built (" in said
    assert "merged:seed=1" in said.split("minus ")[1]
    assert call(*names, "--downstream", "label", "--executor", LOCAL) == 0
    assert "built (" not in capsys.readouterr().out


def test_fine_tuning_that_fails_in_a_job_is_one_line(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = recipes.parent.glob("hubert-0/model.safetensors")
    weights = load_file(file)
    weights["encoder.layers.2.feed_forward.output_dense.weight"].fill_(1e38)
    save_file(weights, file, {"format": "pt"})
    names = ["--upstream", "merged", "--suite", recipes, "--results", tmp_path / "r"]
    assert call(*names, "--downstream", "label", "--executor", LOCAL) == 2
    err = capsys.readouterr().err
    assert "finetuned: update 1: the loss is nan" in err and "take a smaller lr" in err
    assert "UserError: update 1" in (tmp_path / "r" / "errors.log").read_text()
