"""What a GPU would be asked for, on one that is not there (tests/pretend.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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


def run(suite: Path, base: str, results: Path, device: str, *words: str) -> None:
    given = ["--suite", str(suite), "--results", str(results), "--workers", "1", "--features", "cache"]
    assert benchmark.main(["--upstream", base, *given, "--device", device, *words]) == 0


def _set(*changes: str) -> list[str]:
    return [word for each in changes for word in ("--set", each)]


@pytest.mark.parametrize(
    "task",
    # in the others are no heads but these
    [pytest.param(t, marks=[pytest.mark.slow] * (t in ("ks", "ic", "er", "sf"))) for t in TASKS],
)
def test_a_task_of_superb_is_the_same_on_a_gpu(
    task: str, superb: Path, tmp_path: Path, gpu: Device  # noqa: F811
) -> None:  # fmt: skip
    shortened(task, superb)
    base = str(tiny.hf_folder(tmp_path, "hubert"))
    words = [] if task == "qbe" else _set("train.steps=3", "train.eval_every=2", "train.seeds=1")
    run(superb, base, tmp_path / "cuda", "cuda", *words)
    run(superb, base, tmp_path / "cpu", "cpu", *words)
    there, here = (load_results(tmp_path / device) for device in ("cuda", "cpu"))
    assert len(there) == len(here)
    for cell, other in zip(there, here):
        assert (cell.cell, cell.score.device) == (other.cell, "cuda")
        for file in cell.folder.glob("head*.safetensors"):
            weights, others = load_file(file), load_file(other.folder / file.name)
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, others[name], rtol=0, atol=2e-3, msg=name)
        if task != "asv":  # an EER of 15 trials hangs on the last digit of each
            assert cell.score.score == pytest.approx(other.score.score, abs=1e-3)


@pytest.mark.parametrize("task", ["sid", "ic", "pr", "asr"])
def test_a_step_does_not_wait_for_the_gpu(
    task: str, superb: Path, tmp_path: Path, gpu: Device  # noqa: F811
) -> None:  # fmt: skip
    """Twice the steps, as many evaluations: as many waits."""
    shortened(task, superb)
    base, waits = str(tiny.hf_folder(tmp_path, "hubert")), []
    for steps in (1, 3, 6):  # the first one extracts the features
        gpu.waits.clear()
        words = _set(f"train.steps={steps}", "train.eval_every=99", "train.seeds=1")
        words += _set("head.depth=1") if task == "asr" else []
        run(superb, base, tmp_path / "r", "cuda", *words)
        waits.append(sorted(gpu.waits))
    assert waits[1] == waits[2] != []
