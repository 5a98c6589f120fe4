"""`merged` and `finetuned` are those of the results folder; looking at them builds nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import benchmark
import upstream
from merging.built import find
from merging.tuning import build_tuned
from upstream.checkpoints.containers import read_json
from upstream.common import PROJECT
from upstream.common.errors import UserError


@pytest.fixture
def run(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[Path, Path]]:
    """A suite whose merged upstream was built and scored in a results folder."""
    results = tmp_path / "mine"
    words = ["--upstream", "merged", "--suite", str(recipes), "--results", str(results),
             "--workers", "1", "--downstream", "label"]  # fmt: skip
    assert benchmark.main(words) == 0
    capsys.readouterr()
    yield recipes, results


def call(*words: object) -> int:
    return benchmark.main([str(word) for word in words])


def weights(results: Path) -> set[Path]:
    return set(results.rglob("*.safetensors"))


def test_export_describe_and_check_take_what_the_results_hold(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, results = run
    (place,) = (results / "upstreams").glob("merged@*")
    before, prints = weights(results), read_json(place / "merge.json")["fingerprints"]["merged"]
    assert call("export", "merged", "--output", tmp_path / "x", "--results", results) == 0
    assert upstream.load(str(tmp_path / "x")).fingerprint() == prints
    assert call("describe", "merged", "--results", results) == 0
    assert f"fingerprint    {prints}" in capsys.readouterr().out
    (tuned,) = (results / "upstreams").glob("finetune@*")
    assert call("describe", "finetuned", "--results", results) == 0
    assert read_json(tuned / "finetune.json")["fingerprint"] in capsys.readouterr().out
    assert call("check", "--upstream", f"merged@{prints}", "--results", results) == 0
    assert weights(results) == before


def test_a_run_takes_an_exact_name(
    run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipes, results = run
    stored = find("merged", results)
    words = ("--suite", recipes, "--results", results, "--workers", 1, "--downstream", "label")
    assert call("--upstream", f"merged@{stored.fingerprint}", *words) == 0
    assert "2 cells kept, 0 to compute" in capsys.readouterr().out


def test_what_is_not_there_is_not_built(
    tmp_path: Path, recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, recipe = tmp_path / "empty", recipes / "merged.yaml"
    for words in (
        ("export", "merged", "--output", tmp_path / "x"),
        ("describe", "finetuned"),
        ("check", "--upstream", "merged:alpha=0.5"),
        ("describe", f"merged:recipe={recipe}"),
        ("describe", recipe),
        ("describe", "merged@0123456789ab"),
    ):
        assert call(*words, "--results", results) == 2
        line = capsys.readouterr().err
        assert f"{results} holds no such upstream, and nothing is built unasked" in line
        assert "benchmark.py --upstream " in line
    assert not results.exists() and not (tmp_path / "x").exists()


def test_several_are_asked_for_by_fingerprint(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes, results = run
    first = find("merged", results).fingerprint
    recipe = yaml.safe_load((recipes / "merged.yaml").read_text())
    recipe["params"]["alpha"] = 0.75
    other = shutil.copytree(recipes, tmp_path / "other")
    (other / "merged.yaml").write_text(yaml.safe_dump(recipe))
    words = ("--suite", other, "--results", results, "--workers", 1, "--downstream", "label")
    assert call("--upstream", "merged", *words) == 0
    capsys.readouterr()
    assert call("describe", "merged", "--results", results) == 2
    line = capsys.readouterr().err
    names = line.rpartition("name one: ")[2].strip().split(", ")
    assert len(names) == 2 and f"merged@{first}" in names
    for name in names:
        assert find(name, results).fingerprint == name[-12:]
        assert call("describe", name, "--results", results) == 0
        assert f"fingerprint    {name[-12:]}" in capsys.readouterr().out
    # those of a suite come first, where a command has one
    for suite in (recipes, other):
        stored = find("merged", results, suite.name)
        assert (stored.fingerprint == first) is (suite == recipes)
    assert call("similarity", recipe["base"], "merged", "--suite", other, "--results", results,
                "--utterances", 5, "--format", "json", "--downstream", "label") == 0  # fmt: skip
    second = find("merged", results, "other").fingerprint
    assert second in json.dumps(json.loads(capsys.readouterr().out))


def finetune(path: Path, **keys: Any) -> Path:
    content = yaml.safe_load((path.parent / "finetune.yaml").read_text())
    path.write_text(yaml.safe_dump({**content, "steps": 5, **keys}))
    return path


def test_names_in_recipes_are_those_of_the_command_line(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, results = run
    monkeypatch.setenv("HUBERT_DEMO", "/nowhere")  # whoever takes the demo's fails
    merged, tuned = (find(name, results).fingerprint for name in ("merged", "finetuned"))
    before = weights(results)
    for name, fingerprint in (("merged", merged), ("finetuned", tuned),
                              (f"merged@{merged}", merged)):  # fmt: skip
        path = finetune(recipes / "second.yaml", upstream=name)
        folder = build_tuned(path, results)
        assert read_json(folder / "finetune.json")["base_fingerprint"] == fingerprint
    # beside no merge recipe they are what the results hold
    far = shutil.copytree(recipes, tmp_path / "far")
    (far / "merged.yaml").unlink()
    folder = build_tuned(finetune(far / "second.yaml", upstream="merged"), results)
    assert read_json(folder / "finetune.json")["base_fingerprint"] == merged
    with pytest.raises(UserError, match="holds no such upstream"):
        build_tuned(far / "second.yaml", tmp_path / "others")
    assert weights(results) > before and not (tmp_path / "others" / "upstreams").exists()


@pytest.mark.parametrize("form", ["hf", "same"])
def test_merging_what_the_results_hold(
    run: tuple[Path, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, results = run
    monkeypatch.chdir(tmp_path)
    base = yaml.safe_load((recipes / "merged.yaml").read_text())["base"]
    out = tmp_path / "out"
    assert call("merge", "--base", base, "--tuned", "finetuned", "--set", "alpha=0.25",
                "--format", form, "--output", out, "--results", results) == 0  # fmt: skip
    merged = upstream.load(str(out)).fingerprint()
    assert merged == find("merged", results).fingerprint
    content = yaml.safe_load((recipes / "merged.yaml").read_text()) | {"tuned": ["merged"]}
    (recipes / "merged.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="made from itself"):
        upstream.load("merged", recipe=str(recipes / "merged.yaml"), results=str(results))


def misspelt(recipes: Path) -> list[tuple[list[str], str]]:
    def copy(name: str, source: str, **keys: Any) -> str:
        content = yaml.safe_load((recipes / source).read_text())
        (recipes / name).write_text(yaml.safe_dump({**content, **keys}))
        return str(recipes / name)

    base = yaml.safe_load((recipes / "merged.yaml").read_text())["base"]
    out = ["--output", str(recipes / "out")]
    return [
        (["finetune", copy("a.yaml", "finetune.yaml", upstream="hubert_bse")], "hubert_base?"),
        (["finetune", copy("b.yaml", "finetune.yaml", strategy="stabel")], "mean stable?"),
        (["finetune", copy("c.yaml", "finetune.yaml", task="lable.yaml")], "mean label.yaml?"),
        (["finetune", str(recipes / "finetun.yaml")], "mean finetune.yaml?"),
        (["finetune", str(recipes / "finetune.yaml"), "--set", "upstream=wavlm_bas"], "wavlm_base"),
        (["merge", copy("d.yaml", "merged.yaml", base="hubert_bse"), *out], "hubert_base?"),
        (["merge", copy("e.yaml", "merged.yaml", tuned=["finetun.yaml"]), *out], "finetune.yaml?"),
        (["merge", copy("f.yaml", "merged.yaml", tuned=["a.yaml:seed=1"]), *out], "hubert_base?"),
        (["merge", copy("g.yaml", "merged.yaml", method="linaer"), *out], "mean linear?"),
        (["merge", str(recipes / "merged.yaml"), "--method", "tise", *out], "mean ties?"),
        (["merge", "--base", base, "--tuned", f"{base}x", *out], "did you mean"),
        (["export", "hubert_bse", *out], "hubert_base?"),
        (["export", "hubert_base", "--format", "s3pl", *out], "mean s3prl?"),
        (["describe", "hubert_bse"], "hubert_base?"),
        (["check", "--upstream", "hubert_bse"], "hubert_base?"),
    ]


def test_misspelt_names_are_told_before_all_else(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "r"
    for words, hint in misspelt(recipes):
        try:
            status = benchmark.main([*words, "--results", str(results)])
        except SystemExit as end:  # of argparse
            status = int(str(end.code))
        line = capsys.readouterr().err
        assert status == 2 and hint in line, (words, line)
        assert not results.exists() and not (recipes / "out").exists(), words


def test_they_are_told_without_torch(recipes: Path, tmp_path: Path) -> None:
    """Whose import alone takes seconds on a slow disk."""
    cases = [words for words, _ in misspelt(recipes)]
    code = (
        "import sys, benchmark\n"
        f"for words in {cases!r}:\n"
        "    try: assert benchmark.main([*words, '--results', 'nowhere']) == 2\n"
        "    except SystemExit as end: assert end.code == 2\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
