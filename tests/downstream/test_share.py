"""Results for others: what is said is what was scored, and what was heard is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import benchmark
from downstream.report import share
from downstream.report.compare import scores
from downstream.report.groups import labels
from downstream.report.pool import Pool
from downstream.report.results import load_results
from tests.downstream.test_page import sourced
from tests.downstream.test_table import put

HOSTILE = 'hf:org/<script>"x" --- - {a: [b]} ☃ 语音'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in range(3):
        for upstream in ("mine", HOSTILE):
            put(tmp_path, upstream, "asr", seed, 0.2)
            put(tmp_path, upstream, "sid", seed, 0.1)
            put(tmp_path, upstream, "er", seed, 0.1, seen=7)
    for path in tmp_path.glob("*@*/*/*/*/score.json"):
        content = json.loads(path.read_text())
        content["result"]["recipe"] = {"task": content["cell"]["task"]}
        path.write_text(json.dumps(content))
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        status = benchmark.main([str(word) for word in ("share", *words)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("upstream", ["mine", HOSTILE])
def test_every_eval_ever(root: Path, upstream: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, upstream, "--results", root, "--organization", "a lab")
    record: dict[str, Any] = json.loads(out)
    assert status == 0 and record["schema_version"] == "0.3.0"
    assert set(record) == {
        "schema_version", "evaluation_id", "evaluation_timestamp", "retrieved_timestamp",
        "source_metadata", "eval_library", "model_info", "evaluation_results",
    }  # fmt: skip
    assert record["model_info"]["name"] == upstream and record["retrieved_timestamp"].isdigit()
    assert record["source_metadata"]["source_organization_name"] == "a lab"
    found = {each["evaluation_name"]: each for each in record["evaluation_results"]}
    assert set(found) == {"demo/asr WER", "demo/sid ACC"}, "er was heard"
    for name, each in found.items():
        task, config = name.split()[0].split("/")[1], each["metric_config"]
        group = [
            r for r in load_results(root) if r.cell.task == task and r.cell.upstream == upstream
        ]
        (row,) = scores(group, labels(group), Pool(load_results(root)))
        assert each["score_details"]["score"] == row.score
        sure = each["score_details"]["uncertainty"]["confidence_interval"]
        assert (sure["lower"], sure["upper"]) == (row.low, row.high)
        assert config["lower_is_better"] is (task == "asr")
        assert ("max_score" in config) is ("score_type" in config) is (task == "sid")
        assert each["source_data"]["source_type"] == "other"
        details = [each["source_data"]["additional_details"], each["score_details"]["details"]]
        assert all(isinstance(value, str) for facts in details for value in facts.values())


@pytest.mark.parametrize("upstream", ["mine", HOSTILE])
def test_a_card_says_it_and_keeps_what_it_said(
    root: Path, tmp_path: Path, upstream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "model" / "README.md"
    card.parent.mkdir()
    card.write_text("---\nlicense: mit\ntags: [speech]\n---\n# Mine\n\nSome | text.\n")
    words = (upstream, "--results", root, "--output", card)
    assert call(capsys, *words)[0] == 0
    first = card.read_text()
    assert call(capsys, *words)[0] == 0 and card.read_text() == first
    assert first.endswith("# Mine\n\nSome | text.\n")
    data = ModelCard.load(card).data
    assert data.license == "mit" and data.tags == ["speech"] and data.model_name == upstream
    assert {(each.task_type, each.metric_type) for each in data.eval_results} == {
        ("automatic-speech-recognition", "wer"), ("audio-classification", "accuracy"),
    }  # fmt: skip
    wer = next(each for each in data.eval_results if each.metric_type == "wer")
    assert wer.dataset_config == "demo/asr" and "3 head seeds" in wer.metric_name
    assert wer.metric_args["low"] < wer.metric_value < wer.metric_args["high"]


def test_without_an_output_it_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "mine", "--results", root, "--format", "model-index")
    (model,) = yaml.safe_load(out)["model-index"]
    assert status == 0 and model["name"] == "mine" and len(model["results"]) == 2


def test_what_cannot_be_shared_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--results", root)
    assert "did you mean mine" in call(capsys, "mime", *where)[2]
    assert "did you mean demo" in call(capsys, "mine", *where, "--suite", "dmo")[2]
    put(root, "heard", "er", 0, 0.1, seen=7)
    assert "heard in fine-tuning" in call(capsys, "heard", *where)[2]
    for text in ("---\n: [\n---\n", "---\n- a\n---\n"):
        card = tmp_path / "bad.md"
        card.write_text(text)
        status, _, err = call(capsys, "mine", *where, "--output", card)
        assert status == 2 and "front matter" in err and card.read_text() == text
    assert call(capsys, "mine", *where, "--output", root / "no" / "\0.json")[0] == 2


def test_cards_of_what_was_built_here_are_kept_up_to_date(root: Path) -> None:
    card = root / "upstreams" / "merged@1" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("# Merged\n")
    other = root / "elsewhere" / "README.md"
    other.parent.mkdir()
    other.write_text("# A user's own\n")
    sourced(root, "mine", str(card.parent))
    sourced(root, HOSTILE, str(other.parent))
    for path in root.glob("*@*/*/*/*/score.json"):
        content = json.loads(path.read_text())
        content["result"]["created"] = "2026-11-26T00:00:00+00:00"
        path.write_text(json.dumps(content))
    results = load_results(root)
    assert share.update_cards(results, root / "upstreams", Pool(results)) == [card]
    assert metadata_load(card)["model-index"][0]["name"] == "mine"
    assert other.read_text() == "# A user's own\n"
