"""Several upstreams at once, and the utterances that two of them disagree on."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmark
from downstream.base import Trial
from downstream.report import several
from downstream.report.compare import compare
from downstream.report.results import load_results
from downstream.report.statistics import holm
from downstream.report.wrong import compared
from tests.downstream.test_table import put
from upstream.common.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for upstream, rate in {"base": 0.30, "good": 0.10, "alike": 0.30}.items():
        for task in ("asr", "er"):
            for seed in range(3):
                put(tmp_path, upstream, task, seed, rate)
    return tmp_path


def test_letters_by_hand() -> None:
    """1 differs from 3 and 4, 2 from 4: the textbook's overlapping groups."""
    assert several.letters_of([1, 2, 3, 4], {(1, 3), (1, 4), (2, 4)}) == {
        1: "a", 2: "ab", 3: "bc", 4: "c",
    }  # fmt: skip
    assert several.letters_of([2, 1], set()) == {2: "a", 1: "a"}


@given(st.data())
def test_a_letter_is_shared_if_and_only_if_no_difference_is_shown(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 7))
    pairs = list(combinations(range(count), 2))
    apart = set(data.draw(st.lists(st.sampled_from(pairs), unique=True)))
    order = data.draw(st.permutations(range(count)))
    letters = several.letters_of(order, apart)
    for i, j in pairs:
        assert bool(set(letters[i]) & set(letters[j])) == ((i, j) not in apart)


def test_pairs_are_adjusted_over_a_task(root: Path) -> None:
    results = load_results(root)
    places, rows, skipped, said = several.several(["base", "good", "alike"], results)
    assert [a.sentence.split(":")[0] for a in said] == ["good", "alike"]
    assert said[0] == compare("base", "good", results).answers[0]
    asr = [row for row in rows if row.task == "asr"]
    assert len(asr) == 3 and not skipped
    assert [row.p_holm for row in asr] == holm([row.p for row in asr])
    mine = {place.upstream: place for place in places if place.task.startswith("asr")}
    assert next(iter(mine)) == "good"  # the best first
    assert mine["base"].letters == mine["alike"].letters != mine["good"].letters
    assert (mine["base"].speakers, mine["base"].utterances) == (12, 120)


@pytest.mark.parametrize("form", ["text", "md", "csv", "json", "latex"])
def test_compare_takes_several(root: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["compare", "base", "good", "alike", "--results", str(root), "--format", form]
    assert benchmark.main(call) == 0
    out = capsys.readouterr().out
    assert "good" in out and "alike" in out
    if form == "json":
        assert len(json.loads(out)["pairs"]) == 6


def test_other_versions_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in root.glob("good@*/*/*/seed0/score.json"):
        content = json.loads(path.read_text())
        content["result"]["versions"] = {"torch": "1.0"}
        content["result"]["device"] = "cuda"
        path.write_text(json.dumps(content))
    assert benchmark.main(["compare", "base", "good", "--results", str(root)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not the same device: base: cpu; good: cpu, cuda" in out


def test_a_name_twice_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["compare", "base", "good", "base", "--results", str(root)]) == 2
    assert "base is named twice" in capsys.readouterr().err


def test_what_one_gets_right_and_the_other_wrong(root: Path) -> None:
    results = load_results(root)
    rows = compared("base", "good", "er", "demo", results, {"0-0": "a.wav"})
    assert len(rows) == 120 and {row.path for row in rows if row.id == "0-0"} == {"a.wav"}
    by_id = {row.id: row for row in rows}
    for upstream, errors in (("base", "errors_a"), ("good", "errors_b")):
        mine = [r for r in results if (r.cell.upstream, r.cell.task) == (upstream, "er")]
        for number, record in enumerate(mine[0].predictions):
            mean = sum(r.predictions[number].errors for r in mine) / 3  # type: ignore[union-attr]
            assert getattr(by_id[record.id], errors) == pytest.approx(mean, abs=1e-3)
    sides = [row.better for row in rows]
    assert sides == sorted(sides, key=["A", "B", None].index)
    assert sides.count("B") > sides.count("A")


def test_the_command_errors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["errors", "base", "good", "--results", str(root), "--downstream"]
    assert benchmark.main([*call, "asr", "--limit", "2", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) <= 4 and found["a_better"] + found["b_better"] + found["same"] == 120
    assert benchmark.main([*call, "asx"]) == 2
    assert "did you mean asr" in capsys.readouterr().err.splitlines()[-1]


def test_trials_have_no_errors(root: Path) -> None:
    results = [r for r in load_results(root) if r.cell.task == "er"]
    for r in results:
        r.__dict__["predictions"] = [Trial("a-b", "s1 + s2", "a", "b", 0.1, 1)]
    with pytest.raises(UserError, match="scores trials"):
        compared("base", "good", "er", "demo", results, {})


def test_folders_of_results_are_sides(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = root / "elsewhere"
    for seed in range(3):
        put(elsewhere, "base", "asr", seed, 0.10)  # the same name, with other scores
    words = ["--results", str(root), "--format", "json"]
    for side in (elsewhere, elsewhere / "base@b00000000000"):
        assert benchmark.main(["compare", "base", str(side), *words]) == 0
        (row,) = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["task"] == "asr"]
        assert row["verdict"] == "worse" and row["reference"] == str(side)
    assert benchmark.main(["compare", "base", str(root), *words]) == 2
    err = capsys.readouterr().err
    assert "several upstreams" in err and f"{root}/good@g00000000000" in err
    assert benchmark.main(["compare", "base", str(root / "nothing"), *words]) == 2
    assert "no results for upstream" in capsys.readouterr().err
    (elsewhere / "base@b00000000000" / "demo" / "asr@abababababab" / "seed0" / "score.json"
     ).write_text("{")  # fmt: skip
    assert benchmark.main(["compare", "base", str(elsewhere), *words]) == 2
    assert "score.json cannot be read" in capsys.readouterr().err


def test_what_makes_two_versions_of_a_task(root: Path) -> None:
    put(root, "other", "asr", 0, 0.3, revision="cd" * 6)
    for r in load_results(root):
        if r.cell.upstream == "other":
            path = r.folder / "score.json"
            content = json.loads(path.read_text())
            content["result"]["recipe"] = {"train": {"steps": 500}, "task": "asr"}
            path.write_text(json.dumps(content))
    lines = compare("base", "other", load_results(root)).skipped
    told = [line for line in lines if "asr@cdcdcd" in line]
    assert len(told) == 1 and "train.steps (absent, 500)" in told[0]


def test_the_same_recipe_on_other_data(root: Path) -> None:
    put(root, "other", "asr", 0, 0.3, revision="cd" * 6)
    assert any(
        "the same recipe and test set, but other training or dev data" in line
        for line in compare("base", "other", load_results(root)).skipped
    )
