import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from downstream.report import results
from downstream.report.results import (
    Cell,
    Count,
    Score,
    finished,
    load,
    provenance,
    safe_name,
    save,
)
from upstream.common.errors import UserError

CELL = Cell("hf:org/model", "0123456789ab", "demo", "er", "ba9876543210", 2)
PREDICTIONS = [
    Count("u1", "s1", "glücklich", "glücklich", 0.0, 1.0, "fold1"),
    Count("u2", "s2", 'a "b"\u2028c', "", 1.0, 1.0, "fold2"),
]
SCORE = Score(
    metric="accuracy",
    better="higher",
    score=50.0,
    lr={"fold1": 0.1, "fold2": 0.01},
    dev={"fold1": {"0.1": 60.0, "0.01": 55.0}, "fold2": {"0.1": 12.0, "0.01": 70.0}},
    n=2,
    speakers=2,
    steps=10,
    seconds=1.5,
    device="cpu",
    recipe={"train": {"lr": [0.1, 0.01]}},
    source="somewhere",
    warnings=["few speakers"],
    **provenance(),
)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    assert not finished(tmp_path, CELL)
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    assert folder == tmp_path / "hf-org-model@0123456789ab/demo/er@ba9876543210/seed2"
    assert finished(tmp_path, CELL)
    (found,) = load(tmp_path)
    assert (found.cell, found.score, found.folder) == (CELL, SCORE, folder)
    assert found.predictions == PREDICTIONS
    assert found.rows.to_dict("list") == {
        "id": ["u1", "u2"],
        "speaker": ["s1", "s2"],
        "errors": [0.0, 1.0],
        "total": [1.0, 1.0],
        "fold": ["fold1", "fold2"],
        "seed": [2, 2],
    }
    assert sorted(p.name for p in folder.iterdir()) == ["predictions.jsonl", "score.json"]


def test_a_diverged_head_is_null_in_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path, CELL, replace(SCORE, dev={"": {"1.0": math.nan}}), PREDICTIONS)
    assert json.loads((folder / "score.json").read_text())["result"]["dev"] == {"": {"1.0": None}}
    assert math.isnan(load(tmp_path)[0].score.dev[""]["1.0"])


@pytest.mark.parametrize("calls", [1, 2])
def test_an_interrupted_save_leaves_an_unfinished_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    save(tmp_path, CELL, SCORE, PREDICTIONS)
    left = [calls]

    def dying_replace(source: str, target: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(results.os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, CELL, SCORE, PREDICTIONS[:1])
    assert not finished(tmp_path, CELL)
    assert load(tmp_path) == []
    assert [p.name for p in CELL.folder(tmp_path).glob(".*")] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:40],
        lambda text: text.replace('"format": 1', '"format": 7'),
        lambda text: text.replace('"n": 2', '"m": 2'),
        lambda text: text.replace('"score": 50.0', '"score": null'),
        lambda text: "[]",
    ],
)
def test_a_spoilt_score_is_named_with_the_way_out(tmp_path: Path, spoil) -> None:
    path = save(tmp_path, CELL, SCORE, PREDICTIONS) / "score.json"
    spoilt = spoil(path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lost_predictions_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    (folder / "predictions.jsonl").write_text('{"id": "u1"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl cannot be read"):
        _ = load(tmp_path)[0].rows


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the results folder should be")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "taken", CELL, SCORE, PREDICTIONS)


def test_no_results_folder_is_no_results(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("hubert_base", "hubert_base"),
        ("merged:alpha=0.5", "merged-alpha=0.5"),
        ("hf:/path/to/x", "hf-path-to-x"),
        ("mine.py:Mine", "mine.py-Mine"),
        ("../../etc", "etc"),
        ("..", "unnamed"),
    ],
)
def test_safe_names(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_a_long_path_keeps_its_end() -> None:
    assert safe_name("hf:" + "long/" * 100 + "model") == ("long-" * 100 + "model")[-80:]


def test_git_of_another_project_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PROJECT", tmp_path)
    assert provenance()["git"] == {"revision": "unknown", "dirty": None}
