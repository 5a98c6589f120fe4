"""The numbers of the literature that the project ships: their scores follow from their rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from downstream.base import METRICS, Count, Record, Trial
from downstream.report import superb
from downstream.report.compare import compare
from downstream.report.results import Cell, Score, load_results, save
from downstream.report.statistics import Sample, Summary
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


def test_a_task_without_seeds_takes_part_beside_those_with_three(tmp_path: Path) -> None:
    """QbE trains nothing: its one result belongs to every seed of the others."""
    for upstream, gap in (("good", 3.0), ("poor", 1.0)):
        for task, constants in superb.sets()["leaderboard-2022"].items():
            trained = task != "qbe"
            for seed in range(3 if trained else 1):
                records = [r for c in constants for r in made_up(c.metric, seed, gap)]
                first = METRICS[constants[0].metric]
                mine = [r for r in records if r.metric == first.name]
                score = Score(
                    metric=first.name, better=first.better, score=first.score(mine), n=len(mine),
                    lr={"": 0.1} if trained else {}, dev={}, speakers=8, steps=1, seconds=1,
                    device="cpu", versions={}, git={}, created="",
                    recipe={"task": task, "corpus": {"name": superb.CORPORA[task]}},
                )  # fmt: skip
                cell = Cell(upstream, upstream[0] * 12, "superb", task, "ab" * 6, seed)
                save(tmp_path, cell, score, records)
    rows = {row.task: row for row in compare("good", "poor", load_results(tmp_path)).rows}
    assert rows["qbe"].seeds == 1 and rows["qbe"].verdict == "better"
    whole = rows["superb_score leaderboard-2022"]
    assert whole.seeds == 3 and whole.verdict == "better"


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
