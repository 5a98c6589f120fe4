import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from downstream.base import METRICS, TASKS, Count
from downstream.report import results
from downstream.report.results import (
    Cell,
    Score,
    finished,
    load_results,
    provenance,
    safe_name,
    save,
)
from downstream.report.summary import summarise
from downstream.tasks.metrics import of_result
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
    (found,) = load_results(tmp_path)
    assert (found.cell, found.score, found.folder) == (CELL, SCORE, folder)
    assert found.predictions == PREDICTIONS
    assert found.summary.clusters == ["fold1", "fold2"]
    assert found.summary.samples["accuracy"].whole == [50.0]
    assert sorted(p.name for p in folder.iterdir()) == [
        "predictions.jsonl", "score.json", "summary.json",
    ]  # fmt: skip


def test_a_diverged_head_is_null_in_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path, CELL, replace(SCORE, dev={"": {"1.0": math.nan}}), PREDICTIONS)
    assert json.loads((folder / "score.json").read_text())["result"]["dev"] == {"": {"1.0": None}}
    assert math.isnan(load_results(tmp_path)[0].score.dev[""]["1.0"])


@pytest.mark.parametrize("calls", [1, 2, 3])
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

    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, CELL, SCORE, PREDICTIONS[:1])
    assert not finished(tmp_path, CELL)
    assert load_results(tmp_path) == []
    assert [p.name for p in CELL.folder(tmp_path).glob(".*")] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:40],
        lambda text: text.replace('"format": 1', '"format": 7'),
        lambda text: text.replace('"n": 2', '"m": 2'),
        lambda text: text.replace('"score": 50.0', '"score": null'),
        lambda text: text.replace('"seed": 2', '"seed": "2"'),
        lambda text: text.replace('"seen": 0', '"seen": "many"'),
        lambda text: "[" * 100_000,
        lambda text: "[]",
    ],
)
def test_a_spoilt_score_is_named_with_the_way_out(tmp_path: Path, spoil) -> None:
    path = save(tmp_path, CELL, SCORE, PREDICTIONS) / "score.json"
    spoilt = spoil(path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    with pytest.raises(UserError) as caught:
        load_results(tmp_path)
    assert str(path) in str(caught.value)
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lost_predictions_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    (folder / "predictions.jsonl").write_text('{"id": "u1"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl cannot be read"):
        _ = load_results(tmp_path)[0].summary


def spoil_nothing(folder: Path) -> None:
    """A summary that is there and fresh."""


def remove(folder: Path) -> None:
    (folder / "summary.json").unlink()


def cut(folder: Path) -> None:
    path = folder / "summary.json"
    path.write_text(path.read_text()[:30])


def touch(folder: Path) -> None:
    path = folder / "predictions.jsonl"
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [spoil_nothing, remove, cut, touch])
def test_predictions_are_read_only_where_no_summary_fits(
    tmp_path: Path, change, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    first = load_results(tmp_path)[0].summary
    change(folder)
    reads = []
    monkeypatch.setattr(results, "summarise", lambda *a: reads.append(a) or summarise(*a))
    for expected in (change is not spoil_nothing, False):  # once, then it is kept
        reads.clear()
        again = load_results(tmp_path)[0].summary
        assert bool(reads) is expected
        assert (again.test, again.clusters) == (first.test, first.clusters)
        assert (again.samples["accuracy"].without == first.samples["accuracy"].without).all()


def test_lines_that_were_lost_or_changed_are_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    path = folder / "predictions.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"it scores 100, score\.json says 50.*delete the folder"):
        _ = load_results(tmp_path)[0].summary


@pytest.mark.parametrize("line", ['{"id": "u1"}', "[]", "{", '{"id": "u3"' + ', "x": 1}'])
def test_a_damaged_line_is_named_once(tmp_path: Path, line: str) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    with (folder / "predictions.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError) as caught:
        _ = load_results(tmp_path)[0].summary
    assert str(caught.value).count("predictions.jsonl cannot be read") == 1


def test_an_unknown_metric_names_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    remove(folder)
    path = folder / "score.json"
    path.write_text(path.read_text().replace('"metric": "accuracy"', '"metric": "acuracy"'))
    with pytest.raises(UserError, match=r"predictions\.jsonl.*did you mean accuracy"):
        _ = load_results(tmp_path)[0].summary


def test_cells_are_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    remove(folder)

    def refuse(*_: object) -> None:
        raise UserError("read-only file system")

    monkeypatch.setattr(results.disk, "write_checked", refuse)
    assert load_results(tmp_path)[0].summary.utterances == 2


def test_cells_of_before_are_read(tmp_path: Path) -> None:
    """No summary, no features, no seen, and lines without a metric."""
    folder = save(tmp_path, CELL, SCORE, PREDICTIONS)
    remove(folder)
    content = json.loads((folder / "score.json").read_text())
    assert content["cell"]["recipe"] == CELL.revision
    for key in ("features", "seen"):
        del content["result"][key]
    (folder / "score.json").write_text(json.dumps(content))
    path = folder / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    for line in lines:
        del line["metric"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (found,) = load_results(tmp_path)
    assert (found.cell, found.predictions) == (CELL, PREDICTIONS)
    assert found.summary.samples["accuracy"].whole == [50.0]


def test_what_is_not_a_cell_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, CELL, SCORE, PREDICTIONS)
    for place in ("cache/x/y", "notes@home", "hf-org-model@0123456789ab/demo/er@ba9876543210/old"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "score.json").write_text("not ours")
    unfinished = shutil.copytree(CELL.folder(tmp_path), CELL.folder(tmp_path).with_name("seed3"))
    (unfinished / "score.json").unlink()
    assert len(load_results(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the results folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "taken", CELL, SCORE, PREDICTIONS)


def test_no_results_folder_is_no_results(tmp_path: Path) -> None:
    assert load_results(tmp_path / "none") == []


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


def test_reading_a_result_runs_no_code_that_it_names(tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    (tmp_path / "bad.py").write_text(f"open({str(mark)!r}, 'w')\nRATE = 1\n")
    name = f"{tmp_path / 'bad.py'}:RATE"
    metric = of_result(name, "higher")
    assert (metric.label, metric.arrow) == ("RATE", "↑")
    for registry in (METRICS, TASKS):
        assert name not in registry
        with pytest.raises(UserError, match="unknown"):
            registry[name]
    assert not mark.exists()
    assert TASKS.named(name) == 1 and mark.exists(), "what the user wrote is run"
