"""Everything that a GPU would be asked for, on one that is not there (tests/pretend.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmark
from downstream.report.results import load_results
from tests import tiny
from tests.downstream.test_superb import TASKS, shortened
from tests.downstream.test_superb import suite as superb  # noqa: F401 - a fixture
from tests.pretend import Device, pretended


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """`device="cuda"` can be used, in this thread."""
    with pretended(monkeypatch) as device:
        yield device


@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_superb_runs_on_a_gpu(
    task: str, superb: Path, tmp_path: Path, gpu: Device  # noqa: F811
) -> None:  # fmt: skip
    shortened(task, superb)
    base = str(tiny.hf_folder(tmp_path, "hubert"))
    scores = []
    for device in ("cuda", "cpu"):
        results = tmp_path / device
        words = ["--suite", str(superb), "--results", str(results), "--workers", "1"]
        assert benchmark.main(["--upstream", base, *words, "--device", device]) == 0
        scores.append({cell.cell.seed: cell.score for cell in load_results(results)})
    there, here = scores
    assert there.keys() == here.keys()
    for seed, score in there.items():
        assert score.device == "cuda"
        assert score.score == pytest.approx(here[seed].score, abs=1e-3)
        assert score.dev == here[seed].dev
