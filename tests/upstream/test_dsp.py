"""upstream/dsp.py: torchaudio 2.11.0's numbers, and its very bits where it loads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from tests.optional import optional
from upstream import dsp

torchaudio = optional("torchaudio")
kaldi = optional("torchaudio.compliance.kaldi")
LENGTHS = (1, 5, 399, 400, 401, 560, 12_345, 16_000)
RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)


def pattern() -> Tensor:
    """4,000 samples that rise in level: integers modulo a prime, the same on every machine."""
    n = torch.arange(4000)
    return (((n * n * 7919) % 2003).float() / 2003 - 0.5) * torch.linspace(0.1, 1, 4000)


def speech() -> list[Tensor]:
    """Real recordings where they are at hand, else nothing."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "speech" / "librispeech_sid"
    files = sorted(folder.rglob("*.flac"))[:10]
    return [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in files]


def close(values: Tensor, expected: list[float], tolerance: float = 2e-5) -> None:
    assert torch.allclose(values, torch.tensor(expected), rtol=0, atol=tolerance), values


@pytest.mark.parametrize(
    ("rate", "places", "expected", "energy"),
    [
        (8000, [0, 1, 2, 3, 1000, 4001, 7999],
         [-0.04918, -0.00667, 0.04454, 0.05242, -0.01659, 0.10641, 0.20915], 226.54293),
        (44100, [0, 1, 2, 3, 700, 1000, 1451],
         [-0.0006, 0.01622, 0.00101, -0.0198, 0.08305, 0.03379, -0.02896], 14.08052),
    ],
)  # fmt: skip
def test_resampling_gives_torchaudios_numbers(
    rate: int, places: list[int], expected: list[float], energy: float
) -> None:
    wav = dsp.resample(pattern(), rate, 16_000)
    assert len(wav) == math.ceil(4000 * 16_000 / rate)
    close(wav[places], expected)
    assert float(wav.double().square().sum()) == pytest.approx(energy, abs=1e-4)


def test_fbank_gives_torchaudios_numbers() -> None:
    bands = dsp.kaldi_fbank(pattern(), 80)
    assert bands.shape == (23, 80)
    close(bands[0, [0, 1, 40, 79]], [-9.08732, -9.0399, -1.56596, 1.6324], 1e-3)
    close(bands[22, [0, 1, 40, 79]], [-6.09271, -4.99912, 2.93026, 5.52962], 1e-3)
    assert float(bands.double().sum()) == pytest.approx(899.96283, abs=0.01)
    slopes = dsp.deltas(bands.T)
    close(slopes[[0, 40, 79], [0, 5, 22]], [0.18003, 0.21323, -0.0641], 1e-3)


def test_mel_bands_and_dct_give_torchaudios_numbers() -> None:
    bank = dsp.mel_filter_bank(257, 40.0, 8000.0, 40, 16_000)
    close(bank[[2, 3, 100, 200, 255], [0, 0, 27, 36, 39]],
          [0.4908, 0.8376, 0.32193, 0.7421, 0.06157])  # fmt: skip
    assert bank.argmax(0)[[0, 10, 39]].tolist() == [3, 23, 240]
    matrix = dsp.dct_matrix(13, 40)
    close(matrix[[0, 3, 39], [0, 1, 12]], [0.15811, 0.21521, 0.19924])
    assert torch.allclose(matrix.T @ matrix, torch.eye(13), atol=1e-6), "orthonormal"


def test_resampling_keeps_a_tone_and_drops_what_would_alias() -> None:
    time = torch.arange(48_000) / 48_000
    low = torch.sin(2 * math.pi * 1000 * time)
    high = torch.sin(2 * math.pi * 12_000 * time)
    heard = dsp.resample(low + high, 48_000, 16_000)[1000:-1000]
    due = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)[1000:-1000]
    assert (heard - due).abs().max() < 5e-3  # 46 dB below, with six zero crossings
    assert torch.equal(dsp.resample(low, 16_000, 16_000), low)


def test_deltas_of_a_ramp_are_its_slope() -> None:
    ramp = torch.arange(20.0)[None] * torch.tensor([[1.0], [-2.0]])
    assert torch.allclose(dsp.deltas(ramp)[:, 2:-2], torch.tensor([[1.0], [-2.0]]).expand(2, 16))


@pytest.mark.parametrize("rate", RATES)
def test_resampling_is_torchaudios_to_the_bit(rate: int) -> None:
    theirs = torchaudio.transforms.Resample(rate, 16_000)
    for wav in (*(torch.randn(2, n) for n in LENGTHS), pattern(), *speech()):
        assert torch.equal(dsp.resample(wav, rate, 16_000), theirs(wav))


@pytest.mark.parametrize("bins", [23, 40, 80])
def test_fbank_and_deltas_are_torchaudios_to_the_bit(bins: int) -> None:
    waves = [*(torch.randn(n) for n in LENGTHS if n >= 400), torch.zeros(2000), *speech()]
    for wav in waves:
        ours = dsp.kaldi_fbank(wav, bins)
        assert torch.equal(ours, kaldi.fbank(wav[None], num_mel_bins=bins, dither=0.0))
        theirs = torchaudio.functional.compute_deltas(ours.T, win_length=5)
        assert torch.equal(dsp.deltas(ours.T), theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: dsp.mel_filter_bank(257, 40.0, 8000.0, 40, 16_000),
         lambda: torchaudio.functional.melscale_fbanks(257, 40.0, 8000.0, 40, 16_000)),
        (lambda: dsp.mel_filter_bank(201, 0.0, 7600.0, 80, 16_000),
         lambda: torchaudio.functional.melscale_fbanks(201, 0.0, 7600.0, 80, 16_000)),
        (lambda: dsp.dct_matrix(13, 40), lambda: torchaudio.functional.create_dct(13, 40, "ortho")),
        (lambda: dsp.dct_matrix(20, 80), lambda: torchaudio.functional.create_dct(20, 80, "ortho")),
    ],
)  # fmt: skip
def test_matrices_are_torchaudios_to_the_bit(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(ours(), theirs())


def test_a_waveform_of_no_whole_window_has_no_frames() -> None:
    assert dsp.kaldi_fbank(torch.randn(399), 80).shape == (0, 80)
    assert np.isfinite(dsp.kaldi_fbank(torch.zeros(400), 80).numpy()).all(), "silence is finite"
