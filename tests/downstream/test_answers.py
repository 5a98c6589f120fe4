"""The answer in every place: a run's table, compare, the page, JSON; chance; margins; scales."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import benchmark
from downstream.base import METRICS, Count
from downstream.report import page, table
from downstream.report.compare import compare
from downstream.report.results import Cell, Score, load_results, save
from downstream.report.summary import summarise
from downstream.report.table import at_floor, half_text, show, summary
from downstream.tasks.metrics import scale

LABELS = ("a", "a", "b", "c")  # the majority class has half of the utterances
SENTENCE = "merged: better on er; kept asr; sid undecided"


def put(root: Path, upstream: str, task: str, errors: np.ndarray, metric: str = "accuracy") -> None:
    """Heads with errors [seeds, speakers, utterances] of 0 to 1."""
    total = 1.0 if metric == "accuracy" else 10.0
    for seed, head in enumerate(errors):
        lines = [
            Count(f"{s}-{u}", f"s{s}", LABELS[u % 4], "x", float(round(total * e)), total)
            for s, row in enumerate(head)
            for u, e in enumerate(row)
        ]
        wrong = sum(line.errors for line in lines) / sum(line.total for line in lines)
        better = METRICS.named(metric).better
        score = Score(
            metric=metric, better=better, lr={"": 1e-3}, dev={}, n=len(lines),
            score=100 * (wrong if better == "lower" else 1 - wrong), speakers=len(head), steps=1,
            seconds=1, device="cpu", versions={}, git={}, created="", recipe={},
        )  # fmt: skip
        cell = Cell(upstream, f"{upstream[0]}{'0' * 11}", "demo", task, "ab" * 6, seed)
        save(root, cell, score, lines)


def rates(rate: float, speakers: int = 12, seeds: int = 3, noise: float = 0.0, seed: int = 0):
    """Errors that are `rate` of each speaker's utterances but for `noise`."""
    rng = np.random.default_rng(seed)
    shares = np.clip(rate + noise * rng.normal(size=(seeds, speakers, 1)), 0, 1)
    return (np.arange(20) + 0.5 < 20 * shares).astype(float)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, upstream in enumerate(("base", "merged")):
        put(tmp_path, upstream, "er", rates(0.5 - 0.2 * number, noise=0.05, seed=number))
        put(tmp_path, upstream, "asr", rates(0.5, noise=0.03, seed=number), "wer")
        put(tmp_path, upstream, "sid", rates(0.5, noise=0.2, seed=3 + number))
    return tmp_path


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_answer_stands_everywhere(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load_results(root)
    assert SENTENCE in flat(show(summary(results, "demo", ["base"]))[:300])
    table.write(root, results, ["base"])
    assert SENTENCE in (root / "table.md").read_text()
    for words in (["base", "merged"], ["merged", "base"]):
        for form in ("text", "md", "latex", "json"):
            call = ["compare", *words, "--results", str(root), "--format", form]
            assert benchmark.main(call) == 0
            out = capsys.readouterr().out
            assert SENTENCE in flat(out.replace("% ", "")), form
            if form == "json":
                found = json.loads(out)["answers"]
                assert {each["reference"] for each in found} == {"base", "merged"}
    assert benchmark.main(["report", "--results", str(root), "--reference", "base"]) == 0
    html = (root / page.NAME).read_text()
    assert html.index(SENTENCE) < html.index("<h3>Scores")
    assert "<h3>Scores" in html and 'class="answer"' in html


def test_a_margin_decides_what_is_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["compare", "merged", "base", "--results", str(root), "--format", "json", "--margin"]
    words = {}
    for margin in ("0.01", "sid=60", "60", "2%"):
        assert benchmark.main([*call, margin]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        words[margin] = {row["task"]: (row["verdict"], row["margin"]) for row in rows}
    assert {t: v for t, (v, _) in words["0.01"].items()} == {
        "asr": "undecided", "er": "better", "sid": "undecided",
    }  # fmt: skip
    assert words["sid=60"]["sid"] == ("kept", 60) and words["sid=60"]["asr"][0] == "kept"
    assert {v for v, _ in words["60"].values()} == {"better", "kept"}
    reference = {row.task: row.reference_score for row in compare("merged", "base",
                 load_results(root)).rows}  # fmt: skip
    assert words["2%"]["asr"][1] == pytest.approx(0.02 * reference["asr"])
    assert words["2%"]["er"][1] == pytest.approx(0.02 * (100 - reference["er"]))
    for wrong in ("5 points", "-1", "eer=2"):
        assert benchmark.main([*call, wrong]) == 2
        assert "--margin" in capsys.readouterr().err


def test_worse_within_the_margin_is_neither_kept_nor_worse(tmp_path: Path) -> None:
    put(tmp_path, "base", "er", rates(0.30, noise=0.03))
    put(tmp_path, "merged", "er", rates(0.36, noise=0.03, seed=1))
    results = load_results(tmp_path)
    verdict = {
        text: compare("merged", "base", results, {"": table_margin(text)}).rows[0].verdict
        for text in ("1", "20")
    }
    assert verdict == {"1": "worse", "20": "slightly worse"}
    back = compare("base", "merged", results, {"": table_margin("20")}).rows[0]
    assert back.verdict == "better"


def table_margin(text: str):
    from downstream.report.verdicts import read_margins

    return read_margins(text)[""]


def test_chance_and_majority_stand_below_accuracies(root: Path) -> None:
    shown = show(summary(load_results(root), "demo", ["base"]))
    chance = next(line for line in shown.splitlines() if line.startswith("(chance)"))
    majority = next(line for line in shown.splitlines() if line.startswith("(majority class)"))
    assert chance.split()[1:] == ["-", "33.33", "33.33"]
    assert majority.split()[2:] == ["-", "50.00", "50.00"]
    page.write(root / "page.html", load_results(root), references=["base"])
    html = (root / "page.html").read_text()
    assert "(majority class)" in html and "<td>50.00</td>" in html


def test_a_head_at_chance_is_told(tmp_path: Path) -> None:
    always = (np.array([LABELS[u % 4] != "a" for u in range(20)])).astype(float)
    put(tmp_path, "guess", "er", np.tile(always, (3, 12, 1)) + 0.0)
    put(tmp_path, "fbank", "er", rates(0.51, noise=0.05))
    put(tmp_path, "good", "er", rates(0.2, noise=0.05))
    put(tmp_path, "fbank", "asr", rates(1.0, noise=0.02), "wer")
    put(tmp_path, "good", "asr", rates(0.2, noise=0.05), "wer")
    found = summary(load_results(tmp_path), "demo")
    told = {(row.upstream, row.task): at_floor(row) for row in found.rows}
    assert "most frequent class (50.0)" in told["fbank", "er"]
    assert "saying nothing" in told["fbank", "asr"]
    assert told["good", "er"] == told["good", "asr"] == ""
    # all heads say the same of every speaker: no interval, and still the majority class
    assert "most frequent class" in told["guess", "er"]
    assert "at chance" in show(found)


def test_levels_need_labels_of_several_classes() -> None:
    def levels(lines: Sequence[Count]):
        return summarise(lines, "accuracy").baselines

    lines = [Count(f"{i}", f"s{i}", LABELS[i % 4], "x", 0.0, 1.0) for i in range(12)]
    assert levels(lines) == {"accuracy": (pytest.approx(100 / 3), 50.0)}
    folds = [r._replace(fold="f" if i < 4 else "g") for i, r in enumerate(lines)]
    assert levels(folds)["accuracy"] == (pytest.approx(100 / 3), 50.0)
    assert levels([r._replace(reference="a") for r in lines]) == {}
    assert levels([r._replace(total=2.0) for r in lines]) == {}
    assert summarise(lines, "wer").baselines == {}


@pytest.mark.parametrize(
    ("name", "better", "ends"),
    [
        ("accuracy", "higher", (0, 100)), ("eer", "lower", (0, 100)),
        ("accuracy/spread", "lower", (0, 100)), ("accuracy/worst", "higher", (0, 100)),
        ("wer", "lower", (0, np.inf)), ("der", "lower", (0, np.inf)),
        ("wer/spread", "lower", (0, np.inf)), ("mtwv", "higher", (-np.inf, 100)),
        ("x.py:MINE", "lower", (0, np.inf)), ("x.py:MINE", "higher", (-np.inf, 100)),
    ],
)  # fmt: skip
def test_where_a_scale_ends(name: str, better: str, ends: tuple[float, float]) -> None:
    assert scale(name, better) == ends  # type: ignore[arg-type]


def test_intervals_stay_on_the_scale(tmp_path: Path) -> None:
    put(tmp_path, "base", "er", rates(0.1, speakers=5, noise=0.15))
    put(tmp_path, "base", "asr", rates(0.08, speakers=5, noise=0.12), "wer")
    rows = {row.task: row for row in summary(load_results(tmp_path), "demo").rows}
    assert rows["er"].high == 100 and 0 < rows["er"].low < rows["er"].score
    assert rows["asr"].low == 0 and rows["asr"].high > rows["asr"].score
    assert re.fullmatch(r"\[\d+\.\d, 100\.0\]", half_text(rows["er"]))
    assert half_text(rows["er"]) in show(summary(load_results(tmp_path), "demo"))
    assert half_text(rows["er"]._replace(high=rows["er"].score + 1, low=rows["er"].score - 1)) == (
        "±1.00"
    )


def test_of_how_many_upstreams_the_seeds_variance_is_known(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path, f"{number}", "er", rates(0.3, noise=0.1, seed=number))
        shown = flat(show(summary(load_results(tmp_path), "demo")))
        assert re.search(rf"\(their number: (1-)?{number + 1}\b", shown)
        assert "known poorly" in shown  # of `short`, too
        # a further upstream that has one seed, or another test set, tells nothing
        put(tmp_path, "one", "er", rates(0.3, seeds=1))
        put(tmp_path, "short", "er", rates(0.3, speakers=6, noise=0.1))
        found = summary(load_results(tmp_path), "demo").rows
        assert {row.pooled for row in found if row.upstream in "0123one"} == {number + 1}
    alone = [r for r in load_results(tmp_path) if r.cell.upstream != "short"]
    assert "known poorly" not in flat(show(summary(alone, "demo")))


def test_two_speakers_are_too_few(tmp_path: Path) -> None:
    for number, upstream in enumerate(("base", "merged")):
        put(tmp_path, upstream, "er", rates(0.3, speakers=2, noise=0.2, seed=number))
    shown = show(summary(load_results(tmp_path), "demo", ["base"]))
    assert "±?" in shown and "too few speakers" in flat(shown)
    assert "merged: er without a verdict" in shown
    assert not re.search(r"±\d", shown)
