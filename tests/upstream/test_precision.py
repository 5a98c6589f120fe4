"""What low precision does to hidden states is measured once and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch

from tests import tiny
from tests.test_cli import call
from upstream.common import disk
from upstream.encoder import encoder as encoders
from upstream.features import precision
from upstream.features.clips import clips as load_clips
from upstream.features.store import Store


def test_the_error_is_the_difference_of_two_encoders(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path, "hubert")
    rng = torch.Generator().manual_seed(0)
    files = []
    for number, seconds in enumerate((1.0, 0.4)):
        file = tmp_path / f"{number}.wav"
        soundfile.write(file, (torch.randn(int(16000 * seconds), generator=rng) / 9).numpy(), 16000)
        files.append((str(file), None, None))
    clips = load_clips(files, tmp_path / "clips.tsv")
    low, full = (encoders.load(folder, precision=p) for p in ("bfloat16", "float32"))
    found = precision.error(low, clips)
    wavs = [clip.load() for clip in clips]
    with torch.inference_mode():
        alone = [[e(w[None], torch.tensor([len(w)])).layers for w in wavs] for e in (low, full)]
    for layer, share in enumerate(found):
        apart = sum(float((a[layer] - b[layer]).square().sum()) for a, b in zip(*alone))
        size = sum(float(b[layer].square().sum()) for b in alone[1])
        assert share == pytest.approx((apart / size) ** 0.5, rel=0.2)  # rounding differs in batches
    assert 1e-4 < max(found) < 0.1 and low.precision == "bfloat16"
    store = Store(tmp_path / "cache")
    assert "bfloat16 on cpu" in precision.told(low, clips, store, "x")
    assert precision.told(low, clips, store, "x") == "" == precision.told(full, clips, store, "x")


def test_a_run_tells_it(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.hf_folder(tmp_path, "hubert")
    words = ("--upstream", f"{folder}:precision=bfloat16", "--suite", suite, "--workers", 1)
    assert call(*words, "--downstream", "label", "--results", tmp_path / "r") == 0
    assert "hidden states in bfloat16 on cpu are " in capsys.readouterr().out
    (file,) = (tmp_path / "r" / "cache").glob("*/precision.json")
    assert len(disk.read_checked(file)["relative_rms_by_layer"]) == 4
