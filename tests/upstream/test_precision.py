"""What low precision does to hidden states is measured once and told, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.test_cli import call
from upstream.common import disk
from upstream.common.errors import UserError
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
    assert "bfloat16 on cpu" in precision.require_near(low, clips, store, "x")
    assert precision.require_near(low, clips, store, "x") == ""
    assert precision.require_near(full, clips, store, "x") == ""


def test_a_run_tells_it(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.hf_folder(tmp_path, "hubert")
    words = ("--upstream", f"{folder}:precision=bfloat16", "--suite", suite, "--workers", 1)
    assert call(*words, "--downstream", "label", "--results", tmp_path / "r") == 0
    assert "hidden states in bfloat16 on cpu are " in capsys.readouterr().out
    (file,) = (tmp_path / "r" / "cache").glob("*/precision.json")
    assert len(disk.read_checked(file)["relative_rms_by_layer"]) == 4


class FaultyKernel(TorchDispatchMode):
    """A CPU with AMX, whose grouped convolutions are noise in low precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if "conv" in str(func) and args[-1] > 1 and args[0].dtype != torch.float32:
            return torch.randn_like(output)
        return output


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["hubert", "wavlm", "data2vec"])  # one convolution and several
@pytest.mark.parametrize("padding", ["exact", "s3prl"])
def test_no_cpu_convolves_groups_in_low_precision(
    variant: str, low: str, padding: Any, tmp_path: Path
) -> None:
    """Which fails by itself on a CPU with AMX, and on any other by the mode above."""
    folder = tiny.hf_folder(tmp_path, variant)
    wav, lens = torch.randn(1, 8000) / 10, torch.tensor([8000])
    with torch.inference_mode(), FaultyKernel():
        full = encoders.load(folder, padding=padding)(wav, lens).layers
        near = encoders.load(folder, padding=padding, precision=low)(wav, lens).layers
    assert 0 < float((near - full).norm() / full.norm()) < 0.05


def test_training_convolves_groups_in_float32_too(tmp_path: Path) -> None:
    """Forward and backward, with the caller's own autocast."""
    encoder = encoders.load(tiny.hf_folder(tmp_path, "hubert"), precision="bfloat16").train()
    dtypes = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "conv" in str(func):
                dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Seen(), torch.autocast("cpu", torch.bfloat16):
        layers = encoder(torch.randn(1, 8000), torch.tensor([8000])).layers
        layers.sum().backward()
    assert len(dtypes) == 2 and set(dtypes) == {torch.float32}


@pytest.mark.parametrize("worst", [0.201, 1.1, float("nan"), float("inf")])
def test_a_run_refuses_what_is_far_from_float32(
    worst: float,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny.hf_folder(tmp_path, "hubert")
    words = ("--upstream", f"{folder}:precision=bfloat16", "--suite", suite, "--workers", 1,
             "--downstream", "label", "--results", tmp_path / "r")  # fmt: skip
    monkeypatch.setattr(precision, "error", lambda *_: [0.01, worst, 0.02])
    for features in ("cache", "recompute"):
        assert call(*words, "--features", features) == 2
        text = "".join(capsys.readouterr())
        assert "above the limit of 20 %; use precision=float32" in text, features
    assert not list((tmp_path / "r").rglob("score.json"))
    assert not list((tmp_path / "r" / "cache").glob("*/mean/*"))
    monkeypatch.setattr(precision, "error", lambda *_: [0.2])
    assert call(*words) == 0


def test_features_that_were_kept_though_far_are_not_used(suite: Path, tmp_path: Path) -> None:
    """By an earlier version, on a CPU whose kernel is faulty."""
    folder = tiny.hf_folder(tmp_path, "hubert")
    words = ("--upstream", f"{folder}:precision=bfloat16", "--suite", suite, "--workers", 1,
             "--downstream", "label", "--results", tmp_path / "r")  # fmt: skip
    assert call(*words, "--seeds", 1) == 0
    (file,) = (tmp_path / "r" / "cache").glob("*/precision.json")
    record = disk.read_checked(file) | {"relative_rms_by_layer": [0.1, 1.1]}
    disk.write_checked(file, record)
    store = Store(tmp_path / "r" / "cache")
    with pytest.raises(UserError, match=f"cache clear {file.parent.name}"):
        precision.require_recorded(file.parent.name, store, "x")
    assert call(*words, "--seeds", 2) == 2
    assert call("cache", "clear", file.parent.name, "--results", tmp_path / "r") == 0
    assert not file.exists()
    assert call(*words, "--seeds", 2) == 0
    disk.write_checked(file, {"relative_rms_by_layer": "far"})  # a stranger's: measured anew
    assert call(*words, "--seeds", 3) == 0
