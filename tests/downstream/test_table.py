import csv
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from downstream.base import METRICS, Count
from downstream.report import layout
from downstream.report.compare import Row, answers, compare, detectable
from downstream.report.groups import TaskVersion
from downstream.report.pool import Pool
from downstream.report.results import Cell, Result, Score, load_results, save
from downstream.report.several import several
from downstream.report.statistics import paired, seed_spread
from downstream.report.summary import stacked
from downstream.report.table import Table, render, show, summary, write
from upstream.common import PROJECT
from upstream.common.errors import UserError

TASKS = {"asr": "wer", "er": "accuracy", "pr": "per", "sid": "accuracy"}
RATES = {"base": 0.30, "tuned": 0.42, "merged:alpha=0.25": 0.18}


def put(
    root: Path, upstream: str, task: str, seed: int, rate: float, seen: int = 0, **cell: str
) -> None:
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
        seen=seen,
    )  # fmt: skip
    where = {
        "fingerprint": f"{upstream[0]}00000000000",
        "suite": "demo",
        "revision": "ab" * 6,
    } | cell
    save(root, Cell(upstream=upstream, task=task, seed=seed, **where), score, lines)


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    for upstream, rate in RATES.items():
        for task in TASKS:
            for seed in range(3):
                put(tmp_path, upstream, task, seed, rate)
    return load_results(tmp_path)


def minus(table: Table, upstream: str, reference: str = "base") -> list[Row]:
    return [r for r in table.rows if (r.upstream, r.reference) == (upstream, reference)]


def test_summary_is_the_paired_statistics(results: list[Result]) -> None:
    table = summary(results, "demo", ["base"])
    scores = {(r.upstream, r.task): r.score for r in table.rows if not r.reference}
    assert table.rows[0].upstream == "base"
    for row in minus(table, "merged:alpha=0.25"):
        sides = [
            [r.summary for r in results if (r.cell.upstream, r.cell.task) == (name, row.task)]
            for name in ("merged:alpha=0.25", "base")
        ]
        peers = [[r for r in results if (r.cell.upstream, r.cell.task) == (name, row.task)]
                 for name in RATES]  # fmt: skip
        samples = [stacked([r.summary for r in heads], TASKS[row.task]) for heads in peers]
        expected = paired(*sides, TASKS[row.task], seed_spread(samples))
        assert (row.difference, row.p) == (expected.value, expected.p)
        assert row.difference == pytest.approx(row.score - row.reference_score)
        assert row.score == scores["merged:alpha=0.25", row.task]
        assert row.reference_score == scores["base", row.task]
        assert row.low < row.difference < row.high
        assert row.p_holm >= row.p
    assert {r.verdict for r in minus(table, "merged:alpha=0.25")} == {"better"}
    assert {r.verdict for r in minus(table, "tuned")} == {"worse"}


def test_four_tasks_fit_the_terminal_and_show_what_is_needed(results: list[Result]) -> None:
    shown = show(summary(results, "demo", ["base"]))
    assert max(map(len, shown.splitlines())) <= 100
    assert "asr WER ↓" in shown and "sid ACC ↑" in shown
    assert "Holm" in shown and "12 speakers, 3 seeds; a verdict in 80 % of" in shown
    assert "p <.001" in shown


def test_without_reference_no_verdict(results: list[Result]) -> None:
    table = summary(results, "demo")
    assert {row.verdict for row in table.rows} == {""}
    assert "Holm" not in show(table)


def test_a_second_reference_is_a_second_block(results: list[Result]) -> None:
    table = summary(results, "demo", ["base", "tuned"])
    assert [*dict.fromkeys((r.upstream, r.reference) for r in table.rows)] == [
        ("base", ""), ("tuned", ""), ("merged:alpha=0.25", ""),
        ("tuned", "base"), ("merged:alpha=0.25", "base"), ("merged:alpha=0.25", "tuned"),
    ]  # fmt: skip
    blocks = show(table).split("\n\n")
    titles = [re.split(",|  ", block)[0] for block in blocks[1:4]]
    assert titles == ["upstream", "minus base", "minus tuned"]
    assert blocks[0].splitlines() == [
        "against base:",
        "  tuned: worse on asr, er, pr, sid",
        "  merged:alpha=0.25: better on asr, er, pr, sid",
        "against tuned:",
        "  merged:alpha=0.25: better on asr, er, pr, sid",
    ]


def test_a_pair_has_one_verdict_wherever_it_is_shown(results: list[Result]) -> None:
    """The family of a p is the pair: no other row of a table, nor another suite, is part of it.
    The seeds' variance is that of all results, whichever of them a table shows."""
    alone = [r for r in results if r.cell.upstream != "tuned"]
    expected = compare("merged:alpha=0.25", "base", results).rows
    for shown in (results, alone):
        table = summary(shown, "demo", ["base"], pool=Pool(results))
        assert minus(table, "merged:alpha=0.25") == expected
    of_all = several(["base", "merged:alpha=0.25", "tuned"], results)
    assert of_all.answers == answers(summary(results, "demo", ["base"]).rows)
    fewer = compare("merged:alpha=0.25", "base", alone).rows
    assert {row.pooled for row in expected} == {3} and {row.pooled for row in fewer} == {2}
    assert [row.difference for row in fewer] == [row.difference for row in expected]
    again = [replace(r, cell=replace(r.cell, upstream="alias")) for r in results]
    twice = compare("merged:alpha=0.25", "base", results + again).rows  # the same weights
    assert twice == expected


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_give_numbers_and_no_verdict(tmp_path: Path, seeds: int) -> None:
    for upstream, rate in (("base", 0.1), ("tuned", 0.8)):
        for seed in range(seeds):
            put(tmp_path, upstream, "asr", seed, rate)
    found = compare("tuned", "base", load_results(tmp_path))
    (row,) = found.rows
    assert row.verdict == "withheld" and "run --seeds 3" in row.note
    assert math.isnan(row.p) and row.low < row.difference < row.high
    for shown in (render(found), show(summary(load_results(tmp_path), "demo", ["base"]))):
        assert "withheld" in shown and "the difference between heads is not known" in shown
        assert ("only (one head seed)" in shown) is (seeds == 1)


def test_without_a_head_one_seed_is_all_there_is(tmp_path: Path) -> None:
    for upstream, rate in (("base", 0.1), ("tuned", 0.8)):
        put(tmp_path, upstream, "asr", 0, rate)
    for path in tmp_path.rglob("score.json"):
        content = json.loads(path.read_text())
        content["result"]["lr"] = {}
        path.write_text(json.dumps(content))
    assert compare("tuned", "base", load_results(tmp_path)).rows[0].verdict == "worse"


def test_who_has_heard_the_answers_cannot_win(tmp_path: Path) -> None:
    rates = {"base": 0.3, "tuned": 0.1, "merged": 0.2, "poor": 0.8}
    for seed in range(3):
        for upstream, rate in rates.items():
            put(tmp_path, upstream, "er", seed, rate, seen=0 if upstream == "base" else 77)
    results = load_results(tmp_path)
    table = summary(results, "demo", ["base"])
    assert [minus(table, name)[0].verdict for name in rates if name != "base"] == [
        "seen", "seen", "worse",
    ]  # fmt: skip
    assert compare("base", "tuned", results).rows[0].verdict == "seen"
    assert compare("base", "poor", results).rows[0].verdict == "better"
    pair = [r for r in results if r.cell.upstream in ("base", "tuned")]
    for shown in (show(summary(pair, "demo", ["base"])), render(compare("tuned", "base", pair))):
        assert "† tuned er: fine-tuning had the labels of 64 % of the test audio" in shown
        assert "† base" not in shown


def test_detectable_of_a_plan(results: list[Result]) -> None:
    task = TaskVersion("demo", "asr", "ab" * 6)
    paired_size = detectable(results, task, 4)
    alone = detectable([r for r in results if r.cell.upstream == "base"], task, 4)
    assert paired_size is not None and alone is not None
    assert 0 < paired_size < alone
    assert detectable(results, task, 1) < paired_size  # type: ignore[operator]
    assert detectable(results, task._replace(task="new"), 4) is None
    one_speaker = detectable([], task, 4)
    assert one_speaker is None


def test_compare_says_what_cannot_be_compared(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path, "base", "asr", seed, 0.3)
        put(tmp_path, "tuned", "asr", seed, 0.5)
    put(tmp_path, "base", "asr", 3, 0.3)
    put(tmp_path, "base", "er", 0, 0.3)
    put(tmp_path, "tuned", "er", 0, 0.3, revision="cd" * 6)
    put(tmp_path, "base", "sid", 0, 0.3)
    put(tmp_path, "tuned", "sid", 1, 0.3)
    found = compare("tuned", "base", load_results(tmp_path))
    (row,) = found.rows
    assert (row.task, row.seeds, row.clusters, row.verdict) == ("asr", 3, 12, "worse")
    assert row.difference == pytest.approx(row.score - row.reference_score)
    assert row.low < row.difference < row.high
    assert sorted(line.split(":")[0] for line in found.skipped) == [
        "asr", "er@cdcdcd", "sid",
    ]  # fmt: skip
    assert any("seeds that only one has: [3]" in line for line in found.skipped)
    assert any("no head seed in common" in line for line in found.skipped)


def test_compare_is_a_tie_with_itself_and_turns_with_its_sides(results: list[Result]) -> None:
    assert {row.verdict for row in compare("base", "base", results).rows} == {"undecided"}
    there, back = compare("base", "tuned", results), compare("tuned", "base", results)
    opposite = {"better": "worse", "worse": "better"}
    for one, other in zip(there.rows, back.rows):
        assert one.difference == pytest.approx(-other.difference)
        assert opposite[one.verdict] == other.verdict


def test_names_are_checked(results: list[Result], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean tuned"):
        compare("tunde", "base", results)
    with pytest.raises(UserError, match="did you mean demo"):
        summary(results, "demmo")
    put(tmp_path, "base", "asr", 0, 0.3, fingerprint="f" * 12)
    twice = load_results(tmp_path)
    with pytest.raises(UserError, match="base@b00000000000 or base@ffffffffffff"):
        compare("base", "tuned", twice)
    assert compare("base@ffffffffffff", "tuned", twice).rows
    assert "base@ffffffffffff" in {row.upstream for row in summary(twice, "demo").rows}


def test_render_forms(results: list[Result]) -> None:
    found = compare("merged:alpha=0.25", "base", results)
    assert max(map(len, render(found, "text").splitlines())) <= 100
    assert render(found, "md").splitlines()[1].count("---") == 7
    (first, *_), data = (
        csv.DictReader(render(found, "csv").splitlines()),
        json.loads(render(found, "json")),
    )
    assert float(first["difference"]) == pytest.approx(data["rows"][0]["difference"])
    assert (data["a"], first["reference"]) == ("merged:alpha=0.25", "base")
    assert r"WER $\downarrow$" in render(found, "latex") and r"95 \% interval" in render(
        found, "latex"
    )
    with pytest.raises(UserError, match="did you mean text"):
        render(found, "txt")  # type: ignore[arg-type]


def test_no_interval_is_unknown_not_significant(tmp_path: Path) -> None:
    for upstream, rate in (("base", 0.1), ("tuned", 0.8)):
        for seed in range(3):
            put(tmp_path, upstream, "asr", seed, rate)
    for path in tmp_path.rglob("predictions.jsonl"):
        lines = [json.loads(line) | {"speaker": "one"} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, lines)))
    results = load_results(tmp_path)
    found = compare("tuned", "base", results)
    assert found.rows[0].verdict == "unknown" and math.isnan(found.rows[0].low)
    assert "too few speakers" in found.rows[0].note
    assert json.loads(render(found, "json"))["rows"][0]["p"] is None
    assert "±?\n" in show(summary(results, "demo", ["base"]))
    assert detectable(results, TaskVersion("demo", "asr", "ab" * 6), 1) is None


def test_test_sets_that_differ_are_not_compared(results: list[Result], tmp_path: Path) -> None:
    for path in tmp_path.glob("tuned@*/demo/*/*/predictions.jsonl"):
        text = path.read_text()
        where = '"id": "3-4"' if "asr" in str(path) else '"reference": "r"'
        path.write_text(text.replace(where, where[:-1] + 'x"', 1))
    found = compare("tuned", "base", load_results(tmp_path))
    assert found.rows == []
    assert "asr: 2 utterances that only one was tested on (such as 3-4)" in found.skipped
    assert "er: the test sets disagree on 1 facts (such as the reference of 0-0)" in found.skipped
    shown = show(summary(load_results(tmp_path), "demo", ["base"]))
    assert "not compared: tuned, asr: 2 utterances" in shown


def test_tables_are_written_and_a_missing_reference_is_noted(
    results: list[Result], tmp_path: Path
) -> None:
    put(tmp_path, "lonely", "asr", 0, 0.2, suite="other")
    paths = write(tmp_path, load_results(tmp_path), ["base", "tuned"])
    assert [path.name for path in paths] == ["table.csv", "table.md"]
    rows = list(csv.DictReader(paths[0].open()))
    assert len(rows) == 4 * (3 + 3) + 1  # scores; tuned minus base, merged minus both; lonely
    assert {r["verdict"] for r in rows if r["reference"]} == {"better", "worse"}
    assert {r["verdict"] for r in rows if not r["reference"]} == {""}
    page = paths[1].read_text()
    assert "## demo" in page and "## other" in page
    assert "no differences: no results for upstream 'base'" in page


WRITE = """
import sys
from dataclasses import replace
from pathlib import Path
from downstream.report import results, table
for _ in range(int(sys.argv[2])):
    table.write(Path(sys.argv[1]), results.load_results(Path(sys.argv[1])), ["base"])
"""


def test_two_processes_write_one_table(results: list[Result], tmp_path: Path) -> None:
    """Whoever comes last, a reader finds a whole table."""
    words = [sys.executable, "-c", WRITE, str(tmp_path), "3"]
    write(tmp_path, results, ["base"])
    whole = {name: (tmp_path / name).read_text() for name in ("table.csv", "table.md")}
    writers = [subprocess.Popen(words, cwd=PROJECT, stderr=subprocess.PIPE) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        assert {name: (tmp_path / name).read_text() for name in whole} == whole
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_table_over_3000_cells_takes_less_than_five_seconds(tmp_path: Path) -> None:
    """250 upstreams, 4 tasks, 3 seeds, one new cell without a summary: 2 s of CPU with imports."""
    for task in TASKS:
        for seed in range(3):
            put(tmp_path, "base", task, seed, 0.3)
    for path in list(tmp_path.glob("*/*/*/*")):
        for number in range(249):
            name = f"u{number}"
            other = tmp_path / f"{name}@b00000000000" / path.relative_to(tmp_path / path.parts[-4])
            shutil.copytree(path, other)  # with the times that a summary is checked by
            score = other / "score.json"
            score.write_text(score.read_text().replace('"base"', f'"{name}"'))
    (path / "summary.json").unlink()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), "1"], cwd=PROJECT, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + 1000 + 249 * 4


def test_several_metrics_are_several_columns_and_one_family(tmp_path: Path) -> None:
    for upstream, rate in (("base", 0.3), ("tuned", 0.5)):
        for seed in range(3):
            put(tmp_path, upstream, "asr", seed, rate)
    for path in tmp_path.rglob("predictions.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        both = [line | {"metric": metric} for line in lines for metric in ("wer", "cer")]
        path.write_text("\n".join(map(json.dumps, both)))
    results = load_results(tmp_path)
    assert "asr WER ↓  " in show(summary(results, "demo", ["base"]))
    wer, cer = compare("tuned", "base", results).rows
    assert {wer.metric, cer.metric} == {"wer", "cer"}
    assert wer.p_holm == pytest.approx(2 * wer.p)


def test_a_long_name_keeps_its_end() -> None:
    lines = layout.text(
        [["upstream", "x"], ["hf:" + "a" * 90 + ":alpha=0.5", "y" * 60]]
    ).splitlines()
    assert len(lines[1]) == 100
    assert lines[1].startswith("…a") and ":alpha=0.5  y" in lines[1]


def test_groups_and_metrics_of_two_directions_stand_in_the_table(tmp_path: Path) -> None:
    """Two metrics, one up and one down, in two groups; a verdict each way round."""
    for upstream, rate in (("base", 0.30), ("merged", 0.15)):
        for seed in range(3):
            rng = np.random.default_rng(seed)
            lines = [
                Count(f"{s}-{i}", f"s{s}", "r", "h", float(rng.binomial(10, rate + s / 100)), 10.0,
                      metric=metric, group=["en", "de"][s % 2])
                for s in range(12) for i in range(6) for metric in ("accuracy", "cer")
            ]  # fmt: skip
            records = [line for line in lines if line.metric == "accuracy"]
            score = Score(
                metric="accuracy", better="higher", n=72, speakers=12, steps=1, seconds=1,
                score=100 - 10 * sum(line.errors for line in records) / len(records),
                lr={"": 1e-3}, dev={}, device="cpu", versions={}, git={}, created="", recipe={},
                metrics={"cer": "lower"},
            )  # fmt: skip
            save(tmp_path, Cell(upstream, "f" * 12, "two", "both", "ab" * 6, seed), score, lines)
    results = load_results(tmp_path)
    rows = {r.metric: r for r in compare("merged", "base", results).rows}
    views = ("", "/macro", "/worst", "/spread")
    assert rows.keys() == {m + v for m in ("accuracy", "cer") for v in views}
    assert rows["accuracy"].difference > 0 > rows["cer"].difference
    for metric in ("accuracy", "cer", "accuracy/macro", "accuracy/worst", "cer/macro", "cer/worst"):
        assert rows[metric].verdict == "better", metric
    shown = show(summary(results, "two", ["base"]))
    for words in ("both ACC ↑", "both CER worst ↓", "both ACC spread ↓", "base both CER macro: "):
        assert words in shown
    assert re.search(r"merged both ACC macro: (en|de) \d\d\.\d\d, (en|de) \d\d\.\d\d\n", shown)
    assert max(map(len, shown.splitlines())) <= 100
