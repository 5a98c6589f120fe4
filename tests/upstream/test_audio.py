"""Audio in: every kind of file a corpus may hold, and one clear line for each that is broken."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy
import pytest
import soundfile
import torch

from upstream import audio
from upstream.common.errors import UserError


def tone(rate: int, seconds: float = 1.0, hertz: float = 1000.0) -> numpy.ndarray:
    times = numpy.arange(round(rate * seconds)) / rate
    return (0.5 * numpy.sin(2 * math.pi * hertz * times)).astype(numpy.float32)


def refused(path: Path, *parts: str, start: float | None = None, end: float | None = None) -> None:
    """Loading raises one line that begins with the path and holds all of `parts`."""
    with pytest.raises(UserError) as caught:
        audio.load(path, start, end)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{path}: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("name", "subtype", "step"),
    [
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "FLOAT", 0),
        ("a.flac", "PCM_16", 2**-15),
    ],
)
def test_samples_come_back(tmp_path: Path, name: str, subtype: str, step: float) -> None:
    wave = tone(16000)
    soundfile.write(tmp_path / name, wave, 16000, subtype=subtype)
    loaded = audio.load(tmp_path / name)
    assert loaded.shape == (16000,) and loaded.dtype == torch.float32
    assert (loaded - torch.from_numpy(wave)).abs().max() <= step


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = tone(16000)
    soundfile.write(tmp_path / "a.wav", numpy.stack([left, 0 * left], 1), 16000, subtype="FLOAT")
    torch.testing.assert_close(audio.load(tmp_path / "a.wav"), torch.from_numpy(left) / 2)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_tone_stays_a_tone(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
    loaded = audio.load(tmp_path / "a.wav")
    assert loaded.shape == (16000,)
    # same frequency, amplitude and phase; the filter has no past and no future at the two ends
    inner = slice(200, -200)
    expected = torch.from_numpy(tone(16000))
    assert (loaded - expected)[inner].abs().max() < 2e-3


def test_resampling_does_not_fold_a_high_tone_back(tmp_path: Path) -> None:
    # 12 kHz cannot be at 16 kHz; a careless resampler turns it into 4 kHz
    soundfile.write(tmp_path / "a.wav", tone(48000, hertz=12000), 48000, subtype="FLOAT")
    assert audio.load(tmp_path / "a.wav")[200:-200].abs().max() < 5e-3


def test_a_rate_without_a_common_divisor_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(44100), 44101)
    refused(tmp_path / "a.wav", "44101 Hz", "sox")


def test_five_milliseconds_are_legal(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16000, 0.005), 16000)
    assert audio.load(tmp_path / "a.wav").shape == (80,)


@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_part_is_the_same_as_a_slice(tmp_path: Path, rate: int) -> None:
    wave = tone(rate, 2.0, 300)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", wave[rate // 2 : rate], rate, subtype="FLOAT")
    part = audio.load(tmp_path / "a.wav", 0.5, 1.0)
    assert torch.equal(part, audio.load(tmp_path / "b.wav"))
    assert audio.seconds(tmp_path / "a.wav", 0.5, 1.0) == 0.5
    assert audio.load(tmp_path / "a.wav", start=1.5).shape == (8000,)
    assert audio.load(tmp_path / "a.wav", end=0.25).shape == (4000,)


def test_an_end_is_forgiven_a_rounding_but_not_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000), 16000)
    assert audio.load(path, 0.5, 1.02).shape == (8000,)
    assert audio.seconds(path, 0.5, 1.02) == 0.5
    refused(path, "from 0 s to 500 s", "1 s long", end=500)
    refused(path, "from 1.5 s to its end", start=1.5)
    refused(path, "from 0.7 s to 0.2 s", start=0.7, end=0.2)
    refused(path, "from -1 s", start=-1)
    refused(path, "from nan s", start=math.nan)
    refused(path, "to inf s", end=math.inf)
    with pytest.raises(UserError, match="1 s long"):
        audio.seconds(path, 0, 500)


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    refused(tmp_path / "a.wav", "no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "b.wav").touch()
    refused(tmp_path / "b.wav", "0 bytes")
    soundfile.write(tmp_path / "c.wav", tone(16000)[:0], 16000)
    refused(tmp_path / "c.wav", "holds no audio")


def test_text_by_the_name_of_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    refused(tmp_path / "a.wav", "cannot be read as audio")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.aiff", "a.au", "a.w64", "a.rf64"])
def test_half_a_file_is_truncated(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    soundfile.write(path, tone(16000), 16000)
    assert len(audio.load(path)) >= 16000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "truncated", "copy it again")


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_cut_anywhere_is_truncated(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(16000, 3.0), 16000, subtype=codec)
    assert len(audio.load(path)) >= 48000
    whole = path.read_bytes()
    last = whole.rindex(b"OggS")
    for cut in (last, last + 5, last + 26, last + 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, "truncated")


def test_a_header_that_lies_allocates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STREAMINFO has 36 bits for the number of samples: 256 GB of float32."""
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(16000), 16000)
    whole = path.read_bytes()
    path.write_bytes(whole[:21] + bytes([whole[21] | 0x0F]) + b"\xff" * 4 + whole[26:])
    refused(path, "its header claims 68719476735 samples")
    with pytest.raises(UserError, match="its header claims"):
        audio.seconds(path)
    path.write_bytes(whole[:21] + bytes([whole[21] & 0xF0]) + struct.pack(">I", 10**7) + whole[26:])
    monkeypatch.setattr(audio, "BLOCK", 4096)  # reads no further than what is there
    refused(path, "truncated")


def test_what_is_no_file_or_no_name_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    refused(tmp_path / "a.wav", "is a pipe or a device")
    refused(Path("/dev/zero"), "is a pipe or a device")
    for name in ("a\0.wav", "\ud800.wav"):
        with pytest.raises(UserError, match="cannot be a file's name") as caught:
            audio.load(name)
        str(caught.value).encode()
    (tmp_path / "a.raw").write_bytes(bytes(3200))
    refused(tmp_path / "a.raw", "convert it to WAV")


def test_a_name_that_is_not_utf8_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xe9t\xe9.wav")
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    (tmp_path / "a.wav").rename(path)
    assert audio.load(path).shape == (16000,)


def test_blocks_are_one_wave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, numpy.stack([tone(16000), tone(16000, hertz=300)], 1), 16000)
    expected = audio.load(path, 0.1, 0.9)
    monkeypatch.setattr(audio, "BLOCK", 1000)
    assert torch.equal(audio.load(path, 0.1, 0.9), expected)


def test_a_wav_from_a_pipe_is_whole(tmp_path: Path) -> None:
    """sox and ffmpeg cannot go back to write the size: it is not truncated, but unknown."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    for size in (0xFFFFFFFF, 0x7FFFF000):
        struct.pack_into("<I", data, data.index(b"data") + 4, size)
        path.write_bytes(data)
        assert audio.load(path).shape == (16000,)


def test_a_flac_from_a_pipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the 36 bits that hold the number of samples in STREAMINFO
    data[22:26] = bytes(4)
    path.write_bytes(data)
    refused(path, "how long it is")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    wave = tone(16000)
    wave[123] = bad
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    refused(tmp_path / "a.wav", "NaN")


def test_pad() -> None:
    wavs, lens = audio.pad([torch.ones(3), torch.ones(5)])
    assert wavs.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] and lens.tolist() == [3, 5]
