import csv
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from downstream.base import Count
from downstream.report import layout as grid
from downstream.report.results import PROJECT, Cell, Result, Score, load, save
from downstream.report.statistics import paired
from downstream.report.table import compare, render, show, summary, superb_score, write
from downstream.tasks.metrics import METRICS
from upstream.common.errors import UserError

PUBLISHED = PROJECT / "results" / "published"
TASKS = {"asr": "wer", "er": "accuracy", "pr": "per", "sid": "accuracy"}
RATES = {"base": 0.30, "tuned": 0.42, "merged:alpha=0.25": 0.18}


def put(root: Path, upstream: str, task: str, seed: int, rate: float, **cell: str) -> None:
    """A finished cell whose error rate is about `rate`; speakers 0 to 11 differ a little."""
    rng = np.random.default_rng(seed)
    metric = METRICS[TASKS[task]]
    total = 1 if metric.name == "accuracy" else 12
    lines = [
        Count(f"{s}-{i}", f"s{s}", "r", "h", float(rng.binomial(total, rate + s / 200)), total)
        for s in range(12)
        for i in range(10)
    ]
    errors = sum(line.errors for line in lines) / sum(line.total for line in lines)
    score = Score(
        metric=metric.name, better=metric.better, n=len(lines), speakers=12, steps=1, seconds=1,
        score=100 * (errors if metric.better == "lower" else 1 - errors), lr={"": 1e-3},
        dev={"": {"0.001": 1.0}}, device="cpu", versions={}, git={}, created="", recipe={},
    )  # fmt: skip
    where = {"fingerprint": f"{upstream[0]}00000000000", "suite": "demo", "recipe": "ab" * 6} | cell
    save(root, Cell(upstream=upstream, task=task, seed=seed, **where), score, lines)


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    for upstream, rate in RATES.items():
        for task in TASKS:
            for seed in range(3):
                put(tmp_path, upstream, task, seed, rate)
    return load(tmp_path)


def test_summary_is_the_paired_statistics_turned_the_metrics_way(results: list[Result]) -> None:
    table = summary(results, "demo", "base").set_index(["upstream", "task"])
    assert table.index[0][0] == "base"
    for task, sign in (("asr", 1), ("sid", -1)):
        rows = {
            name: pd.concat(
                [r.rows for r in results if (r.cell.upstream, r.cell.task) == (name, task)]
            )
            for name in ("merged:alpha=0.25", "base")
        }
        expected = paired(rows["merged:alpha=0.25"], rows["base"])
        found = table.loc["merged:alpha=0.25", task]
        assert found.difference == pytest.approx(sign * expected.estimate)
        assert found.difference == pytest.approx(found.score - table.loc["base", task].score)
        assert found.diff_low < found.difference < found.diff_high
        assert found.p == pytest.approx(expected.p)
        assert found.verdict == "better"
        assert table.loc["tuned", task].verdict == "worse"
    assert set(table.loc["base"].verdict) == {""}
    assert (table.p_holm.dropna() >= table.p.dropna()).all()


def test_four_tasks_fit_the_terminal_and_show_the_direction(results: list[Result]) -> None:
    shown = show(summary(results, "demo", "base"))
    assert max(map(len, shown.splitlines())) <= 100
    assert "asr WER ↓" in shown and "sid ACC ↑" in shown
    assert "Holm" in shown and "12 speakers, 3 seeds" in shown


def test_without_reference_no_verdict(results: list[Result]) -> None:
    table = summary(results, "demo")
    assert set(table.verdict) == {""}
    assert "Holm" not in show(table)


def test_compare_says_what_cannot_be_compared(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path, "base", "asr", seed, 0.3)
    for seed in range(2):
        put(tmp_path, "tuned", "asr", seed, 0.5)
    put(tmp_path, "base", "er", 0, 0.3)
    put(tmp_path, "tuned", "er", 0, 0.3, recipe="cd" * 6)
    put(tmp_path, "base", "sid", 0, 0.3)
    put(tmp_path, "tuned", "sid", 1, 0.3)
    found = compare("tuned", "base", load(tmp_path))
    (row,) = found.rows
    assert (row.task, row.seeds, row.speakers, row.verdict) == ("asr", 2, 12, "worse")
    assert row.difference == pytest.approx(row.a - row.b)
    assert row.low < row.difference < row.high
    assert sorted(line.split(":")[0] for line in found.skipped) == [
        "asr", "er@ababab", "er@cdcdcd", "sid",
    ]  # fmt: skip
    assert any("seeds that only one has: [2]" in line for line in found.skipped)
    assert any("no head seed in common" in line for line in found.skipped)


def test_compare_is_a_tie_with_itself_and_turns_with_its_sides(results: list[Result]) -> None:
    assert {row.verdict for row in compare("base", "base", results).rows} == {"tie"}
    there, back = compare("base", "tuned", results), compare("tuned", "base", results)
    opposite = {"better": "worse", "worse": "better", "tie": "tie"}
    for one, other in zip(there.rows, back.rows):
        assert one.difference == pytest.approx(-other.difference)
        assert opposite[one.verdict] == other.verdict


def test_names_are_checked(results: list[Result], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean tuned"):
        compare("tunde", "base", results)
    with pytest.raises(UserError, match="did you mean demo"):
        summary(results, "demmo")
    put(tmp_path, "base", "asr", 0, 0.3, fingerprint="f" * 12)
    twice = load(tmp_path)
    with pytest.raises(UserError, match="base@b00000000000 or base@ffffffffffff"):
        compare("base", "tuned", twice)
    assert compare("base@ffffffffffff", "tuned", twice).rows
    assert "base@ffffffffffff" in set(summary(twice, "demo").upstream)


def test_render_forms(results: list[Result]) -> None:
    found = compare("merged:alpha=0.25", "base", results)
    assert max(map(len, render(found, "text").splitlines())) <= 100
    assert render(found, "md").splitlines()[1].count("---") == 11
    (first, *_), data = (
        csv.DictReader(render(found, "csv").splitlines()),
        json.loads(render(found, "json")),
    )
    assert float(first["difference"]) == pytest.approx(data["rows"][0]["difference"])
    assert (data["a"], first["upstream_b"]) == ("merged:alpha=0.25", "base")
    assert r"WER $\downarrow$" in render(found, "latex") and r"95 \% interval" in render(
        found, "latex"
    )
    with pytest.raises(UserError, match="did you mean text"):
        render(found, "txt")  # type: ignore[arg-type]


def test_no_interval_is_unknown_not_significant(tmp_path: Path) -> None:
    for upstream, rate in (("base", 0.1), ("tuned", 0.8)):
        put(tmp_path, upstream, "asr", 0, rate)
    for path in tmp_path.rglob("predictions.jsonl"):
        lines = [json.loads(line) | {"speaker": "one"} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, lines)))
    (row,) = compare("tuned", "base", load(tmp_path)).rows
    assert row.verdict == "unknown" and math.isnan(row.low) and "one speaker" in row.reason
    assert (
        json.loads(render(compare("tuned", "base", load(tmp_path)), "json"))["rows"][0]["p"] is None
    )
    assert "±? unknown" in show(summary(load(tmp_path), "demo", "base"))


def test_tables_are_written_and_a_missing_reference_is_noted(
    results: list[Result], tmp_path: Path
) -> None:
    put(tmp_path, "lonely", "asr", 0, 0.2, suite="other")
    paths = write(tmp_path, load(tmp_path), "base")
    assert [path.name for path in paths] == ["table.csv", "table.md"]
    assert len(pd.read_csv(paths[0])) == len(RATES) * len(TASKS) + 1
    page = paths[1].read_text()
    assert "## demo" in page and "## other" in page
    assert "no differences: no results for upstream 'base'" in page


def test_a_long_name_keeps_its_end() -> None:
    lines = grid.text([["upstream", "x"], ["hf:" + "a" * 90 + ":alpha=0.5", "y" * 60]]).splitlines()
    assert len(lines[1]) == 100
    assert lines[1].startswith("…a") and ":alpha=0.5  y" in lines[1]


# --- published numbers --------------------------------------------------------------------------


def published(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open() as file:
        return list(csv.DictReader(file))


def numbers(row: dict[str, str]) -> dict[str, float]:
    return {key: float(row[key]) for key in row if "_" in key and row[key][:1].isdigit()}


@pytest.mark.parametrize("row", published("superb.csv"), ids=lambda row: row["model"])
def test_leaderboard_scores(row: dict[str, str]) -> None:
    digits = len(row["score"].partition(".")[2])
    assert row["source"]
    assert superb_score(numbers(row)) == pytest.approx(float(row["score"]), abs=0.51 * 10**-digits)


TABLE_ONE = [row for row in published("speech_ft.csv") if "performance.png" in row["source"]]


@pytest.mark.parametrize("row", TABLE_ONE, ids=lambda row: f"{row['upstream']} {row['method']}")
def test_speech_ft_scores(row: dict[str, str]) -> None:
    assert superb_score(numbers(row), "speech-ft") == pytest.approx(float(row["score"]), abs=0.0051)


def test_speech_ft_rows_are_all_there() -> None:
    assert len(TABLE_ONE) == 6
    assert all(row["source"] and row["score"] for row in published("speech_ft.csv"))


def test_paper_constants_put_their_own_fbank_at_zero() -> None:
    constants = pd.read_csv(PUBLISHED / "constants.csv")
    mine = constants[constants["set"] == "superb-paper"].set_index("metric")
    assert superb_score(mine.fbank.to_dict(), "superb-paper") == 0
    assert superb_score(mine.sota.to_dict(), "superb-paper") == pytest.approx(1000)
    hubert = next(row for row in published("superb.csv") if row["model"] == "HuBERT Base")
    assert superb_score(numbers(hubert), "superb-paper") != superb_score(numbers(hubert))


def test_a_missing_task_leaves_the_score_undefined() -> None:
    assert superb_score({"pr_per": 5.0, "sid_acc": 80.0, "er_acc": 60.0}, "speech-ft") is None
    with pytest.raises(UserError, match="did you mean speech-ft"):
        superb_score({}, "speech_ft")
