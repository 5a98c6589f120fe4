"""Whether frames are worth their disk: how fast they are read back, and how fast computed anew.

On a CPU reading wins by orders of magnitude, and nothing is measured. On a GPU the encoder may be
faster than the disk; then decoding audio bounds it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from upstream.base import SAMPLE_RATE, Upstream
from upstream.common import disk
from upstream.features.ahead import AHEAD
from upstream.features.clips import Clip
from upstream.features.forward import forward

PROBE = 60.0  # seconds of audio that are decoded, and in a batch of the encoder
SAMPLE = 256 << 20  # bytes that the disk is tried with


class Speeds(NamedTuple):
    """Of one upstream, device and disk."""

    encoder: float  # seconds of audio in a second
    decoder: float  # the same, by as many threads as read ahead
    disk: float  # bytes in a second, read past the operating system's cache

    def pays(self, rate: float, times: float) -> bool:
        """Whether frames of `rate` bytes for a second of audio, heard so often, are to be kept.

        Kept, they are computed once, written and read each time; else computed each time. Writing
        is taken to be as fast as reading.
        """
        anew = max(1 / self.encoder, 1 / self.decoder)
        return anew + rate / self.disk * (1 + times) <= anew * times

    def told(self, rate: float, times: float) -> str:
        """What was weighed, in words."""
        return (
            f"a second of audio is read in {1000 * rate / self.disk:.2g} ms, encoded in "
            f"{1000 / self.encoder:.2g} and decoded in {1000 / self.decoder:.2g}, and heard "
            f"{times:.0f} times"
        )


def measure(upstream: Upstream, clips: Sequence[Clip], root: Path, batch_seconds: float) -> Speeds:
    """On the device where the upstream is; once for each size of upstream in this process."""
    parameters = sum(p.numel() for p in upstream.parameters())
    device = next((p.device for p in upstream.parameters()), torch.device("cpu"))
    key = (type(upstream), parameters, str(device), str(root))
    if key not in _measured:
        few, seconds = list[Clip](), 0.0
        for clip in clips:
            few.append(clip)
            seconds += clip.seconds
            if seconds >= PROBE:
                break
        with ThreadPoolExecutor(AHEAD) as pool:
            decoding = _seconds(lambda: list(pool.map(Clip.load, few)), "cpu")
        wavs = [torch.randn(10 * SAMPLE_RATE) for _ in range(max(1, round(batch_seconds / 10)))]
        forward(upstream, wavs)  # warms up, and finds the size that fits
        encoding = _seconds(lambda: forward(upstream, wavs), device.type)
        _measured[key] = Speeds(10 * len(wavs) / encoding, seconds / decoding, _disk(root))
    return _measured[key]


_measured: dict[Any, Speeds] = {}


def _seconds(act: Callable[[], object], device: str) -> float:
    begun = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return max(1e-9, time.perf_counter() - begun)


def _disk(root: Path) -> float:
    """Bytes in a second that come back from a file whose pages were dropped, where that works."""
    content = os.urandom(1 << 20)
    with disk.removed(root) as place:
        with place.open("wb") as file:
            for _ in range(SAMPLE >> 20):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # Linux
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        with place.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
        return SAMPLE / (time.perf_counter() - begun)
