"""Kept heads say of the test set what they were scored on, and of other audio something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

import benchmark
from downstream.report.results import load_results
from downstream.run import heads
from tests import tiny
from upstream import load


@pytest.fixture
def finished(suite: Path, tmp_path: Path) -> tuple[str, Path]:
    """An upstream, and results of it in both tasks with two seeds."""
    base, results = str(tiny.hf_folder(tmp_path)), tmp_path / "r"
    words = ["--upstream", base, "--suite", str(suite), "--workers", "1"]
    assert benchmark.main([*words, "--results", str(results)]) == 0
    return base, results


def test_a_kept_head_says_what_it_was_scored_on(
    finished: tuple[str, Path],
    suite: Path,
    tones: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, results = finished
    upstream = load(base).eval()
    for result in load_results(results):
        kept = heads.load(result, upstream)
        said = {
            line.id: heads.predict(kept, upstream, str(tones / f"{line.id}.wav"))
            for line in result.predictions
        }
        assert said == {line.id: [line.hypothesis] for line in result.predictions}
        weights = kept[0].head.layer_weights
        assert weights.shape == (4,) and weights.abs().sum() > 0, "the layer weights are kept"

    soundfile.write(tmp_path / "mine.flac", np.random.default_rng(0).normal(0, 0.1, 44_100), 44_100)
    words = ["predict", "--upstream", base, "--suite", str(suite), "--results", str(results)]
    capsys.readouterr()
    mine = [str(tmp_path / "mine.flac"), str(tones / "5-2.wav")]
    assert benchmark.main([*words, "--downstream", "label", *mine]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == mine
    assert all(line.split("\t")[1].split(" (")[0] in ("low", "mid", "high") for line in lines)


def test_most_heads_agree() -> None:
    assert heads.agreed(["a", "b", "b"]) == "b (2 of 3 heads)"
    assert heads.agreed(["a", "b"]) == "a (1 of 2 heads)"
    assert heads.agreed(["a", "a"]) == "a (2 of 2 heads)"
    assert heads.agreed(["a"]) == "a"


def test_what_cannot_be_predicted_is_one_line(
    finished: tuple[str, Path],
    suite: Path,
    tones: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, results = finished

    def fault(*words: str, upstream: str = base, where: Path | str = suite) -> str:
        place = ["--upstream", upstream, "--suite", str(where), "--results", str(results)]
        assert benchmark.main(["predict", *place, *words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "unforeseen" not in line
        return line

    wav = str(tones / "5-2.wav")
    assert "no such file" in fault("--downstream", "label", str(tmp_path / "none.wav"))
    assert "did you mean label?" in fault("--downstream", "lable", wav)
    assert "no results for upstream" in fault("--downstream", "label", wav, upstream="fbank")
    assert "no results for upstream" in fault("--downstream", "label", wav, where="demo")
    head = next(results.rglob("label@*/seed0/head.safetensors"))
    head.write_bytes(head.read_bytes()[:100])
    assert "cannot be read" in fault("--downstream", "label", wav)
    head.unlink()
    assert "no such head" in fault("--downstream", "label", wav)
