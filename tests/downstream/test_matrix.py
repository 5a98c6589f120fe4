"""The cross-task matrix: rows, their seeds together, and how sure a difference is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import benchmark
from downstream.report.lineage import lineages
from downstream.report.matrix import Line, matrix
from downstream.report.matrix_view import render
from downstream.report.results import load_results
from downstream.report.statistics import pooled
from downstream.report.summary import Sample, Summary
from tests.downstream.test_page import sourced
from tests.downstream.test_table import put
from upstream.common import disk
from upstream.common.errors import UserError

BASE = "b00000000000"


def heads(whole: np.ndarray, scores: np.ndarray, test: str = "t") -> list[Summary]:
    """Heads [H] with their scores [C, H] of equally many errors by cluster."""
    count = len(scores)
    without = (scores.sum(0) - scores) / (count - 1)
    names = [f"s{i}" for i in range(count)]
    return [
        Summary(test, count, "speakers", names, {"wer": Sample(whole[[h]], without[:, [h]])})
        for h in range(scores.shape[1])
    ]


def world(rng: np.random.Generator, clusters: int, seeds: int, count: int) -> tuple[bool, float]:
    """Whether the interval holds the true difference, 0, and its half width.

    Clusters differ, and differ in how they take to each fine-tuning and each head.
    """
    speaker = rng.normal(0, 4, clusters)

    def side(shift: float) -> list[Summary]:
        own = rng.normal(0, 2, clusters)  # how this way suits each speaker
        scores = np.stack([
            30 + speaker + own + shift + rng.normal(0, 0.7) + rng.normal(0, 1, clusters)
            for _ in range(count)
        ], 1)  # fmt: skip
        return heads(scores.mean(0), scores)

    way = rng.normal(0, 1, clusters)
    tuned = []
    for _ in range(seeds):
        shift = rng.normal(0, 1.5)
        rows = side(shift)
        tuned.append([
            row.__class__(**{**vars(row), "samples": {"wer": _plus(row, way)}}) for row in rows
        ])  # fmt: skip
    found = pooled(tuned, side(0.0), "wer")
    return found.low <= 0 <= found.high, found.high - found.value


def _plus(row: Summary, way: np.ndarray) -> Sample:
    sample = row.samples["wer"]
    rest = (way.sum() - way) / (len(way) - 1)
    return Sample(sample.whole + way.mean(), sample.without + rest[:, None])


@pytest.mark.parametrize(("clusters", "seeds", "count"), [(10, 3, 3), (40, 3, 2), (100, 5, 3)])
def test_intervals_cover_the_truth(clusters: int, seeds: int, count: int) -> None:
    rng = np.random.default_rng(0)
    covered = [world(rng, clusters, seeds, count)[0] for _ in range(400)]
    assert 0.92 <= np.mean(covered) <= 0.99


def tuned(root: Path, name: str, seed: int, rate: float, strategy: str = "stable") -> None:
    """Results and the record of a fine-tuned upstream."""
    upstream = f"{name}:seed={seed}"
    place = root / "upstreams" / f"{name}@{seed}{strategy}"
    record = {
        "recipe": {"task": "er.yaml", "seed": seed, "strategy": strategy, "lr": 1e-3},
        "base_fingerprint": BASE, "fingerprint": f"{name}{seed}", "seconds": 60.0 + seed,
        "peak_memory_bytes": 2e9, "stored_bytes": 4e6, "moved": {"layer 1": 0.1, "layer 2": 0.3},
    }  # fmt: skip
    disk.write(place / "finetune.json", json.dumps(record))
    for task in ("er", "sid"):
        for head in range(3):
            put(root, upstream, task, head, rate, fingerprint=f"{name[:3]}{seed}{strategy}"[:12])
    sourced(root, upstream, str(place))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for task in ("er", "sid"):
        for head in range(3):
            put(tmp_path, "base", task, head, 0.30, fingerprint=BASE)
    for seed in range(3):
        tuned(tmp_path, "worse", seed, 0.45, "regular")
    tuned(tmp_path, "better", 0, 0.15)
    return tmp_path


def lines(root: Path) -> dict[str, Line]:
    results = load_results(root)
    found = matrix(results, results[0].cell.suite)
    return {line.way: line for line in found.lines}


def test_a_row_is_a_way_with_its_seeds_together(root: Path) -> None:
    found = lines(root)
    assert set(found) == {"regular", "stable"}
    assert found["regular"].seeds == 3 and found["stable"].seeds == 1
    assert found["regular"].tuned_on == "er" and found["regular"].seconds == 61.0
    assert found["regular"].layers == "10-30 %"
    # with one seed of fine-tuning nothing is known of another
    assert {cell.verdict for cell in found["stable"].cells.values()} == {"withheld"}
    assert found["stable"].gain > 0 > found["regular"].gain
    assert found["stable"].worst == "none" and found["regular"].worst != "none"


def test_scores_and_differences_add_up(root: Path) -> None:
    results = load_results(root)
    found = matrix(results, results[0].cell.suite, "base")
    for line in found.lines:
        for task, cell in line.cells.items():
            assert cell.score == pytest.approx(found.scores[task] + cell.difference)
            assert cell.low < cell.difference < cell.high


def test_recipes_that_differ_in_more_than_the_seed_are_rows_apart(root: Path) -> None:
    path = root / "upstreams" / "worse@1regular" / "finetune.json"
    record = json.loads(path.read_text())
    record["recipe"]["lr"] = 2e-3
    path.write_text(json.dumps(record))
    results = load_results(root)
    rows = matrix(results, results[0].cell.suite).lines
    assert sorted((line.way, line.seeds) for line in rows) == [
        ("regular", 1), ("regular", 2), ("stable", 1),
    ]  # fmt: skip


def test_audio_that_fine_tuning_saw_counts_in_no_mean(root: Path) -> None:
    for path in root.glob("better*@*/*/er@*/seed*/score.json"):
        content = json.loads(path.read_text())
        content["result"]["seen"] = 5
        path.write_text(json.dumps(content))
    line = lines(root)["stable"]
    assert line.cells["er"].seen and not line.cells["sid"].seen
    assert line.gain == pytest.approx(line.cells["sid"].gain)


def test_what_has_no_record_or_another_base_is_named(root: Path) -> None:
    put(root, "foreign", "er", 0, 0.2, fingerprint="f00000000000")
    path = root / "upstreams" / "better@0stable" / "finetune.json"
    path.write_text(path.read_text().replace(BASE, "e00000000000"))
    results = load_results(root)
    found = matrix(results, results[0].cell.suite, "base")
    assert any("foreign" in note and "no record" in note for note in found.notes)
    assert any("better" in note and "another upstream" in note for note in found.notes)
    assert [line.way for line in found.lines] == ["regular"]


def test_what_was_collected_has_the_record_of_its_run(root: Path) -> None:
    put(root, "early", "er", 0, 0.2, fingerprint="a00000000000")
    sourced(root, "early", str(root / "upstreams" / "better@0stable" / "early-0.2"))
    known = lineages(load_results(root))
    assert known["early", "a00000000000"].strategy == "stable/early-0.2"


@pytest.mark.parametrize("form", ["text", "md", "csv", "json", "latex"])
def test_every_format_has_every_row(root: Path, form: str) -> None:
    results = load_results(root)
    shown = render(matrix(results, results[0].cell.suite), form)  # type: ignore[arg-type]
    assert "regular" in shown and "stable" in shown
    if form == "json":
        assert len(json.loads(shown)["lines"]) == 2


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = load_results(root)[0].cell.suite
    assert benchmark.main(["matrix", "--results", str(root), "--suite", suite]) == 0
    assert "layers moved" in capsys.readouterr().out
    assert benchmark.main(["matrix", "--results", str(root), "--suite", f"{suite}x"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert benchmark.main(["matrix", "--results", str(root), "--suite", suite, "--base", "x"]) == 2


def test_without_a_base_one_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path, "alone", "er", 0, 0.3)
    results = load_results(tmp_path)
    with pytest.raises(UserError, match="give --base"):
        matrix(results, results[0].cell.suite)


def test_two_names_of_the_same_weights_count_once(root: Path) -> None:
    before = lines(root)["regular"]
    for task in ("er", "sid"):
        for head in range(3):
            put(root, "alias", task, head, 0.45, fingerprint="wor1regular")
    sourced(root, "alias", str(root / "upstreams" / "worse@1regular"))
    results = load_results(root)
    found = matrix(results, results[0].cell.suite)
    assert {line.way: line.seeds for line in found.lines}["regular"] == before.seeds == 3
    assert any("made as alias was; not counted again" in note for note in found.notes)


@pytest.mark.parametrize("spoil", ["", "{}", "[]", '{"recipe": 3}', "\0" * 40])
def test_spoilt_records_leave_their_row_out_and_say_so(root: Path, spoil: str) -> None:
    (root / "upstreams" / "better@0stable" / "finetune.json").write_text(spoil)
    results = load_results(root)
    found = matrix(results, results[0].cell.suite)
    assert [line.way for line in found.lines] == ["regular"]
    assert any("better:seed=0: no record of how it was made" in note for note in found.notes)


def test_how_far_layers_moved_is_read_from_the_record(root: Path) -> None:
    path = root / "upstreams" / "better@0stable" / "finetune.json"
    record = json.loads(path.read_text()) | {"collected": {"ema-0.9": {"layer 1": 0.02}}}
    path.write_text(json.dumps(record))
    sourced(root, "better:seed=0", str(path.parent / "ema-0.9"))
    merge = {
        "base_fingerprint": BASE, "tuned": [str(path.parent)], "method": "ties", "recipe": {},
        "fingerprints": {"tuned": ["better0"]}, "params": {"alpha": 0.5, "density": 0.2},
        "moved": {"layer 1": 0.04, "layer 2": 0.05, "pos_conv": 0.9},
    }  # fmt: skip
    disk.write(root / "upstreams" / "ties@1" / "merge.json", json.dumps(merge))
    for head in range(3):
        put(root, "ties", "er", head, 0.2, fingerprint="ties00000000")
    sourced(root, "ties", str(root / "upstreams" / "ties@1"))
    found = lines(root)
    assert found["stable/ema-0.9"].layers == "2-2 %"
    assert found["stable, ties"].layers == "4-5 %"
