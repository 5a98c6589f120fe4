"""A state that was torn or damaged is left out; what is logged is logged once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import upstream
from merging.tuning import build_tuned
from merging.tuning.recipe import open_plan
from tests.merging.test_tuning import changed, record, stop_at
from upstream.common.errors import UserError


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def zeros(content: bytes) -> bytes:
    """What a power cut leaves of blocks that were never written."""
    middle = len(content) // 2
    return content[:middle] + bytes(4096) + content[middle + 4096 :]


def flipped(content: bytes) -> bytes:
    at = 3 * len(content) // 4
    wrong = bytes(byte ^ 1 for byte in content[at : at + 200])  # more than padding between tensors
    return content[:at] + wrong + content[at + 200 :]


TEARS = [cut(0), cut(0.3), cut(0.999), zeros, flipped]


def test_a_torn_state_is_left_out(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The one before it goes on, or the run begins again: the weights are the same to the bit."""
    path = changed(recipes, collect=["ema-0.9"])
    unbroken = build_tuned(path, tmp_path / "a")
    due = [upstream.load(str(unbroken / part)).fingerprint() for part in (".", "ema-0.9")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 13)
        build_tuned(path, tmp_path / "b")
    states = sorted((tmp_path / "b" / "upstreams").glob("*/state*.pt"))
    assert [state.name for state in states] == ["state.before.pt", "state.pt"]
    capsys.readouterr()

    def resumed(name: str, *torn: tuple[Path, Callable[[bytes], bytes] | None]) -> str:
        shutil.copytree(tmp_path / "b", tmp_path / name)
        for state, tear in torn:
            there = tmp_path / name / state.relative_to(tmp_path / "b")
            if tear is None:
                there.unlink()
            else:
                there.write_bytes(tear(there.read_bytes()))
        folder = build_tuned(path, tmp_path / name)
        both = [upstream.load(str(folder / part)).fingerprint() for part in (".", "ema-0.9")]
        assert both == due, name
        assert (folder / "log.jsonl").read_text() == (unbroken / "log.jsonl").read_text()
        assert record(folder)["history"] == record(unbroken)["history"]
        assert not list(folder.glob("state*"))
        return capsys.readouterr().out

    older, newest = states
    assert "damaged" not in resumed("whole")
    for number, tear in enumerate(TEARS):
        assert tear(newest.read_bytes()) != newest.read_bytes()
        said = resumed(f"torn{number}", (newest, tear))
        assert said.count("state.pt: damaged") == 1 and "step 5:" not in said
    said = resumed("killed between two renames", (newest, None))
    assert "damaged" not in said and "step 5:" not in said
    said = resumed("both", (newest, cut(0.5)), (older, flipped))
    assert said.count("damaged") == 2 and "step 5:" in said, "from the start"


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_every_update_once(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_plan(recipes / "finetune.yaml", tmp_path / "r").key
    path = changed(recipes, tensorboard=True)
    assert open_plan(path, tmp_path / "r").key == plain, "it changes no weight"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 13)
        build_tuned(path, tmp_path / "r")
    folder = build_tuned(path, tmp_path / "r")
    shown = points(folder / "tensorboard")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sorted(shown) == ["dev/selects", "head_lr", "loss", "lr", "norm"]
    for key in ("loss", "lr", "norm", "head_lr"):
        assert shown[key] == [(line["step"], pytest.approx(line[key])) for line in lines]
    dev = [(each["step"], pytest.approx(each["dev"])) for each in record(folder)["history"]]
    assert shown["dev/selects"] == dev


def test_without_the_packages_there_is_no_figure_and_it_says_how_to_get_them(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    folder = build_tuned(recipes / "finetune.yaml", tmp_path / "r")
    assert "no figure of log.jsonl; a figure needs vl-convert-python" in capsys.readouterr().out
    assert not (folder / "log.svg").exists() and "log.svg" not in (folder / "README.md").read_text()
    monkeypatch.setattr("merging.tuning.recipe.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboard: is not installed: pip install"):
        build_tuned(changed(recipes, tensorboard=True), tmp_path / "r")


def test_the_figure_shows_what_was_logged(recipes: Path, tmp_path: Path) -> None:
    folder = build_tuned(changed(recipes, head_lr=0.02), tmp_path / "r")
    svg = (folder / "log.svg").read_text()
    for words in ("loss", "learning rate", "gradient norm", "dev score", "encoder", "head"):
        assert f">{words}</text>" in svg
    assert "](log.svg)" in (folder / "README.md").read_text()
