"""`benchmark.py plan` on folders of LibriSpeech's names and numbers, filled with tiny files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.bench.subject import PROJECT, Setup

PARTS = {"train-clean-100": 28_539, "dev-clean": 2_703, "test-clean": 2_620}
CHAPTER = 100  # utterances
MD5 = slice(26, 42)  # where a FLAC file keeps the checksum of its audio


def make_corpus(root: Path, parts: dict[str, int]) -> None:
    """One FLAC of 0.1 s many times, each with another checksum in its header: distinct contents."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, 1600)
    soundfile.write(buffer, noise, 16_000, format="FLAC")
    flac = bytearray(buffer.getvalue())
    count = 0
    for part, size in parts.items():
        for first in range(0, size, CHAPTER):
            speaker = 1000 + first // CHAPTER
            folder = root / part / str(speaker) / "1"
            folder.mkdir(parents=True)
            names = [f"{speaker}-1-{k:04d}" for k in range(min(CHAPTER, size - first))]
            for name in names:
                count += 1
                flac[MD5] = count.to_bytes(16, "big")
                (folder / f"{name}.flac").write_bytes(flac)
            text = "".join(f"{name} A WORD\n" for name in names)
            (folder / f"{speaker}-1.trans.txt").write_text(text)


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds of the whole command, the first and the second time, and how many files it saw."""
    root = setup.work / "LibriSpeech"
    parts = dict.fromkeys(PARTS, 20) if setup.quick else PARTS
    make_corpus(root, parts)
    command = [
        sys.executable, str(PROJECT / "benchmark.py"), "plan", "--upstream", "hubert_demo",
        "--suite", "superb", "--downstream", "asr", "--results", str(setup.work / "plan"),
        "--device", setup.device, "--set", f"corpus.check={str(not setup.quick).lower()}",
    ]  # fmt: skip
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        environment = {**os.environ, "LIBRISPEECH": str(root)}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    return {"files": sum(parts.values()), "first_seconds": seconds[0], "second_seconds": seconds[1]}
