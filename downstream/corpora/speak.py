"""Speech from eSpeak NG: text to samples and phones (ctypes), then a room and a microphone.

Run as a module it is the worker of `synthetic.py`: a JSON list of `Line`s on stdin, one audio file
per line on disk, their phones as JSON on stdout. The engine carries phase and noise from one
utterance into the next and nothing in its interface resets them, so "same request, same samples"
holds for a whole process that speaks the same lines in the same order, and only there.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.fft import next_fast_len

from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.packages import reason, repair_command, require_package

RATE = 16_000  # Hz, of the files
ENGINE_RATE = 22_050  # Hz, what eSpeak NG returns
LEVEL = 0.06  # RMS of an utterance before its gain, full scale = 1

# numbers of espeak-ng/speak_lib.h
_SYNCHRONOUS, _PHONEME_EVENTS, _IPA_NAMES, _DONT_EXIT = 2, 1, 2, 0x8000
_SPEED, _PITCH, _RANGE = 1, 3, 4
_UTF8, _BY_CHARACTER, _PHONEME, _END_OF_LIST = 1, 1, 7, 0


class Line(NamedTuple):
    """One utterance to record: what is said, by which voice, and how."""

    path: str
    text: str
    voice: str  # an eSpeak NG accent and variant, "en-us+f3"
    pitch: float  # 0 to 100
    range: float  # 0 to 100
    rate: float  # words per minute
    tract: float  # vocal-tract scale: above 1 the formants move up
    tilt: float  # dB between 200 Hz and 6 kHz, added
    gain: float  # dB
    seed: list[int]  # of the room, the microphone and the noise


class _Event(ctypes.Structure):
    """espeak_EVENT; the name of a phone is its id."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("places", ctypes.c_int * 5),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@functools.cache
def engine() -> ctypes.CDLL:
    """eSpeak NG, started once per process. Raises UserError with the line to type if missing."""
    loader = require_package("espeakng_loader")
    try:
        library = ctypes.CDLL(loader.get_library_path())
        data = loader.get_data_path().encode()
    except Exception as error:  # the library is not there, or not for this machine
        fault = f"eSpeak NG does not load ({reason(error)}): {repair_command('espeakng_loader')}"
        raise UserError(fault) from error
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
        ctypes.c_uint, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p,
    ]  # fmt: skip
    options = _PHONEME_EVENTS | _IPA_NAMES | _DONT_EXIT
    if library.espeak_Initialize(_SYNCHRONOUS, 0, data, options) != ENGINE_RATE:
        raise UserError(f"eSpeak NG did not start: {repair_command('espeakng_loader')}")
    return library


def say(
    text: str, voice: str, *, pitch: float = 50, range: float = 50, rate: float = 175
) -> tuple[np.ndarray, list[str]]:
    """Speak `text`: samples [N] float32 at ENGINE_RATE, and the phones the engine realised.

    Phones are IPA without stress marks, in the accent of the voice. Raises UserError for an
    unknown voice.
    """
    library = engine()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise UserError(f"eSpeak NG has no voice {voice!r}")
    for parameter, value in ((_SPEED, rate), (_PITCH, pitch), (_RANGE, range)):
        library.espeak_SetParameter(parameter, round(value), 0)
    chunks: list[np.ndarray] = [np.zeros(0, np.float32)]
    phones: list[str] = []

    def collect(wave: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if wave and count:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).astype(np.float32) / 32768)
        index = 0
        while events[index].type != _END_OF_LIST:
            if events[index].type == _PHONEME:
                phones.append(events[index].name.decode("utf-8", "ignore").strip("ˈˌ"))
            index += 1
        return 0

    callback, raw = _Callback(collect), text.encode()
    library.espeak_SetSynthCallback(callback)
    library.espeak_Synth(raw, len(raw) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
    return np.concatenate(chunks), [phone for phone in phones if phone]  # "" is a pause


def _curve(frequency: np.ndarray, knots: np.ndarray, decibels: np.ndarray) -> np.ndarray:
    """Amplitude at each `frequency` (Hz), decibels interpolated over log frequency."""
    shape = np.interp(np.log(np.maximum(frequency, 1.0)), np.log(knots), decibels)
    return 10 ** (shape / 20)


def record(line: Line) -> tuple[np.ndarray, list[str]]:
    """Speak `line` and put it in a room: [N] float32 at RATE, and its phones.

    All in one pass through the frequency domain: vocal-tract scaling (resampling, so the rate is
    set against it first), a random equaliser (±6 dB), reverberation for 7 utterances in 10
    (RT60 50 to 300 ms); then coloured noise at 8 to 25 dB SNR, and the gain.
    """
    rng = np.random.default_rng(line.seed)
    dry, phones = say(
        line.text, line.voice, pitch=line.pitch, range=line.range, rate=line.rate / line.tract
    )
    ratio = RATE / (ENGINE_RATE * line.tract)
    length = round(len(dry) * ratio)
    # room for the tail of the reverberation, which would wrap around; both lengths are ones that
    # the FFT is quick at, which moves the vocal tract by a fraction of a percent
    padded = next_fast_len(length + RATE // 3, real=True)
    before = next_fast_len(round(padded / ratio), real=True)
    spectrum = np.fft.rfft(dry, before)
    bins = padded // 2 + 1
    spectrum = np.pad(spectrum[:bins], (0, max(0, bins - len(spectrum))))
    frequency = np.linspace(0, RATE / 2, bins)
    knots = np.geomspace(100, 7000, 8)
    spectrum *= _curve(frequency, knots, rng.uniform(-6, 6, len(knots)))
    spectrum *= _curve(frequency, np.array([200.0, 6000.0]), np.array([-0.5, 0.5]) * line.tilt)
    if rng.random() < 0.7:
        rt60 = rng.uniform(0.05, 0.3)  # seconds
        time = np.arange(round(rt60 * RATE)) / RATE
        tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
        tail *= rng.uniform(0.2, 0.7) / np.sqrt((tail**2).sum())
        tail[0] = 1.0  # the direct path
        spectrum *= np.fft.rfft(tail, padded)
    wav = np.fft.irfft(spectrum, padded)[:length]
    wav *= LEVEL / np.sqrt((wav**2).mean())

    hiss = np.fft.rfft(rng.standard_normal(padded))
    noise = np.fft.irfft(hiss / np.maximum(frequency, 50) ** rng.uniform(0, 1), padded)[:length]
    noise *= LEVEL / np.sqrt((noise**2).mean()) * 10 ** (-rng.uniform(8, 25) / 20)
    wav = (wav + noise) * 10 ** (line.gain / 20)
    return np.clip(wav, -1, 1).astype(np.float32), phones


def main() -> None:
    """Record every line of stdin; a file appears only when it is whole."""
    spoken = []
    for line in (Line(*fields) for fields in json.load(sys.stdin)):
        wav, phones = record(line)
        with disk.whole(Path(line.path)) as part:
            soundfile.write(part, wav, RATE, subtype="PCM_16", format="FLAC")
        spoken.append(phones)
    json.dump(spoken, sys.stdout, ensure_ascii=False)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
