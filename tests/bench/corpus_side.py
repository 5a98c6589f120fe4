"""`check` of a corpus of many tiny files: CPU seconds the first time, again, and after a kill.

    python -m tests.bench.corpus_side FOLDER [files]

It fills FOLDER with the files (4 KB on disk each), unless they are there, and prints a line of
JSON. The promise: 200,000 files in 30 CPU seconds the first time and 5 again.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from upstream.common import PROJECT

FILES = 200_000
RECIPE = """kind: task
task: classify
corpus: {name: manifest, root: ROOT, target: label}
train: {steps: 20, batch: 12, lr: [1.0e-2], eval_every: 10}
"""


def make(folder: Path, files: int) -> Path:
    """A manifest of `files` WAVs of a twentieth of a second, and its recipe."""
    recipe = folder / "label.yaml"
    if recipe.exists():
        return recipe
    rng = random.Random(0)
    with (folder / "manifest.tsv").open("w") as table:
        table.write("path\tspeaker\tsplit\tlabel\n")
        for number in range(files):
            home = folder / f"{number // 1000:03d}"
            home.mkdir(exist_ok=True)
            data = rng.randbytes(1600 + 32 * (number % 7))
            form = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
            head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form
            head += b"data" + struct.pack("<I", len(data))
            (home / f"{number:06d}.wav").write_bytes(head + data)
            split = ("train", "train", "train", "dev", "test")[number % 5]
            row = (f"{home.name}/{number:06d}.wav", f"s{number % 500}", split, f"l{number % 37}")
            table.write("\t".join(row) + "\n")
    recipe.write_text(RECIPE.replace("ROOT", str(folder)))
    return recipe


def check(recipe: Path, results: Path, kill_after: float | None = None) -> float:
    """CPU seconds of one `check`, which may be killed after so many seconds."""
    words = [sys.executable, "benchmark.py", "check", "--recipe", recipe, "--results", results]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    job = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.DEVNULL)
    if kill_after is not None:
        time.sleep(kill_after)
        job.send_signal(signal.SIGKILL)
    status = job.wait()
    if kill_after is None and status:
        raise SystemExit(f"check ended with {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def main(folder: Path, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe, results = make(folder, files), folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    first = check(recipe, results)
    found = {"files": files, "first_cpu_s": first, "again_cpu_s": check(recipe, results)}
    shutil.rmtree(results)
    check(recipe, results, kill_after=first / 2)
    found["after_kill_cpu_s"] = check(recipe, results)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else FILES)
