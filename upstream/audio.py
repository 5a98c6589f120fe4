"""Audio files in, 16 kHz mono float32 out. The only place that resamples."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from upstream import dsp
from upstream.base import SAMPLE_RATE
from upstream.common import disk
from upstream.common.errors import UserError

OVERSHOOT = 0.5  # seconds; segment lists are often rounded up a little past the end of the file
# sox and ffmpeg write this or more as the data size when they write to a pipe
STREAMED = 0x7FFFF000
DENSEST = 8192  # samples per byte: more than any codec makes of silence
BLOCK = 1 << 24  # samples read at once: a header that lies allocates no more
OGG_PAGE = 65_307  # bytes of the largest
# how libsndfile's log tells that a file is shorter than its header says; frames are cut silently
CUT = re.compile(
    r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE
)
LARGEST_KERNEL = 10_000_000  # numbers; 44.1 kHz needs 71 thousand, 44.101 kHz 706 million


def load(path: str | Path, start: float | None = None, end: float | None = None) -> Tensor:
    """Read `path` (seconds `start` to `end`) as [N] float32 at 16 kHz, channels averaged.

    Raises UserError for a missing, truncated, empty or non-finite file, naming it, and for a part
    that lies outside the file. An utterance of a few milliseconds is legal audio.
    """
    with _open(path) as file:
        rate = file.samplerate
        first, last = _part(path, file.frames, rate, start, end)
        blocks: list[Tensor] = []
        try:
            file.seek(first)
            for place in range(first, last, BLOCK):
                samples = file.read(min(BLOCK, last - place), "float32", always_2d=True)
                blocks.append(torch.from_numpy(samples).mean(1))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise UserError(
                f"{path}: truncated or damaged ({_reason(error)}); copy it again"
            ) from error
    wav = torch.cat(blocks)
    if len(wav) < last - first:
        raise UserError(
            f"{path}: truncated, {len(wav)} of {last - first} samples are there; copy it again"
        )
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


def seconds(path: str | Path, start: float | None = None, end: float | None = None) -> float:
    """Length of a file or of a part of it from its header, without decoding. Raises UserError."""
    with _open(path) as file:
        first, last = _part(path, file.frames, file.samplerate, start, end)
        return (last - first) / file.samplerate


def pad(wavs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N_i] each -> zero-padded [B, N] and their lengths [B] in samples."""
    lens = torch.tensor([len(wav) for wav in wavs])
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lens


def _open(path: str | Path) -> soundfile.SoundFile:
    size = disk.require_file(path).st_size
    if size == 0:
        raise UserError(f"{path}: is an empty file (0 bytes); copy it again or drop the row")
    try:
        file = soundfile.SoundFile(os.fsencode(path))
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as audio ({_reason(error)})") from error
    except (TypeError, ValueError) as error:  # the name ends in .raw
        raise UserError(f"{path}: does not say its rate and type; convert it to WAV") from error
    fault = ""
    cut = CUT.search(file.extra_info)
    if file.frames > 2**60:  # libsndfile's "unknown": the encoder wrote to a pipe
        fault = "its header does not say how long it is; encode it again to a file"
    elif file.frames > size * DENSEST:
        fault = f"its header claims {file.frames} samples in {size} bytes; encode it again"
    elif cut and int(cut[2]) < int(cut[1]) < STREAMED:
        fault = f"truncated, {cut[2]} of {cut[1]} bytes of audio are there; copy it again"
    elif file.format == "OGG" and not _ogg_ends(path, size):
        fault = "truncated, its last page does not end the stream; copy it again"
    if fault:
        file.close()
        raise UserError(f"{path}: {fault}")
    return file


def _ogg_ends(path: str | Path, size: int) -> bool:
    """Whether the last page says that it is the last (RFC 3533, section 6), and is whole."""
    with open(path, "rb") as file:
        file.seek(max(0, size - OGG_PAGE))
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return bool(segments) and page[5] & 4 > 0 and len(page) >= 27 + len(segments) + sum(segments)


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
