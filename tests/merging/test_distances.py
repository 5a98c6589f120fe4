"""`benchmark.py similarity` on tiny upstreams: what is kept, shared, refused and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
import upstream
from merging import similarity
from merging.similarity import distances, shuffled
from tests import tiny
from upstream.similarity import FOLDER, similarities

MINE = """
import torch
from upstream.base import Hidden, Upstream, valid

class Frames(Upstream):
    num_layers, dim, stride = 1, 400, 400

    def forward(self, wavs, lens):
        frames = torch.nn.functional.pad(wavs, (0, -wavs.shape[1] % 400)).unflatten(1, (-1, 400))
        lens = (lens + 399) // 400
        return Hidden((frames * valid(lens, frames.shape[1])[:, :, None])[None], lens)

class Nan(Frames):
    def forward(self, wavs, lens):
        hidden = super().forward(wavs, lens)
        return Hidden(hidden.layers * float("nan"), hidden.lens)
"""


def call(*words: object) -> int:
    try:
        return benchmark.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def found(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return list(json.loads(capsys.readouterr().out))


def test_merged_stays_nearer_than_tuned_and_is_kept(
    recipes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = str(tiny.hf_folder(recipes.parent, "hubert"))
    results = tmp_path / "results"
    words = ["similarity", base, "merged", "finetuned", "--suite", recipes, "--results", results]
    words += ["--downstream", "label"]
    assert call(*words, "--format", "json") == 0
    merged, tuned = found(capsys)
    assert (merged["reference"], merged["other"]) == (base, "merged")
    assert merged["utterances"] == 24 and merged["units"] == 24 and merged["unit"] == "utterances"
    assert merged["layers"] == [[i, i] for i in range(4)]
    assert 0 < merged["frames"] < 24 * 30
    for name in ("cka", "cosine", "pwcca"):
        for at in range(1, 4):
            near, far = merged["measures"][name][at], tuned["measures"][name][at]
            floor = merged["floor"][name][at]["value"]
            assert 1 > near["value"] > far["value"] > floor, (name, at)
            assert near["low"] < near["value"] < near["high"] <= 1
    assert merged["measures"]["cka"][0]["value"] > tuned["measures"]["cka"][0]["value"]
    assert merged["floor"] == tuned["floor"], "one architecture has one floor"
    assert merged["weights"]["all"] == pytest.approx(tuned["weights"]["all"] / 4, rel=1e-4)
    assert merged["weights"]["cnn"] == 0 < merged["weights"]["layer 3"]
    assert len(list((results / FOLDER / "floor").glob("*.json"))) == 1
    assert [each.other for each in similarities(results)] != []

    def never(*_: object, **__: object) -> None:
        raise AssertionError("what is kept is not computed again")

    monkeypatch.setattr(similarity, "provide", never)
    assert call(*words, "--format", "json") == 0
    assert found(capsys) == [merged, tuned]
    assert call(*words) == 0
    text = capsys.readouterr().out
    assert "merged against" in text and "floor" in text and "24 utterances" in text
    assert call(*words, "--format", "csv") == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 2 * (3 * 5 + len(merged["weights"]))
    assert f"{base},merged,weights,all," in rows[16]
    assert call(*words, "--seed", 1) == 0, "all utterances are the same, however drawn"
    assert call(*words, "--utterances", 12) == 2
    assert "not computed again" in capsys.readouterr().err


def test_other_architectures(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hubert, wavlm = tiny.hf_folder(tmp_path, "hubert"), tiny.hf_folder(tmp_path, "wavlm")
    words = ["--suite", suite, "--results", tmp_path / "r", "--format", "json"]
    assert call("similarity", hubert, wavlm, "fbank_no_cmvn", *words) == 0
    other, fbank = found(capsys)
    assert other["weights"] == fbank["weights"] == {} and fbank["floor"] == {}
    assert set(other["floor"]) == set(other["measures"]) >= {"cka", "cosine"}
    assert fbank["layers"] == [[i, 0] for i in range(4)] and set(fbank["measures"]) == {"cka"}
    assert all(0 < each["value"] < 1 for each in fbank["measures"]["cka"])


def test_shuffled_weights_are_the_same_values_elsewhere(tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path)
    before = encoder.fingerprint()
    bare = shuffled(encoder)
    assert encoder.fingerprint() == before != bare.fingerprint() == shuffled(encoder).fingerprint()
    for (_, a), (_, b) in zip(encoder.named_parameters(), bare.named_parameters()):
        assert torch.equal(a.flatten().sort()[0], b.flatten().sort()[0])
    assert distances(encoder, bare)["all"] > 0.5
    assert set(distances(encoder, encoder).values()) == {0.0}
    assert distances(encoder, upstream.load("fbank")) == {}


@pytest.mark.parametrize(
    ("others", "flags", "line"),
    [
        (["hubert_bse"], [], "did you mean hubert_base?"),
        (["mine.py:Nan"], [], "NaN or infinite hidden states"),
        (["mine.py:Frames"], [], "frames of 160 and of 400 samples cannot be compared"),
        (["fbank_no_cmvn"], ["--downstream", "lable"], "did you mean label?"),
        (["fbank_no_cmvn"], ["--utterances", 4], "'4' is no whole number from 5 up"),
        (["fbank"], [], "fbank is named twice"),
    ],
)
def test_mistakes_are_one_line(
    suite: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    others: list[str],
    flags: list[object],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    words = ["--suite", suite, "--results", tmp_path / "r", *flags]
    reference = "mine.py:Frames" if "Nan" in others[0] else "fbank"
    assert call("similarity", reference, *others, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert line in error and "unforeseen" not in error
