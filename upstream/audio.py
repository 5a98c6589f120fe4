"""Audio files in, 16 kHz mono float32 out. The only place that resamples."""

from __future__ import annotations

from pathlib import Path

import soundfile
import torch
import torchaudio.functional
from torch import Tensor

from upstream.base import SAMPLE_RATE
from upstream.errors import UserError


def load(path: str | Path, start: float | None = None, end: float | None = None) -> Tensor:
    """Read `path` (seconds `start` to `end`) as [N] float32 at 16 kHz, channels averaged.

    Raises UserError for a missing, truncated, empty or non-finite file, naming it.
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate, frames = file.samplerate, file.frames
            first = round((start or 0.0) * rate)
            last = frames if end is None else min(frames, round(end * rate))
            file.seek(min(first, frames))
            samples = file.read(max(0, last - first), dtype="float32", always_2d=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such audio file") from error
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        if not Path(path).exists():
            raise UserError(f"{path}: no such audio file") from error
        raise UserError(f"{path}: cannot be read as audio ({error})") from error
    if len(samples) < last - first:
        raise UserError(
            f"{path}: truncated, {len(samples)} of {last - first} samples could be read; copy it again"
        )
    if len(samples) == 0:
        raise UserError(f"{path}: no audio between {start or 0} s and {end or 'the end'}; drop the row")
    wav = torch.from_numpy(samples).mean(1)
    if not torch.isfinite(wav).all():
        raise UserError(f"{path}: holds NaN or infinite samples")
    if rate != SAMPLE_RATE:
        wav = torchaudio.functional.resample(wav, rate, SAMPLE_RATE)
    return wav


def seconds(path: str | Path, start: float | None = None, end: float | None = None) -> float:
    """Length of a file or of a part of it from its header, without decoding. Raises UserError."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        fault = "cannot be read as audio" if Path(path).exists() else "no such audio file"
        raise UserError(f"{path}: {fault}") from error
    whole = info.frames / info.samplerate
    return max(0.0, min(whole, end if end is not None else whole) - (start or 0.0))


def pad(wavs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N_i] each -> zero-padded [B, N] and their lengths [B] in samples."""
    lens = torch.tensor([len(wav) for wav in wavs])
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lens
