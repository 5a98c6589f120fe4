"""The numbers of the literature that the project ships: their scores follow from their rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import benchmark
from downstream.base import METRICS, Count, Record, Trial
from downstream.report import published as published_numbers
from downstream.report import superb
from downstream.report.compare import compare
from downstream.report.matrix import matrix
from downstream.report.matrix_view import render
from downstream.report.results import Cell, Score, load_results, save
from downstream.report.summary import Sample, Summary
from downstream.report.table import show, summary
from upstream.common import PROJECT

PUBLISHED = PROJECT / "results" / "published"


def published(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open() as file:
        return list(csv.DictReader(file))


def superb_score(row: dict[str, str], constants: str) -> float:
    """From the numbers of a row, each as two heads' whose three speakers are all alike."""
    heads = {}
    for task, metrics in superb.sets()[constants].items():
        columns = {name: metric for metric, name in superb.NAMES.items()}
        samples = {}
        for c in metrics:
            value = float(row[f"{task}_{columns.get(c.metric, c.metric)}"])
            samples[c.metric] = Sample(np.array([value]), np.full((3, 1), value))
        heads[task] = [Summary("same", 3, "speakers", ["a", "b", "c"], samples)] * 2
    return superb.score(constants, heads).value


@pytest.mark.parametrize("row", published("superb.csv"), ids=lambda row: row["model"])
def test_leaderboard_scores(row: dict[str, str]) -> None:
    digits = len(row["score"].partition(".")[2])
    score = superb_score(row, "leaderboard-2022")
    assert row["source"]
    assert score == pytest.approx(float(row["score"]), abs=0.51 * 10**-digits)


def test_speech_ft_scores() -> None:
    rows = published("speech_ft.csv")
    image = [row for row in rows if "performance.png" in row["source"]]
    assert len(image) == 6 and all(row["source"] and row["score"] for row in rows)
    for row in image:
        assert superb_score(row, "speech-ft") == pytest.approx(float(row["score"]), abs=0.0051)


def test_the_papers_constants_put_their_own_ends_at_0_and_1000() -> None:
    mine = [c for c in published("constants.csv") if c["set"] == "superb-paper"]
    for column, score in (("fbank", 0), ("sota", 1000)):
        row = {c["metric"]: c[column] for c in mine}
        assert superb_score(row, "superb-paper") == pytest.approx(score)


def measured(root: Path, upstream: str, gap: float) -> None:
    """Made-up results on all ten tasks, as if on SUPERB's own data."""
    for task, constants in superb.sets()["leaderboard-2022"].items():
        trained = task != "qbe"
        for seed in range(3 if trained else 1):
            records = [r for c in constants for r in made_up(c.metric, seed, gap)]
            first = METRICS[constants[0].metric]
            mine = [r for r in records if r.metric == first.name]
            directions = {c.metric: METRICS[c.metric].better for c in constants}
            score = Score(
                metric=first.name, better=first.better, score=first.score(mine), n=len(mine),
                lr={"": 0.1} if trained else {}, dev={}, speakers=8, steps=1, seconds=1,
                device="cpu", versions={}, git={}, created="", metrics=directions,
                recipe={"task": task, "corpus": {"name": superb.CORPORA[task]}},
            )  # fmt: skip
            cell = Cell(upstream, upstream[0] * 12, "superb", task, "ab" * 6, seed)
            save(root, cell, score, records)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for upstream, gap in (("good", 3.0), ("poor", 1.0)):
        measured(tmp_path, upstream, gap)
    return tmp_path


def test_a_task_without_seeds_takes_part_beside_those_with_three(root: Path) -> None:
    """QbE trains nothing: its one result belongs to every seed of the others."""
    rows = {row.task: row for row in compare("good", "poor", load_results(root)).rows}
    assert rows["qbe"].seeds == 1 and rows["qbe"].verdict == "better"
    whole = rows["superb_score leaderboard-2022"]
    assert whole.seeds == 3 and whole.verdict == "better"


def test_every_published_number_has_one_value_and_a_name_that_finds_it() -> None:
    rows = published_numbers.known()
    assert len(rows) == len({row.name for row in rows.values()}) > 40
    for file, named in (("superb.csv", "model"), ("speech_ft.csv", "upstream")):
        for line in published(file):
            parts = [line[named], line.get("fine_tuned_on", ""), line.get("method", "")]
            spelt = "published:" + "/".join(part.replace("/", " ") for part in parts if part)
            row = published_numbers.named(spelt)
            assert line["source"] in row.sources
            for column, text in line.items():  # sources of one name agree
                task, _, metric = column.partition("_")
                key = (task, superb.NAMES.get(metric, metric))
                assert key not in row.scores or row.scores[key] == float(text or row.scores[key])
            if line.get("score_name") == "SUPERB_S":
                score = row.scores[superb.METRIC, "speech-ft"]
                assert score == pytest.approx(float(line["score"]), abs=0.0051)


def test_a_published_number_stands_beside_superbs_own_data_without_a_test(root: Path) -> None:
    results = load_results(root)
    rows = published_numbers.compare("good", "published:hubert-base", results).rows
    assert len(rows) == 11 + 3  # metrics, and scores by three sets of constants
    by_metric = {(row.task, row.metric): row for row in rows}
    sid = by_metric["sid", "accuracy"]
    assert sid.reference_score == 81.42
    assert sid.difference == pytest.approx(sid.score - 81.42) and sid.seeds == 3
    assert by_metric["sf", "slot_cer"].reference_score == 25.20
    assert all(np.isnan(row.p) and np.isnan(row.low) for row in rows)
    assert {row.verdict for row in rows} == {"unknown"}
    other = published_numbers.compare("published:HuBERT Base", "good", results).rows
    signs = [
        sorted(sign * row.difference for row in side) for sign, side in ((1, other), (-1, rows))
    ]
    assert signs[0] == pytest.approx(signs[1])


def test_numbers_of_other_data_are_not_compared(root: Path) -> None:
    for path in root.glob("good@*/*/*/*/score.json"):
        content = json.loads(path.read_text())
        content["result"]["recipe"]["corpus"]["name"] = "mine"
        path.write_text(json.dumps(content))
    found = published_numbers.compare("good", "published:hubert-base", load_results(root))
    assert not found.rows and published_numbers.HERE in found.skipped[0]


def test_published_rows_in_every_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load_results(root)
    rows = published_numbers.chosen(["wavlm-base*", "published:hubert-base/*/speech-ft"])
    assert {"published:wavlm-base", "published:wavlm-base+"} < {row.name for row in rows}
    table = summary(results, "superb", ["poor"], rows)
    mine = [row for row in table.rows if row.upstream == "published:wavlm-base+"]
    assert len(mine) == 14 and "a published number: no" in " ".join(show(table).split())
    found = matrix(results, "superb", "poor", rows)
    heard = next(line for line in found.lines if "er-iemocap/speech-ft" in line.way)
    assert not heard.cells and heard.superb == {"superb_score speech-ft": 1010.29}
    assert found.superb.keys() > heard.superb.keys()
    assert "1010.29" in render(found) and "HuBERT" not in render(found).split("\n")[1]
    where = ["--results", str(root), "--reference", "poor", "--published", "wavlm-base+"]
    assert benchmark.main(["report", *where]) == 0
    html = (root / "report.html").read_text()
    assert html.count("published:wavlm-base+") > 1 and "89.42" in html
    capsys.readouterr()
    words = ["poor", "good", "published:wavlm-large", "published:fbank"]
    assert benchmark.main(["compare", *words, "--results", str(root)]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("good"))
    assert " a" in line  # letters of those that were tested stay
    assert benchmark.main(["compare", "good", "published:wavlm-larg", "--results", str(root)]) == 2
    assert "did you mean wavlm-large" in capsys.readouterr().err


def made_up(metric: str, seed: int, gap: float) -> list[Record]:
    """Of eight speakers, records that are the better the larger `gap` is."""
    rng = np.random.default_rng([seed, int(gap)])
    if METRICS[metric].label in ("EER", "MTWV"):
        return [
            Trial(f"{s} {d}", f"e{s}", f"d{d}", rng.normal() + gap * y, y, f"s{s}", metric=metric)
            for s in range(8)
            for d in range(40)
            for y in [d % 2]
        ]
    wrong = 0.1 if gap > 2 else 0.4
    return [
        Count(f"{s}-{i}", f"s{s}", "r", "", float(rng.binomial(1, wrong)), 1.0, metric=metric)
        for s in range(8)
        for i in range(20)
    ]
