"""`benchmark.py merge` of two HuBERT Base folders against copying their weights."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bench.subject import Setup

TRIALS = 3
MOVED = 0.002  # a tenth of the weights' deviation: a light fine-tuning
SAMPLING = 0.002  # seconds


def fine_tuned(base: Path, folder: Path) -> Path:
    """A copy of an HF folder with all weights behind the CNN moved a little."""
    shutil.copytree(base, folder)
    rng = torch.Generator().manual_seed(0)
    state = {
        name: t
        if name.startswith("feature_extractor.")
        else t + MOVED * torch.randn(t.shape, generator=rng)
        for name, t in load_file(base / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds of copying both files and of merging them, the best of turns; and memory in MB.

    The merge is all that the command does after its imports: digests, effective alpha and card
    included. Memory is anonymous (not mapped files), before a merge and at its peak.
    """
    from merging.merged import write
    from merging.recipe import recipe_of

    setup.prepare()
    base = setup.work / "encoder"
    tuned, output = fine_tuned(base, setup.work / "tuned"), setup.work / "merged"
    plan = recipe_of(str(base), [str(tuned)], None, {"alpha": 0.25})
    sources = [folder / "model.safetensors" for folder in (base, tuned)]

    def copy() -> None:
        output.mkdir()
        for number, source in enumerate(sources):
            shutil.copyfile(source, output / str(number))

    def merge() -> None:
        write(plan, Path(), output, setup.work)

    copying, merging = [], []
    for _ in range(TRIALS):
        copying.append(_seconds(copy, output))
        merging.append(_seconds(merge, output))
    before = _anonymous()
    with _peak() as most:
        _seconds(merge, output)
    return {
        "copy_seconds": min(copying),
        "merge_seconds": min(merging),
        "file_mb": sources[0].stat().st_size / 1e6,
        "before_mb": before,
        "peak_mb": max(most),
    }


def _seconds(act: Callable[[], None], output: Path) -> float:
    """Of writing to a new folder, with nothing left to write from before."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Samples of this process's anonymous memory, taken while the body runs."""
    found, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING):
            found.append(_anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        done.set()
        watching.join()


def _anonymous() -> float:
    """MB of this process that are no mapped file (Linux; NaN elsewhere)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    sizes = [float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")]
    return sizes[0] if sizes else float("nan")
