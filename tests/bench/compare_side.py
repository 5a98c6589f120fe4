"""How long `compare` takes: so many upstreams, tasks and seeds, in a results folder made up here.

`python -m tests.bench.compare_side --upstreams 20 50 100` prints a line for each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import resource
import tempfile
import time
import unittest.mock
from pathlib import Path

import benchmark
from downstream.base import Count
from downstream.report.results import Cell, Score, save

TASKS, SEEDS, SPEAKERS, UTTERANCES = 10, 3, 12, 120


def make(root: Path, upstreams: int, tasks: int = TASKS, seeds: int = SEEDS) -> list[str]:
    """Results of upstreams that differ a little, each from the next; their names."""
    names = [f"upstream{number:03d}" for number in range(upstreams)]
    for number, name in enumerate(names):
        for task in range(tasks):
            for seed in range(seeds):
                rng = random.Random(f"{number} {task} {seed}")
                rate = 0.1 + 0.4 * number / upstreams
                counts = [
                    Count(f"{k}", f"s{k % SPEAKERS}", "word", "", int(rng.random() < rate), 1)
                    for k in range(UTTERANCES)
                ]
                errors = sum(count.errors for count in counts)
                score = Score(
                    metric="wer", better="lower", score=100 * errors / UTTERANCES, lr={"": 1.0},
                    dev={}, n=UTTERANCES, speakers=SPEAKERS, steps=1, seconds=1.0, device="cpu",
                    versions={}, git={}, created="2026-01-01T00:00:00+00:00", recipe={},
                )  # fmt: skip
                cell = Cell(name, f"{number:012x}", "made", f"task{task}", f"{task:012x}", seed)
                save(root, cell, score, counts)
    return names


def measure(upstreams: int) -> tuple[float, float]:
    """Wall and CPU seconds of the command, within this process."""
    with tempfile.TemporaryDirectory() as folder:
        with unittest.mock.patch("os.fsync"):
            names = make(Path(folder), upstreams)
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = benchmark.main(["compare", *names, "--results", folder])
        assert status == 0 and names[-1] in out.getvalue()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        return time.monotonic() - begun, after - before


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--upstreams", type=int, nargs="+", default=[20, 50, 100])
    for count in arguments.parse_args().upstreams:
        wall, cpu = measure(count)
        print(f"compare of {count} upstreams x {TASKS} tasks x {SEEDS} seeds: "
              f"{wall:.1f} s ({cpu:.1f} s of CPU)", flush=True)  # fmt: skip
