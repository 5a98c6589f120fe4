"""Seconds that long tables take: an index of 150,000 audio files, 200,000 turns of an RTTM file.

`python -m tests.bench.tables` prints them. The tests of the default run count calls instead: those
do not depend on how busy a machine is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from downstream.corpora import rttm
from upstream.common import disk
from upstream.features import clips


def measure(files: int = 150_000, turns: int = 200_000) -> dict[str, float]:
    """CPU seconds by table."""
    row = clips._Row("123456 1700000000000000000 1700000000000000000 123", 4.5, "0" * 16)
    rows = {f"/data/corpus/speaker-{n:06d}/utterance.flac": row for n in range(files)}
    with tempfile.TemporaryDirectory() as folder:
        index, annotation = Path(folder, "files.json"), Path(folder, "all.rttm")
        lines = (f"SPEAKER d 1 {n / 2} 0.4 <NA> <NA> s{n % 7} <NA> <NA>\n" for n in range(turns))
        annotation.write_text("".join(lines))
        return {
            "index, written": _seconds(lambda: disk.write_checked(index, rows)),
            "index, read": _seconds(lambda: clips._load(index)),
            "RTTM, read": _seconds(lambda: rttm.merged(rttm._recordings([annotation])["d"])),
        }


def _seconds(act: Callable[[], object]) -> float:
    begun = time.process_time()
    act()
    return time.process_time() - begun


if __name__ == "__main__":
    for what, seconds in measure().items():
        print(f"{what}: {seconds:.2f} s")
