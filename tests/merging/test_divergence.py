"""Stage 1 says what it did: updates that were skipped, what was frozen, what never moved."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from merging.tuning import build_tuned, loop
from merging.tuning.objectives import TaskObjective
from upstream.common import PROJECT
from upstream.common.errors import UserError


def changed(recipes: Path, **keys: Any) -> Path:
    path = recipes / "finetune.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    return path


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "finetune.json").read_text())
    return content


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """Make the gradient of some updates NaN while their loss stays a number."""
    plain = TaskObjective.loss

    def loss(self: TaskObjective, encoder: Any, number: int) -> Tensor:
        value = plain(self, encoder, number)
        if number not in steps:
            return value
        flat = torch.cat([weight.flatten() for weight in self.head.parameters()])
        return value + 0 * torch.sqrt(0 * flat).sum()  # whose derivative is infinite

    monkeypatch.setattr(TaskObjective, "loss", loss)


def test_a_run_that_diverges_fails(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(4, 20))
    with pytest.raises(UserError, match=r"diverged: the gradient of 3 of the 7 updates .* lr"):
        build_tuned(recipes / "finetune.yaml", tmp_path / "r")
    assert not list((tmp_path / "r").rglob("model.safetensors"))
    assert loop.MOST_SKIPPED * 20 == 2


def test_a_few_skipped_updates_are_told(
    recipes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, {5, 11})
    folder = build_tuned(recipes / "finetune.yaml", tmp_path / "r")
    words = "2 of 20 updates were skipped: their gradient was not finite"
    assert words in capsys.readouterr().out
    assert record(folder)["skipped"] == 2
    assert words in (folder / "README.md").read_text()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [6, 12]


def test_an_interruption_forgets_no_skipped_update(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {5, 11})
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    plain, done = loop.Loop._update, 0

    def stop(self: loop.Loop, step: int) -> None:
        nonlocal done
        done += 1
        if done == 9:
            raise KeyboardInterrupt
        plain(self, step)

    monkeypatch.setattr(loop.Loop, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        build_tuned(recipes / "finetune.yaml", tmp_path / "r")
    assert record(build_tuned(recipes / "finetune.yaml", tmp_path / "r"))["skipped"] == 2


def test_frozen_is_not_never_moved(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_tuned(changed(recipes, layer=2), tmp_path / "r")
    facts = record(folder)
    assert set(facts["frozen"]) == {"cnn", "other", "layer 3"}
    assert facts["skipped"] == 0 and facts["warnings"] == []
    card = (folder / "README.md").read_text()
    assert "| layer 3 | 0.000 % | frozen by the strategy |" in card
    assert "never moved" not in card + capsys.readouterr().out


def test_the_bases_own_weights_are_called_that(
    recipes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dev was best while the head alone learned, so that the base comes back."""
    scores = iter([90.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(
        TaskObjective, "dev", lambda self, encoder: {"label accuracy": next(scores)}
    )
    folder = build_tuned(changed(recipes, head_only=0.3), tmp_path / "r")
    said = capsys.readouterr().out
    assert "these are the base's weights: dev was best after update 5" in said
    assert "(never moved)" in said and "(frozen)" in said
    assert "| layer 1 | 0.000 % | never moved |" in (folder / "README.md").read_text()


def test_no_dev_score_is_no_result(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TaskObjective, "dev", lambda self, encoder: {"x": float("nan")})
    with pytest.raises(UserError, match="no dev score was ever a number"):
        build_tuned(recipes / "finetune.yaml", tmp_path / "r")


@pytest.mark.parametrize("limit", [(resource.RLIMIT_AS, 6 << 30), (resource.RLIMIT_NOFILE, 64)])
def test_weights_do_not_wait_for_pictures(
    limit: tuple[int, int], recipes: Path, tmp_path: Path
) -> None:
    """As grid engines limit address space, where the engine that draws would end the process."""
    command = [sys.executable, str(PROJECT / "benchmark.py"), "finetune",
               str(recipes / "finetune.yaml"), "--results", str(tmp_path / "r")]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=PROJECT,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(limit[0], (limit[1], limit[1])),
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert (folder / "model.safetensors").is_file() and (folder / "README.md").is_file()
    assert not list(folder.glob("state*.pt"))
    drawn = (folder / "log.svg").is_file()
    assert drawn or "no picture is drawn" in done.stderr
    assert ("log.svg" in (folder / "README.md").read_text()) is drawn
