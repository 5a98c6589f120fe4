"""Another fine-tuning seed, or another key, by name: merged:seed=1, finetune.yaml:seed=1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import benchmark
import upstream
from downstream.run.schedule import RunOptions
from merging import requests
from merging.recipe import Made, altered, load_recipe, made
from merging.tuning import build_tuned
from tests.merging.test_tuning import changed, record
from upstream.common.errors import UserError


def test_names_of_what_is_made() -> None:
    assert made("hubert_base") is None and made("tuned/a=b") is None
    assert made("a/finetune.yaml") == Made("a/finetune.yaml", "", {})
    assert made("finetune.yaml/ema-0.9:seed=1") == Made("finetune.yaml", "ema-0.9", {"seed": 1})
    name = "f.yml:strategy=lora:params={rank: 2, alpha: 4}:lr=1e-3"
    changes = {"strategy": "lora", "params": {"rank": 2, "alpha": 4}, "lr": 1e-3}
    assert made(name) == Made("f.yml", "", changes)
    assert made("a.yaml.d/f.yaml:upstream=b.yaml") == Made(
        "a.yaml.d/f.yaml", "", {"upstream": "b.yaml"}
    )
    with pytest.raises(UserError, match="seed is given twice"):
        made("f.yaml:seed=1:seed=2")


def test_lists_of_seeds_and_alphas_are_all_pairs() -> None:
    assert requests.curves("fbank,m.yaml:alpha=0.25, 1:seed=0,2:method=ties") == [
        ["fbank"],
        [
            f"m.yaml:alpha={alpha}:seed={seed}:method=ties"
            for alpha in ("0.25", "1")
            for seed in (0, 2)
        ],
    ]
    assert requests.curves("m.yaml:seed=0,1 , fbank") == [
        ["m.yaml:seed=0", "m.yaml:seed=1"],
        ["fbank"],
    ]


def test_every_seed_brings_its_fine_tuned_upstream(recipes: Path, tmp_path: Path) -> None:
    def names(specs: str) -> list[str]:
        listed, reference = requests.requests(specs, recipes, tmp_path / "r")
        assert reference == listed[0].name == load_recipe(recipes / "merged.yaml").base
        return [each.name for each in listed[1:]]

    assert names("merged:seed=1") == ["finetuned:seed=1", "merged:seed=1"]
    assert names("merged:seed=0,1") == [
        *("finetuned:seed=0", "finetuned:seed=1"), *("merged:seed=0", "merged:seed=1"),
    ]  # fmt: skip
    assert len(names("merged:alpha=0.5,1:seed=0,1")) == 4, "alpha 1 may be among them"
    listed, _ = requests.requests("merged:seed=0,1", recipes, tmp_path / "r")
    waiting = [requests.unbuilt(each) for each in listed[1:]]
    assert all(one and one.why == "finetune: 20 steps of fine-tuning" for one in waiting)
    assert not (tmp_path / "r" / "upstreams").exists(), "a plan builds nothing"


def test_a_seed_is_trained_once_whatever_names_it(recipes: Path, tmp_path: Path) -> None:
    path, options = recipes / "merged.yaml", RunOptions(tmp_path / "r", 1, "cpu")
    listed, _ = requests.requests("merged:seed=0,1", recipes, options.results, options)
    own, other = listed[1], listed[2]
    assert own.spec == str(build_tuned(recipes / "finetune.yaml", options.results))
    assert other.spec == str(
        build_tuned(recipes / "finetune.yaml", options.results, changes={"seed": 1})
    )
    assert record(Path(own.spec))["recipe"]["seed"] == 0
    assert record(Path(other.spec))["recipe"]["seed"] == 1
    prints = [each.load().fingerprint() for each in listed]
    assert len(set(prints)) == 5
    where = {"recipe": str(path), "results": str(options.results)}
    assert upstream.load("merged", **where).fingerprint() == prints[3], "its own seed is 0"
    assert upstream.load("finetuned:seed=1", **where).fingerprint() == prints[2]
    # and in a recipe: a soup of two runs
    content = yaml.safe_load(path.read_text()) | {
        "tuned": [f"finetune.yaml:seed={s}" for s in "01"]
    }
    path.write_text(yaml.safe_dump(content))
    soup = upstream.load("merged", **where)
    assert soup.fingerprint() not in prints
    with pytest.raises(UserError, match="seed=1: its tuned models would all be one"):
        altered(path, seed=1)
    assert len(list((tmp_path / "r" / "upstreams").glob("finetune@*"))) == 2


@pytest.mark.parametrize(
    "tuned, seed, message",
    [
        (
            ["some/folder", "hubert_base"],
            "1",
            r"merged.yaml: seed=1: is for fine-tuning, and it on",
        ),
        (["finetune.yaml"], "-1", "seed: -1 must be at least 0"),
        (["finetune.yaml"], "one", "seed: must be int"),
        (["finetune.yaml:sed=1"], "1", "finetune.yaml: unknown key 'sed'; did you mean seed"),
        (["finetune.yaml:seed=x"], None, "finetune.yaml: seed: must be int"),
    ],
)
def test_seeds_that_make_no_sense_are_one_line(
    recipes: Path, tmp_path: Path, tuned: list[str], seed: str | None, message: str
) -> None:
    changed(recipes, "merged", tuned=tuned)
    name = f"merged:seed={seed}" if seed else "merged"
    with pytest.raises(UserError, match=message) as caught:
        listed, _ = requests.requests(name, recipes, tmp_path / "r")
        requests.unbuilt(listed[-1])
    assert "\n" not in str(caught.value)


def test_finetune_takes_any_key(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(recipes / "finetune.yaml"), "--results", str(tmp_path / "r")]
    assert benchmark.main([*words, "--set", "seed=3", "--set", "steps=5"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    facts = json.loads((folder / "finetune.json").read_text())["recipe"]
    assert (facts["seed"], facts["steps"], facts["name"]) == (3, 5, "finetune")
    assert benchmark.main([*words, "--set", "stepz=5"]) == 2
    assert "unknown key 'stepz'; did you mean steps?" in capsys.readouterr().err


def test_a_choice_is_made_for_each_seed(recipes: Path, tmp_path: Path) -> None:
    changed(recipes, "merged", params={}, choose={"tasks": ["label"], "alpha": [0.5]})
    with pytest.raises(UserError, match="was fine-tuned on"):  # it looked at the seed's own run
        options = RunOptions(tmp_path / "r", 1, "cpu")
        requests.requests("merged:seed=1", recipes, tmp_path / "r", options)
    (folder,) = (tmp_path / "r" / "upstreams").glob("finetune@*")
    assert record(folder)["recipe"]["seed"] == 1
