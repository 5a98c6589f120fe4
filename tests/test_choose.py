"""Curves of alpha, and alpha chosen on held-out dev scores: the rule, the regret, and once only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import upstream
from downstream import jobs
from downstream.survey import Settings
from merging import choose, names
from merging.choose import Choose, pick
from merging.recipe import load_recipe
from upstream.errors import UserError

METRICS = {"asr": "wer", "sid": "accuracy"}


def test_the_mean_relative_gain_decides_over_error_rates_and_accuracies() -> None:
    dev = {
        "asr": {0.0: 20.0, 0.25: 18.0, 0.5: 16.0, 1.0: 30.0},
        "sid": {0.0: 60.0, 0.25: 70.0, 0.5: 62.0, 1.0: 40.0},  # errors 40, 30, 38, 60
    }
    found = pick(dev, METRICS, [0.0, 0.25, 0.5, 1.0])
    gains = {"0": 0.0, "0.25": (0.1 + 0.25) / 2, "0.5": (0.2 + 0.05) / 2, "1": (-0.5 - 0.5) / 2}
    assert found.gain == pytest.approx(gains)
    assert found.alpha == 0.25 and found.mean_regret == 0
    found = pick(dev, METRICS, [0.0, 0.5, 1.0])
    assert found.alpha == 0.5, "0.25 was scored, but is no candidate here"
    assert found.regret == {"asr": 2.0, "sid": -8.0} and found.mean_regret == -3.0
    text = "\n".join(found.lines())
    assert "asr WER 16.00  sid ACC 62.00  relative gain +12.5 %" in text
    assert "0.25 instead: -3.00 points worse on average (asr 2.00, sid -8.00)" in text


def test_ties_go_to_the_nearest_of_a_quarter() -> None:
    level = {"asr": {0.0: 10.0, 0.1: 8.0, 0.25: 9.0, 0.3: 8.0, 1.0: 8.0}}
    assert pick(level, METRICS, [0.0, 0.1, 0.3, 1.0]).alpha == 0.3
    assert pick(level, METRICS, [0.1, 1.0]).alpha == 0.1


def test_errors_near_nothing_and_diverged_heads() -> None:
    small = {"asr": {0.0: 0.0, 0.25: 0.5, 1.0: 0.0}}
    assert pick(small, METRICS, [0.0, 0.25, 1.0]).gain["0.25"] == -0.5
    nan = {"asr": {0.0: 5.0, 0.25: 6.0, 1.0: float("nan")}}
    assert pick(nan, METRICS, [1.0, 0.25]).alpha == 0.25
    with pytest.raises(UserError, match=r"alpha 0 .*asr"):
        pick({"asr": {0.0: float("nan"), 0.25: 6.0}}, METRICS, [0.25])


def test_what_a_choice_needs() -> None:
    assert choose.wanted(Choose(["asr"], [0.5, 0.1]), "here") == [0.0, 0.1, 0.25, 0.5]
    assert Choose(["asr"]).alpha == [0, 0.1, 0.25, 0.5, 0.75, 1]
    with pytest.raises(UserError, match="twice"):
        choose.wanted(Choose(["asr"], [0.5, 0.5]), "here")
    with pytest.raises(UserError, match="fine-tuned on asr"):
        choose.require_held_out(Choose(["pr", "asr"]), ["asr"], "here")


@pytest.mark.parametrize(
    "specs, expected",
    [
        ("a,b", [["a"], ["b"]]),
        ("merged:alpha=0.5,fbank", [["merged:alpha=0.5"], ["fbank"]]),
        ("merged:alpha=0,0.25,1", [["merged:alpha=0", "merged:alpha=0.25", "merged:alpha=1"]]),
        (
            "fbank,merged:alpha=0,.5,method=ties,hubert_base:padding=s3prl",
            [
                ["fbank"],
                ["merged:alpha=0,method=ties", "merged:alpha=.5,method=ties"],
                ["hubert_base:padding=s3prl"],
            ],
        ),
        ("m.yaml:alpha=1e-1, 1:method=ties", [["m.yaml:alpha=1e-1:method=ties",
                                               "m.yaml:alpha=1:method=ties"]]),
        ("merged:alpha=0.5,0.25x", [["merged:alpha=0.5"], ["0.25x"]]),
    ],
)  # fmt: skip
def test_a_list_of_alphas_is_a_curve(specs: str, expected: list[list[str]]) -> None:
    assert names.curves(specs) == expected


def test_a_curve_is_measured_from_the_base_and_begins_there(recipes: Path, tmp_path: Path) -> None:
    listed, reference = names.requests("merged:alpha=0,0.5", recipes, tmp_path / "r")
    base = load_recipe(recipes / "merged.yaml").base
    assert [one.spec for one in listed] == [base, "merged:alpha=0", "merged:alpha=0.5"]
    assert reference == base
    prints = [names.load(one).fingerprint() for one in listed]
    assert prints[0] == prints[1] != prints[2]
    assert not list((tmp_path / "r").rglob("merge.json")), "nothing is written"
    with pytest.raises(UserError, match="twice"):
        names.requests("merged:alpha=0.5,0.5", recipes, tmp_path / "r")


def choosing(recipes: Path, **keys: Any) -> None:
    path = recipes / "merged.yaml"
    content = yaml.safe_load(path.read_text())
    content.pop("params", None)
    content["choose"] = {"tasks": ["word"], "alpha": [0.5, 1], **keys}
    path.write_text(yaml.safe_dump(content))


def test_alpha_is_chosen_once_and_by_every_later_command(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    choosing(recipes)
    results = tmp_path / "r"
    how = Settings(results, 1, "cpu")
    where = {"recipe": str(recipes / "merged.yaml"), "results": str(results)}

    listed, _ = names.requests("merged", recipes, results)
    assert "chosen" not in listed[-1].options, "planning builds nothing"
    assert "steps of fine-tuning, alpha to choose from 4 on word" in names.unbuilt(
        listed[-1], results
    )
    with pytest.raises(UserError, match="chooses its alpha, which is not done yet"):
        upstream.load("merged", **where)

    listed, _ = names.requests("merged", recipes, results, how)
    out = capsys.readouterr().out
    assert "alpha chosen on dev scores of word" in out and "0.25 instead" in out
    kept = list((results / "chosen").iterdir())
    assert listed[-1].options["chosen"] == str(kept[0]) and len(kept) == 1
    choice = json.loads(kept[0].read_text())
    assert choice["alpha"] in (0.5, 1.0) and set(choice["gain"]) == {"0", "0.25", "0.5", "1"}
    assert names.unbuilt(listed[-1], results) == ""

    merged = names.load(listed[-1])
    assert f"alpha {choice['alpha']} (chosen on word)" in merged.source
    assert upstream.load("merged", **where).fingerprint() == merged.fingerprint()
    same = upstream.load("merged", alpha=choice["alpha"], **where)
    assert same.fingerprint() == merged.fingerprint()

    monkeypatch.setattr(jobs, "run_all", lambda *_: pytest.fail("scored again"))
    again, _ = names.requests("merged", recipes, results, how)
    assert again == listed
    planned, _ = names.requests("merged", recipes, results)
    assert planned == listed, "a choice that was made is found by a plan"


def test_a_task_that_was_trained_on_cannot_choose(recipes: Path, tmp_path: Path) -> None:
    choosing(recipes, tasks=["label"])
    with pytest.raises(UserError, match="fine-tuned on label"):
        names.requests("merged", recipes, tmp_path / "r", Settings(tmp_path / "r", 1, "cpu"))
    choosing(recipes, tasks=["wrod"])
    with pytest.raises(UserError, match="did you mean word"):
        names.requests("merged", recipes, tmp_path / "r", Settings(tmp_path / "r", 1, "cpu"))
