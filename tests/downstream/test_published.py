"""The numbers of the literature that the project ships: their scores follow from their rows."""

import csv

import numpy as np
import pytest

from downstream.report import superb
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
