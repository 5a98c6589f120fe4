"""The numbers of the literature that the project ships: their scores follow from their rows."""

import csv

import pytest

from upstream.common import PROJECT

PUBLISHED = PROJECT / "results" / "published"


def published(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open() as file:
        return list(csv.DictReader(file))


def superb_score(row: dict[str, str], constants: str) -> float:
    """0 is FBANK, 1000 the best upstream; metrics are averaged inside a task, then tasks."""
    by_task: dict[str, list[float]] = {}
    for c in published("constants.csv"):
        if c["set"] == constants:
            fbank, best = float(c["fbank"]), float(c["sota"])
            gain = 1000 * (float(row[c["metric"]]) - fbank) / (best - fbank)
            by_task.setdefault(c["task"], []).append(gain)
    means = [sum(gains) / len(gains) for gains in by_task.values()]
    return sum(means) / len(means)


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
