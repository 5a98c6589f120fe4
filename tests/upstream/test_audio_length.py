"""A header's count of samples is borne out by what follows, too large or too small, or refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy
import pytest
import soundfile
import torch

from upstream import audio, mpeg
from upstream.common.errors import UserError

RATE = 16_000
DELAY = 529  # samples that a decoder of MP3 is late, which libsndfile removes


def speech(seconds: float = 6.0, rate: int = RATE, seed: int = 0) -> numpy.ndarray:
    """Noise that comes and goes, so that variable rates vary."""
    rng = numpy.random.default_rng(seed)
    times = numpy.arange(round(rate * seconds)) / rate
    wave = 0.3 * numpy.sin(2 * numpy.pi * 440 * times) * (numpy.sin(times * 2) > 0.3)
    noise = 0.1 * rng.standard_normal(len(times)) * (numpy.sin(times * 1.3) > 0.6)
    return (wave + noise).astype(numpy.float32)


def agree(path: Path, samples: int, rate: int = RATE) -> torch.Tensor:
    """load and seconds both give all samples, and so do parts."""
    loaded = audio.load(path)
    assert len(loaded) == samples == round(audio.seconds(path) * rate), path
    last = samples / rate - 0.25
    part, same = audio.load(path, last), loaded[round(last * rate) :]
    if path.suffix == ".mp3":  # a decoder that is put into the middle lacks what came before
        torch.testing.assert_close(part[1200:], same[1200:], atol=1e-3, rtol=0)
    else:
        assert torch.equal(part, same)
    return loaded


def refused(path: Path, *words: str) -> None:
    """By load, seconds and facts, in the same line."""
    lines = set()
    for look in (audio.load, audio.seconds, audio.facts):
        with pytest.raises(UserError) as caught:
            look(path)  # type: ignore[operator]
        lines.add(str(caught.value))
    (line,) = lines
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert all(word in line for word in words), line


def mp3(path: Path, mode: str, level: float, wave: numpy.ndarray | None = None) -> bytes:
    soundfile.write(
        path, speech() if wave is None else wave, RATE, format="MP3",
        subtype="MPEG_LAYER_III", bitrate_mode=mode, compression_level=level,
    )  # fmt: skip
    return path.read_bytes()


ENCODINGS = [
    ("CONSTANT", 0.0), ("CONSTANT", 0.6), ("AVERAGE", 0.3), ("VARIABLE", 0.0), ("VARIABLE", 0.7),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "level"), ENCODINGS)
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_without_a_count_is_heard_to_its_end(
    tmp_path: Path, mode: str, level: float, channels: int
) -> None:
    path = tmp_path / "a.mp3"
    wave = speech()
    data = mp3(path, mode, level, numpy.stack([wave] * channels, 1))
    whole = agree(path, len(wave))
    first = mpeg.frame(struct.unpack(">I", data[:4])[0])
    assert first and data[first.xing : first.xing + 4] in (b"Xing", b"Info")
    frames = mpeg.stream(data).frames
    for bare in (data[first.size :], b"ID3\4\0\0\0\0\0\x14" + bytes(20) + data[first.size :]):
        path.write_bytes(bare)
        # at a constant rate without tags libsndfile's estimate is right, and removes no delay
        estimated = mode == "CONSTANT" and bare[:3] != b"ID3"
        heard = agree(path, frames * 576 - (0 if estimated else DELAY))
        # an encoder's delay stands before it, which only the tag says how to remove
        lag = int(len(heard) - len(whole))
        best = max(
            float(torch.corrcoef(torch.stack([heard[k : k + 80_000], whole[:80_000]]))[0, 1])
            for k in range(max(0, lag - 1400), lag + 1)
        )
        assert best > 0.999


def test_mp3_that_lost_its_end_is_truncated_and_joined_ones_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    data = mp3(path, "VARIABLE", 0.5)
    first = mpeg.frame(struct.unpack(">I", data[:4])[0])
    assert first
    path.write_bytes(data[: len(data) * 2 // 3])
    refused(path, "truncated")
    path.write_bytes(data[first.size : len(data) - 7])
    refused(path, "truncated", "last frame")
    path.write_bytes(data + data[first.size :])
    refused(path, "joined")
    path.write_bytes(data + b"TAG" + bytes(125))
    agree(path, len(speech()))
    path.write_bytes(data[first.size :] + b"APETAGEX" + bytes(40))
    agree(path, mpeg.stream(data).length - DELAY)
    path.write_bytes(data[first.size :] + data[first.size :])
    agree(path, 2 * mpeg.stream(data).length - DELAY)
    path.write_bytes(data[: len(data) // 2] + bytes(999) + data[len(data) // 2 :])
    refused(path, "damaged")
    other = tmp_path / "b.mp3"
    soundfile.write(other, speech(), 24_000, format="MP3")
    path.write_bytes(data[first.size :] + other.read_bytes())
    refused(path, "changes its sampling rate")


def patched(path: Path, marker: bytes, offset: int, form: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(marker) + offset, value)
    other = path.with_name(f"patched{path.suffix}")
    other.write_bytes(data)
    return other


HEADERS = {  # where a container has the bytes or samples of its audio
    "a.wav": (b"data", 4, "<I"),
    "a.aiff": (b"SSND", 4, ">I"),
    "a.au": (b".snd", 8, ">I"),
    "a.w64": (b"data", 16, "<Q"),
    "a.caf": (b"data", 4, ">Q"),
}


@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW", "FLOAT"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_size_that_is_wrong_is_refused(tmp_path: Path, name: str, subtype: str) -> None:
    path, wave = tmp_path / name, speech(1.0)
    soundfile.write(path, wave, RATE, subtype=subtype)
    agree(path, len(wave))
    marker, offset, form = HEADERS[name]
    (right,) = struct.unpack_from(form, path.read_bytes(), path.read_bytes().index(marker) + offset)
    for wrong in (right - 2, 100, 1000, right // 2 // 8 * 8, right + 800, right * 3):
        if wrong == right - 2 and name != "a.au":
            continue  # chunks end at even places: it may be the filling
        refused(patched(path, marker, offset, form, wrong))


def test_what_came_through_a_pipe_is_whole(tmp_path: Path) -> None:
    wave = speech(1.0)
    for name, sizes in (("a.wav", (0xFFFFFFFF, 0x7FFFF000)), ("a.au", (0xFFFFFFFF,))):
        soundfile.write(tmp_path / name, wave, RATE)
        for size in sizes:
            agree(patched(tmp_path / name, *HEADERS[name], size), len(wave))


def test_chunks_behind_the_audio_are_no_audio(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, speech(1.0), RATE)
    data = path.read_bytes()
    tag = b"LIST" + struct.pack("<I", 10) + b"INFOabcdef"
    for behind in (tag, tag + tag, tag[:9], b"id3 " + struct.pack("<I", 5) + bytes(6), bytes(512)):
        path.write_bytes(data + behind)
        agree(path, RATE)
    soundfile.write(path, speech(1.0)[:-1], RATE, subtype="PCM_U8")  # an odd size
    data = path.read_bytes()
    for behind in (b"", tag, b"\0" * (len(data) % 2) + tag):
        path.write_bytes(data + behind)
        agree(path, RATE - 1)
    path.write_bytes(data + bytes(9000))
    refused(path, "the size is wrong")
    path.write_bytes(data + data)
    with pytest.raises(UserError):
        audio.load(path)


@pytest.mark.parametrize("name", ["a.rf64", "a.nist", "a.wavex"])
def test_other_containers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    soundfile.write(path, speech(1.0), RATE, format=name[2:].upper())
    agree(path, RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "truncated")
    path.write_bytes(data + speech(1.0).tobytes())
    refused(path)
    if name == "a.nist":
        for count in (b"00100", b"99999"):
            path.write_bytes(data.replace(b"count -i 16000", b"count -i " + count))
            refused(path)


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "MS_ADPCM", "G721_32", "NMS_ADPCM_24"])
def test_codecs_of_blocks_in_wav(tmp_path: Path, subtype: str) -> None:
    """Some of them cannot be sought in: they are read from their beginning."""
    path = tmp_path / "a.wav"
    soundfile.write(path, speech(1.0, 8000), 8000, subtype=subtype)
    samples, rate = audio.read(path)
    assert rate == 8000 and len(samples) == round(8000 * audio.seconds(path)) >= 8000
    assert torch.equal(audio.read(path, 0.5, 0.75)[0], samples[4000:6000])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "truncated")


def test_flac_counts(tmp_path: Path) -> None:
    one, two, joined = (tmp_path / f"{name}.flac" for name in ("one", "two", "joined"))
    for channels in (1, 2):
        soundfile.write(one, numpy.stack([speech(3.0)] * channels, 1), RATE)
        soundfile.write(two, numpy.stack([speech(3.0, seed=1)] * channels, 1), RATE)
        agree(one, 3 * RATE)
        joined.write_bytes(one.read_bytes() + two.read_bytes())
        refused(joined, "joined")
        data = bytearray(one.read_bytes())
        for wrong in (100, 8192, 3 * RATE - 1, 3 * RATE + 1, 9 * RATE):
            struct.pack_into(">I", data, 22, wrong)
            joined.write_bytes(data)
            refused(joined)
    joined.write_bytes(one.read_bytes() + b"TAG" + bytes(125))
    agree(joined, 3 * RATE)


@pytest.mark.parametrize("samples", [1, 100, 4095, 4096, 4097, 8192, 40_000])
def test_flac_of_any_length_is_whole(tmp_path: Path, samples: int) -> None:
    path = tmp_path / "a.flac"
    for wave in (numpy.zeros(samples), speech(3.0)[:samples]):
        soundfile.write(path, wave, RATE, subtype="PCM_24")
        assert len(audio.load(path)) == samples == round(audio.seconds(path) * RATE)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_pages(tmp_path: Path, codec: str) -> None:
    one, joined = tmp_path / "one.ogg", tmp_path / "joined.ogg"
    soundfile.write(one, speech(6.0), RATE, format="OGG", subtype=codec)
    agree(one, 6 * RATE)
    data = one.read_bytes()
    joined.write_bytes(data + data)
    refused(joined, "joined")
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    assert len(pages) > 4
    joined.write_bytes(b"".join(pages[:3] + pages[4:]))
    refused(joined, "missing")


def test_no_channel_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    left, right = speech(1.0), speech(1.0, seed=1)
    soundfile.write(path, numpy.stack([left, right], 1), RATE, subtype="FLOAT")
    assert torch.equal(audio.load(path, channel=0), torch.from_numpy(left))
    assert torch.equal(audio.load(path, 0.5, channel=1), torch.from_numpy(right)[8000:])
    assert audio.facts(path) == (1.0, 2, RATE)
    for channel in (2, -1):
        with pytest.raises(UserError, match=r"has no channel .*, 0 to 1"):
            audio.load(path, channel=channel)
