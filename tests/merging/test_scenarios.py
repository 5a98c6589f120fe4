"""The paper's scenarios in recipes/superb: each stage 1 runs, a few steps on tiny models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from downstream.recipe import RECIPES
from merging.recipe import load_recipe, made
from merging.tuning import build_tuned
from merging.tuning.recipe import load_recipe as load_tuning
from tests import tiny
from tests.downstream import test_pc, test_superb, test_tedlium
from tests.merging.test_tuning import record
from upstream.common.schema import read_yaml

SUPERB = RECIPES / "superb"
STRATEGIES = sorted((SUPERB / "strategies").glob("*.yaml"))
CUT = {"steps": 4, "batch": 2, "accumulate": 1, "eval_every": 4, "head_only": 0.0}


def runs() -> list[tuple[str, dict[str, Any]]]:
    """Every fine-tuning that the recipes ask for, once, whatever its base: file and changes."""
    found: list[tuple[str, dict[str, Any]]] = []
    for path in [SUPERB / "merged.yaml", *STRATEGIES]:
        if read_yaml(path)["kind"] == "finetune":
            names = [path.name]
        else:
            names = load_recipe(path).tuned
        for of in filter(None, map(made, names)):
            file = str((path.parent / of.recipe).resolve().relative_to(SUPERB))
            changes = {key: value for key, value in of.changes.items() if key != "upstream"}
            if (file, changes) not in found:
                found.append((file, changes))
    return found


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of recipes/superb that reads made-up corpora, with heads of a few units."""
    folder = tmp_path / "superb"
    shutil.copytree(SUPERB, folder)
    makers = {name: test_superb.CORPORA[name] for name in ("LIBRISPEECH", "VOXCELEB1", "IEMOCAP")}
    for variable, make in makers.items():
        make(root := tmp_path / variable)
        monkeypatch.setenv(variable, str(root))
    monkeypatch.setenv("MANDARIN", str(tmp_path / "VOXCELEB1"))
    monkeypatch.setenv("TEDLIUM", str(tmp_path))
    test_tedlium.root.__wrapped__(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setenv("TIMIT", str(tmp_path / "TIMIT"))
    for speaker in ("TRAIN/DR1/FCJF0", "TRAIN/DR1/MDAC0", "TEST/DR1/FAKS0", "TEST/DR1/MDAB0"):
        test_pc.made(tmp_path / "TIMIT", speaker, "0 1600 h#\n1600 4000 aa\n")
    for name in ("sid", "pr", "er"):
        test_superb.shortened(name, folder)
    path = folder / "tasks" / "timit.yaml"
    task = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(task | {"corpus": task["corpus"] | {"check": False}}))
    return folder


@pytest.mark.parametrize("file, changes", runs(), ids=str)
def test_every_fine_tuning_of_the_paper_runs(
    corpora: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    path = corpora / file
    recipe = load_tuning(path, changes)
    cut = CUT | {"upstream": str(tiny.hf_folder(tmp_path))}
    if recipe.head:
        cut["head"] = recipe.head | {"projector": 8, "hidden": 8}
    if recipe.masked:
        cut |= {"masked.clusters": 8, "masked.layer": 1, "masked.corpus.dev": 0.3}
    if recipe.also and recipe.also[0].masked:
        replayed = {**recipe.also[0].masked.__dict__, "clusters": 8, "layer": 1}
        replayed["corpus"] = recipe.also[0].masked.corpus | {"dev": 0.3}
        cut["also"] = [{"share": 0.5, "masked": replayed}]
    facts = record(build_tuned(path, tmp_path / "r", changes=changes | cut))
    assert facts["moved"]["layer 1"] > 0 == facts["moved"]["cnn"]
    assert facts["recipe"]["task"] == recipe.task
    assert facts["recipe"].get("strategy", "stable") == changes.get("strategy", "stable")


def test_the_layout_is_that_of_the_paper() -> None:
    """The suite's own tasks stay SUPERB's ten; all fine-tuned by the paper's schedule."""
    from downstream.recipe import suite

    assert len(suite("superb")) == 10
    for file, changes in runs():
        recipe = load_tuning(SUPERB / file, changes)
        schedule = (recipe.lr, recipe.head_only, recipe.warmup, recipe.hold, recipe.clip)
        assert schedule == (1e-4, 0.1, 0.1, 0.4, 1.0), file
    merges = [load_recipe(path) for path in STRATEGIES if read_yaml(path)["kind"] == "merge"]
    assert {plan.params["alpha"] for plan in merges} == {0.25, 1.0}
