"""A wrong name is told before any corpus is read, upstream built or results folder made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.test_cli import call

RUN = "--upstream fbank --suite {suite} --results {results}"
MISTAKES = {
    # run and plan, both with these words behind them
    "upstream": ("run plan", "--upstream fbnak --suite {suite}", "did you mean fbank"),
    "second upstream": ("run plan", "--upstream fbank,fbnk --suite {suite}", "did you mean fbank"),
    "upstream's option": ("run plan", "--upstream fbank:cmvm=true --suite {suite}", "mean cmvn"),
    "option's value": ("run plan", "--upstream fbank:cmvn=maybe --suite {suite}", "true or false"),
    "file": ("run plan", "--upstream nowhere/model.pt --suite {suite}", "nowhere"),
    "class": ("run plan", "--upstream {user}:Mien --suite {suite}", "did you mean Mine"),
    "class's file": ("run plan", "--upstream nowhere.py:Mine --suite {suite}", "nowhere.py"),
    "recipe": ("run plan", "--upstream nowhere.yaml --suite {suite}", "nowhere.yaml"),
    "suite": ("run plan", "--upstream fbank --suite dmeo", "did you mean demo"),
    "task": ("run plan", "--upstream fbank --suite {suite} --downstream lable", "mean label"),
    "set key": ("run plan", "--upstream fbank --suite {suite} --set train.stesp=3", "mean steps"),
    "set value": ("run plan", "--upstream fbank --suite {suite} --set train.steps=x", "be int"),
    "seeds": ("run plan", "--upstream fbank --suite {suite} --seeds some", "whole number"),
    "device": ("run plan", "--upstream fbank --suite {suite} --device cpuu", "cannot be used"),
    "executor": ("run plan", "--upstream fbank --suite {suite} --executor slrum", "mean slurm"),
    "reference": ("run plan", "--upstream fbank --suite {suite} --reference fbnk", "mean fbank"),
    "published": ("run", "--upstream fbank --suite {suite} --published hubert-bsae", "hubert-base"),
    "flag": ("run plan", "--upsteam fbank --suite {suite}", "did you mean --upstream"),
    "second flag": ("run plan", "--upstream fbank --siute=demo", "did you mean --suite"),
    "base in a recipe": ("run plan", "--upstream {recipes}/base.yaml --suite {suite}", "hubert_"),
    "method in one": ("run plan", "--upstream {recipes}/way.yaml --suite {suite}", "mean linear"),
    "file in one": ("run plan", "--upstream {recipes}/run.yaml --suite {suite}", "gone.yaml"),
    "method": ("run plan", "--upstream {recipes}/ok.yaml:method=liner --suite {suite}", "linear"),
    "compared a": ("compare", "fbnk fbank", "no results for upstream 'fbnk'"),
    "compared b": ("compare", "published:fbank published:fbnak", "published"),
    "compared flag": ("compare", "a b --fromat csv", "did you mean --format"),
    "format": ("compare", "a b --format txt", "did you mean text"),
    "errors' upstream": ("errors", "fbnk fbank --downstream label --suite {suite}", "'fbnk'"),
    "matrix's suite": ("matrix", "--suite dmeo", "no results in suite 'dmeo'"),
    "matrix's row": ("matrix", "--published hubert-bsae", "hubert-base"),
    "report's row": ("report", "--published hubert-bsae", "hubert-base"),
    "report's flag": ("report", "--referense fbank", "did you mean --reference"),
    "shared": ("share", "fbnk", "'fbnk'"),
    "shared form": ("share", "fbank --format model-idnex", "did you mean model-index"),
    "similar to": ("similarity", "fbnak fbank --suite {suite}", "did you mean fbank"),
    "similar": ("similarity", "fbank fbnak --suite {suite}", "did you mean fbank"),
    "similar option": ("similarity", "fbank fbank:cmvm=1 --suite {suite}", "did you mean cmvn"),
    "similar task": ("similarity", "fbank {tiny} --suite {suite} --downstream lable", "mean label"),
    "similar suite": ("similarity", "fbank {tiny} --suite dmeo", "did you mean demo"),
    "similar device": ("similarity", "fbank {tiny} --suite {suite} --device gpu", "cannot be used"),
    "predicted": ("predict", "a.wav --upstream fbnk --downstream label --suite {suite}", "'fbnk'"),
    "predict's suite": ("predict", "a.wav --upstream fbank --downstream asr --suite dmeo", "demo"),
    "predict's flag": ("predict", "a.wav --upstream fbank --downsteam asr", "mean --downstream"),
    "cache": ("cache", "claer", "did you mean clear"),
    "cached": ("cache", "clear fbnk", "nothing of 'fbnk'"),
    "list": ("list", "upstream", "did you mean upstreams"),
    "command": ("", "compaer a b", "did you mean compare"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither corpora nor weights nor results may be touched."""

    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("read, built or written too early")

    for place in (
        "downstream.run.prepare.prepare",
        "downstream.recipe.examples",
        "downstream.run.schedule.survey",
        "downstream.run.execute.run",
        "merging.requests._settled",
        "merging.requests.open_merge",
        "upstream.encoder.encoder.load",
        "upstream.audio.load",
    ):
        monkeypatch.setattr(place, touched)


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize("name", MISTAKES)
def test_told_before_anything_is_read_or_made(
    name: str, suite: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands, text, message = MISTAKES[name]
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    shutil.copy(suite / "label.yaml", recipes)
    (tmp_path / "mine.py").write_text(
        "from upstream.fbank import Fbank\nclass Mine(Fbank):\n    num_layers = 1\n"
    )
    tune = f"kind: finetune\nupstream: {base}\ntask: label.yaml\nsteps: 2\nbatch: 2\nlr: 1.0e-3\n"
    (recipes / "tune.yaml").write_text(tune + "eval_every: 1\n")
    for file, start, tuned, method in (
        ("base", "hubert_dmeo", "tune.yaml", "linear"),
        ("way", base, "tune.yaml", "liner"),
        ("run", base, "gone.yaml", "linear"),
        ("ok", base, "tune.yaml", "linear"),
    ):
        (recipes / f"{file}.yaml").write_text(
            f"kind: merge\nbase: {start}\ntuned: [{tuned}]\nmethod: {method}\n"
        )
    words = text.format(suite=suite, tiny=base, recipes=recipes, user=tmp_path / "mine.py").split()
    for command in commands.split() or [""]:
        where = ["--results", tmp_path / "r"] if command and command != "list" else []
        assert call(*filter(None, [command]), *words, *where) == 2, command
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert message in line and "too early" not in line and "unforeseen" not in line
        assert not said.out
        made = [path for path in (tmp_path / "r").rglob("*") if path.suffix != ".lease"]
        assert not made, "no file below the results folder"


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.usefixtures("nothing")
def test_a_hub_out_of_reach(
    command: str, suite: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for spec in ("hf:some/model", "fbank,hubert_base", "hubert_large_ll60k"):
        words = (command, "--upstream", spec, "--suite", suite, "--results", tmp_path / "r")
        assert call(*words) == 2
        assert "cannot be reached" in capsys.readouterr().err
