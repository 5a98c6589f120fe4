"""A study: what it stands for, that one command runs and resumes it, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import benchmark
from merging import study
from merging.recipe import load_recipe
from tests import tiny
from tests.corpora import fault
from upstream.common import PROJECT


def write(recipes: Path, **changes: Any) -> Path:
    """A study beside the recipes: two ways, of which one is a sequence."""
    base = yaml.safe_load((recipes / "merged.yaml").read_text())["base"]
    content = {
        "kind": "study",
        "bases": [base],
        "seeds": [0, 1],
        "alphas": [0.25, 1],
        "ways": {
            "stable": {"tuned": ["finetune.yaml"]},
            "lora": {"tuned": ["finetune.yaml:strategy=lora:params={rank: 2}"], "alphas": [1]},
            "then": {"tuned": ["finetune_word.yaml"], "after": "stable", "seeds": [0]},
        },
    }
    path = recipes / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_it_stands_for_all_ways_bases_seeds_and_alphas(recipes: Path, tmp_path: Path) -> None:
    other = str(tiny.hf_folder(tmp_path / "other", "hubert", seed=1))
    base = yaml.safe_load((recipes / "merged.yaml").read_text())["base"]
    path = write(recipes, bases=[base, other])
    specs, bases = study.expand(f"fbank,{path}", tmp_path / "r")
    assert bases == [base, other]
    names = specs.split(",")
    assert names[:3] == ["fbank", base, other] and len(names) == len({*names}) == 3 + 2 * 8
    folder = tmp_path / "r" / "studies" / "tiny-study"
    assert f"{folder}/1/lora.yaml:alpha=1:seed=1" in names
    assert f"{folder}/0/then.yaml:alpha=0.25:seed=0" in names
    assert load_recipe(folder / "1" / "stable.yaml").base == other
    then = yaml.safe_load((folder / "1" / "then.yaml").read_text())
    assert then["base"] == "stable.yaml" and then["tuned"][0].count("/1/stable.yaml") == 1
    assert study.expand(specs, tmp_path / "r") == (specs, [])


def test_every_base_has_a_matrix_of_its_own(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = yaml.safe_load((recipes / "merged.yaml").read_text())["base"]
    other = str(tiny.hf_folder(tmp_path / "other", "hubert", seed=1))
    ways = {"stable": {"tuned": ["finetune.yaml"]}}
    path = write(recipes, bases=[f"hf:{first}/", other], seeds=[0], alphas=[1], ways=ways)
    words = ["--upstream", str(path), "--suite", str(recipes), "--downstream", "label"]
    words += ["--results", str(tmp_path / "r"), "--workers", "1", "--seeds", "1"]
    assert benchmark.main(words) == 0
    table = capsys.readouterr().out
    assert table.count("tuned on") == 2 and table.index(first) < table.index(other)
    assert len(list((tmp_path / "r" / "upstreams").glob("finetune@*/finetune.json"))) == 2


def test_one_command_runs_it_prints_the_matrix_and_goes_on(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(recipes)
    words = ["--upstream", str(path), "--suite", str(recipes), "--downstream", "label"]
    words += ["--results", str(tmp_path / "r"), "--workers", "1", "--seeds", "1"]
    assert benchmark.main(["plan", *words]) == 0
    assert "finetune: 20 steps of fine-tuning" in capsys.readouterr().out
    assert benchmark.main(words) == 0
    table = capsys.readouterr().out
    assert "0 cells kept, 9 to compute" in table
    rows = [line.split("  ")[0] for line in table.splitlines()]
    assert "label, then word" in rows and "layers moved" in table
    for way in ("stable", "lora", "stable (after alpha 0.25)"):
        assert way in table
    made = (tmp_path / "r" / "upstreams").glob("finetune*/finetune.json")
    records = [json.loads(path.read_text())["recipe"] for path in made]
    assert sorted((r.get("strategy", "stable"), r["seed"]) for r in records) == [
        ("lora", 0), ("lora", 1), ("stable", 0), ("stable", 0), ("stable", 1)
    ]  # fmt: skip
    assert benchmark.main(words) == 0
    assert "9 cells kept, 0 to compute" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: name at least one"),
        ({"bases": ["hubert_demo:padding=s3prl"]}, "goes without options"),
        ({"alphas": ["x"]}, r"alphas[0]: must be float"),
        ({"ways": {"a": {"tuned": ["none.yaml"]}}}, "'none.yaml' is no fine-tuning recipe beside"),
        ({"ways": {"a": {"tuned": ["hubert_demo"]}}}, "'hubert_demo' is no fine-tuning recipe"),
        ({"ways": {"../a": {"tuned": ["finetune.yaml"]}}}, "is no name of a file"),
        ({"ways": {"a": {"tuned": ["finetune.yaml"], "after": "a"}}}, "no way 'a' before this"),
        ({"ways": {"a": {"tuned": ["finetune.yaml"], "methd": "x"}}}, "did you mean method?"),
        ({"ways": {"a": {"tuned": ["finetune.yaml"], "method": "linaer"}}}, "did you mean linear"),
        ({"ways": {"a": {"tuned": []}}}, "tuned: name at least one"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    changes: dict[str, Any], message: str, recipes: Path, tmp_path: Path
) -> None:
    path = write(recipes, **changes)
    line = fault(study.expand, str(path), tmp_path / "r")
    assert message in line
    assert not (tmp_path / "r" / "upstreams").exists()


@pytest.mark.parametrize("path", sorted(PROJECT.glob("recipes/**/study.yaml")), ids=str)
def test_the_shipped_studies_are_sound(path: Path, tmp_path: Path) -> None:
    specs, bases = study.expand(str(path), tmp_path)
    assert bases and len(specs.split(",")) > 2
