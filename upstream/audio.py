"""Audio files in, 16 kHz mono float32 out. The only place that resamples."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import soundfile

from upstream import mpeg
from upstream.audio_length import wrong_length
from upstream.common import disk
from upstream.common.errors import UserError

if TYPE_CHECKING:  # headers are read without torch, which takes seconds to import
    from torch import Tensor

OVERSHOOT = 0.5  # seconds; segment lists are often rounded up a little past the end of the file
DENSEST = 8192  # samples per byte: more than any codec makes of silence
BLOCK = 1 << 24  # samples read at once: a header that lies allocates no more
LARGEST_KERNEL = 10_000_000  # numbers; 44.1 kHz needs 71 thousand, 44.101 kHz 706 million


class Facts(NamedTuple):
    """What a file is, without decoding it."""

    seconds: float
    channels: int
    rate: int  # Hz


def load(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    channel: int | None = None,
) -> Tensor:
    """Read `path` (seconds `start` to `end`) as [N] float32 at 16 kHz.

    channel: one of them, counted from 0; None: their average. Raises UserError for a missing,
    truncated, empty or non-finite file and one whose header does not say how long it is, naming
    it, and for a part or a channel that the file does not have. An utterance of a few milliseconds
    is legal audio.
    """
    import torch

    from upstream import dsp
    from upstream.base import SAMPLE_RATE

    samples, rate = read(path, start, end)
    if channel is None:
        wav = samples.mean(1)
    else:
        _require_channel(path, samples.shape[1], channel)
        wav = samples[:, channel].clone()
    if not torch.isfinite(wav).all():
        raise UserError(
            f"{path}: holds NaN or infinite samples; write the file again or drop the row"
        )
    if rate == SAMPLE_RATE:
        return wav
    divisor = math.gcd(rate, SAMPLE_RATE)
    if rate // divisor * (SAMPLE_RATE // divisor) > LARGEST_KERNEL:
        raise UserError(
            f"{path}: cannot be resampled from {rate} Hz to {SAMPLE_RATE} Hz, "
            f"they have too small a common divisor ({divisor}); convert it with sox first"
        )
    return dsp.resample(wav, rate, SAMPLE_RATE)


def read(
    path: str | Path, start: float | None = None, end: float | None = None
) -> tuple[Tensor, int]:
    """Samples [N, channels] float32 as they are in the file, and its rate. Raises UserError."""
    import torch

    with _open(path) as file:
        first, last = _part(path, file.frames, file.samplerate, start, end)
        blocks: list[Tensor] = []
        try:
            skip = first
            if first and file.seekable():
                file.seek(first)
                skip = 0
            for place in range(first - skip, last, BLOCK):
                block = file.read(min(BLOCK, last - place), "float32", always_2d=True)
                blocks.append(torch.from_numpy(block))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise UserError(
                f"{path}: truncated or damaged ({_reason(error)}); copy it again"
            ) from error
        rate = file.samplerate
    samples = torch.cat(blocks)[skip:]
    if len(samples) < last - first:
        raise UserError(
            f"{path}: truncated, {len(samples)} of {last - first} samples are there; copy it again"
        )
    return samples, rate


def seconds(path: str | Path, start: float | None = None, end: float | None = None) -> float:
    """Length of a file or of a part of it, without decoding: what `load` gives. Raises UserError.

    It is the header's, once the content bears it out; MP3 frames are counted.
    """
    with _open(path) as file:
        first, last = _part(path, file.frames, file.samplerate, start, end)
        return (last - first) / file.samplerate


def facts(path: str | Path) -> Facts:
    """Length, channels and rate of a whole file, without decoding. Raises UserError."""
    with _open(path) as file:
        _part(path, file.frames, file.samplerate, None, None)
        return Facts(file.frames / file.samplerate, file.channels, file.samplerate)


def require_channel(path: str | Path, channel: int | None) -> None:
    """Raises UserError if the file has no such channel (counted from 0); None: their average."""
    if channel is not None:
        _require_channel(path, facts(path).channels, channel)


def _require_channel(path: str | Path, channels: int, channel: int) -> None:
    if not 0 <= channel < channels:
        last = f"0 to {channels - 1}" if channels > 1 else "only 0"
        raise UserError(f"{path}: has no channel {channel}, {last}; they are counted from 0")


def pad(wavs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N_i] each -> zero-padded [B, N] and their lengths [B] in samples."""
    import torch

    lens = torch.tensor([len(wav) for wav in wavs])
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lens


def _open(path: str | Path) -> soundfile.SoundFile:
    size = disk.require_file(path).st_size
    if size == 0:
        raise UserError(f"{path}: is an empty file (0 bytes); copy it again or drop the row")
    file = _sound(path, os.fsencode(path))
    try:
        if file.format == "MP3":
            return _of_mpeg(path, file)
        fault = ""
        if file.frames > 2**60:  # libsndfile's "unknown": the encoder wrote to a pipe
            fault = "its header does not say how long it is; encode it again to a file"
        elif file.frames > size * DENSEST:
            fault = f"its header claims {file.frames} samples in {size} bytes; encode it again"
        else:
            with open(path, "rb") as content:
                fault = wrong_length(file, content, size)
        if fault:
            raise UserError(f"{path}: {fault}")
    except BaseException:
        file.close()
        raise
    return file


def _sound(path: str | Path, source: bytes | BinaryIO) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(source)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as audio ({_reason(error)})") from error
    except (TypeError, ValueError) as error:  # the name ends in .raw
        raise UserError(f"{path}: does not say its rate and type; convert it to WAV") from error


def _of_mpeg(path: str | Path, file: soundfile.SoundFile) -> soundfile.SoundFile:
    """An MP3 file whose count is right, or the same frames behind one that counts them."""
    data = disk.read(Path(path))
    try:
        found = mpeg.stream(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    claimed, frames = found.claimed, found.frames
    if claimed is None:
        if file.frames == found.length:
            return file
        again = _sound(path, mpeg.counted(data, found))
        file.close()
        return again
    if claimed > frames:
        raise UserError(f"{path}: truncated, {frames} of {claimed} frames are there; copy it again")
    if claimed < frames:
        raise UserError(
            f"{path}: its header says {claimed} frames, but {frames} are there, as if files were "
            "joined; decode it with ffmpeg or sox and write it again"
        )
    return file


def _reason(error: Exception) -> str:
    # error_string leaves out the path, which our line already begins with
    reason = str(getattr(error, "error_string", error))
    return " ".join(reason.split()).removeprefix("Error : ").rstrip(".")


def _part(
    path: str | Path, frames: int, rate: int, start: float | None, end: float | None
) -> tuple[int, int]:
    """First and last sample of the part, in the file's own rate. Raises UserError for no part."""
    if frames == 0:
        raise UserError(f"{path}: holds no audio; drop the row")
    if not (math.isfinite(start or 0.0) and math.isfinite(end or 0.0)):
        raise UserError(f"{path}: has no part from {start} s to {end} s")
    first = 0 if start is None else round(start * rate)
    last = frames if end is None else round(end * rate)
    if first < 0 or last > frames + OVERSHOOT * rate or first >= min(last, frames):
        until = "its end" if end is None else f"{end:g} s"
        raise UserError(
            f"{path}: has no part from {start or 0:g} s to {until}, "
            f"it is {frames / rate:g} s long; start and end are in seconds"
        )
    return first, min(last, frames)
