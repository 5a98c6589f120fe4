"""Recipes: every one under recipes/ loads; whatever is wrong in one is a clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from downstream import fetch, recipe
from merging import recipe as merging
from merging import study
from merging.pretraining.pretrain import PretrainConfig
from merging.tuning import recipe as finetune
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.common.schema import build, read_yaml

ROOT = PROJECT
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    kind = read_yaml(path).get("kind")
    if kind == "task":
        assert recipe.load(path).name == path.stem
    elif kind == "finetune":
        assert finetune.load_recipe(path).steps > 0
    elif kind == "merge":
        assert merging.load_recipe(path).tuned
    elif kind == "study":
        assert study.load(path).ways
    elif kind == "fetch":
        assert fetch.load(path.parent.name).corpora
    else:
        assert build(PretrainConfig, read_yaml(path), str(path)).kind == "pretrain"
    head = path.read_text().split("kind:")[0]
    record = path.parent.name == "hubert_demo"  # the recipe as it was run, beside the weights
    for word in ("Run:", "Time:", "Expect:"):
        assert record or word in head, f"the header of a recipe has a line with {word}"


def broken(suite: Path, old: str, new: str) -> str:
    path = suite / "label.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError) as caught:
        recipe.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("train:", "trian:", "did you mean train?"),
        ("steps: 60", "steps: sixty", "train: steps: must be int, not text"),
        ("steps: 60", "steps: 60.5", "must be int, not float"),
        ("steps: 60", "stesp: 60", "did you mean steps?"),
        ("steps: 60, ", "", "missing key 'steps'"),
        ("steps: 60", "steps: 0", "at least 1"),
        ("[1.0e-2, 1.0e-1]", "['1e-2']", "must be float, not text ('1e-2'); write a plain decimal"),
        ("kind: task", "kind: task\nname: mine", "unknown key 'name'"),
        ("kind: task", "kind: task\nsuite: mine", "unknown key 'suite'"),
        ("kind: task", "kind: task\npath: mine", "unknown key 'path'"),
        ("[1.0e-2, 1.0e-1]", "1.0e-2", "must be a list"),
        ("[1.0e-2, 1.0e-1]", "[-1.0]", "must be above 0 and below 100"),
        ("name: manifest", "name: manifset", "did you mean manifest?"),
        ("name: manifest", "name: 3", "a corpus is named by text, not 3"),
        ("target:", "taget:", "did you mean target?"),
        ("task: classify", "task: clasify", "did you mean classify?"),
        ("kind: task", "kind: tsk", "'tsk' is not one of task"),
        ("kind: task", "kind: [", "not valid YAML"),
        ("train:", "head: {projecter: 3}\ntrain:", "did you mean projector?"),
    ],
)
def test_each_mistake_is_one_clear_line(suite: Path, old: str, new: str, message: str) -> None:
    assert message in broken(suite, old, new)


def test_missing_file_has_a_near_match(suite: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean label\.yaml"):
        recipe.load(suite / "lable.yaml")


def test_overrides_reach_nested_keys_and_change_the_hash(suite: Path) -> None:
    plain = recipe.load(suite / "label.yaml")
    changed = recipe.load(suite / "label.yaml", recipe.overrides(["train.steps=7"]))
    assert changed.train.steps == 7 and changed.hash != plain.hash
    seeds = recipe.load(suite / "label.yaml", recipe.overrides(["train.seeds=9"]))
    assert seeds.hash == plain.hash


def test_unset_variable_is_named(suite: Path, tmp_path: Path) -> None:
    one = recipe.load(suite / "label.yaml", {"corpus.root": "$NO_SUCH_PLACE/x"})
    with pytest.raises(UserError, match=r"export NO_SUCH_PLACE="):
        recipe.examples(one, tmp_path)
