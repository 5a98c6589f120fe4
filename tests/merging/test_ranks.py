"""Several processes train what one trains, end together, and go on as fewer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import upstream
from merging.tuning import build_tuned, loop
from merging.tuning.ranks import Portion, Ranks
from tests.merging.test_scale import STILL
from tests.merging.test_tuning import changed, record
from upstream.common import PROJECT

# benchmark.py finetune, saving after every update; process argv[2] dies in update argv[1]
COMMAND = """
import os, sys
import benchmark
from merging.tuning import loop
loop.SAVE_SECONDS, update = 0.0, loop.Loop._update
def dying(self, step):
    if [step, self.ranks.rank] == [int(word) for word in sys.argv[1:3]]:
        os.kill(os.getpid(), 9)
    update(self, step)
    total = sum(p.detach().double().sum() for p in self.parameters)
    open(f"{sys.argv[-1]}/rank{self.ranks.rank}", "a").write(f"{step} {float(total)!r}\\n")
loop.Loop._update = dying
sys.exit(benchmark.main(["finetune", *sys.argv[3:]]))
"""


def start(
    world: int, recipe: Path, results: Path, dies: tuple[int, int] = (-1, 0)
) -> list[tuple[int, str, str]]:
    """Processes as torchrun would start them: what they end with, what they say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(world):
        words = [sys.executable, "-c", COMMAND, *map(str, dies), str(recipe)]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(
            subprocess.Popen(
                [*words, "--results", str(results)], cwd=PROJECT, text=True,
                env=os.environ | place | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *each) for process, each in zip(running, said)]


def apart(one: Path, other: Path) -> float:
    """The largest difference between two built upstreams' weights."""
    a, b = (upstream.load(str(folder)).state_dict() for folder in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_are_one_and_one_goes_on_where_two_ended(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(recipes, lr=1e-4, eval_every=20, **STILL)
    alone = build_tuned(path, tmp_path / "one")
    ended = start(2, path, tmp_path / "two")
    assert [code for code, _, _ in ended] == [0, 0], ended
    (_, out, _), (_, silence, _) = ended
    assert silence == "" and out.count("step 20: dev") == 1, "the first speaks for all"
    pair = Path(out.splitlines()[-1])
    assert apart(alone, pair) < 1e-5
    held = [(tmp_path / "two" / f"rank{rank}").read_text() for rank in (0, 1)]
    assert held[0] == held[1] and len(held[0].splitlines()) == 20, "the same, to the bit"
    assert record(pair)["processes"] == 2 and record(alone)["processes"] == 1
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (alone, pair)]
    for one, two in zip(*logs, strict=True):
        assert json.loads(two) == pytest.approx(json.loads(one), rel=1e-3)

    survivor, (killed, _, _) = start(2, path, tmp_path / "three", dies=(7, 1))
    assert killed == -9 and survivor[0] == 2
    assert survivor[2].count("\n") == 1 and "another one has ended" in survivor[2]
    assert (tmp_path / "three" / "upstreams" / pair.name / "state.pt").exists()
    done, update = [], loop.Loop._update

    def counted(self: loop.Loop, step: int) -> None:
        done.append(step)
        update(self, step)

    monkeypatch.setattr(loop.Loop, "_update", counted)
    resumed = build_tuned(path, tmp_path / "three")
    assert done == list(range(7, 20)), "what was done is not done again"
    assert apart(alone, resumed) < 1e-5


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
def test_every_utterance_of_an_update_has_one_process(world: int, accumulate: int) -> None:
    update = [[(number, i) for i in range(12)] for number in range(accumulate)]
    done = []
    for rank in range(world):
        micro, part = Ranks(rank, world).shares(accumulate)
        done += [i for batch in micro.of(update) for i in part.of(batch)]
    assert sorted(done) == sorted(i for batch in update for i in batch)
    assert Ranks(0, 1).shares(accumulate) == (Portion(), Portion())
