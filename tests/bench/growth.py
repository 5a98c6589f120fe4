"""How a run grows with its corpus: time, memory and disk of 1, 10, 100 hours of audio.

The whole command (`benchmark.py --upstream ... --suite ...`) in processes of its own, on FLAC files
of real speech whose headers differ, through a tiny encoder: what is measured is all around the
encoder, decoding included. Tasks: labels on time means, transcripts on frames; few training steps.

`python -m tests.bench.growth 1 10 100 --workers 1 2` prints a table; `make bench` measures less.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from tests.bench.plan_side import MD5
from tests.bench.subject import PROJECT, SPEECH, Setup

FOLDER = 1000  # files in one
SPEAKERS = 40
RECIPES = {
    "means": """kind: task
task: classify
corpus: {name: manifest, root: $CORPUS, target: speaker, dev: 0.02, test: 0.02}
train: {steps: 100, batch: 32, lr: [1.0e-3, 1.0e-2], eval_every: 100, seeds: 1}
""",
    "frames": """kind: task
task: asr
tokens: superb
head: {hidden: 32, projector: 32}
corpus: {name: manifest, root: $CORPUS, target: text, dev: 0.01, test: 0.01}
train: {steps: 20, batch: 16, lr: [1.0e-3], eval_every: 20, seeds: 1}
""",
}
PARTS = {"means": ["means"], "both": ["means", "frames"]}  # what is measured: which tasks
TINY: dict[str, Any] = {
    "conv_dim": [16] * 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16,
}  # fmt: skip


class Point(NamedTuple):
    """One run of the whole command."""

    tasks: str
    hours: float
    workers: int
    seconds: float
    cpu_seconds: float
    peak_gb: float  # the largest process
    disk_gb: float  # all that the run wrote
    again_seconds: float  # the same command once more: nothing left to do


def make_corpus(root: Path, hours: float, utterances: Path) -> float:
    """FLAC files of real utterances, every one with another checksum in its header. Hours made."""
    sources = sorted(utterances.glob("*.flac"))
    contents = [bytearray(path.read_bytes()) for path in sources]
    lengths = [soundfile.info(path).duration for path in sources]
    rows, made, count = ["path\tspeaker\ttext"], 0.0, 0
    while made < hours * 3600:
        flac, seconds = contents[count % len(sources)], lengths[count % len(sources)]
        flac[MD5] = (count + 1).to_bytes(16, "big")
        place = root / str(count // FOLDER) / f"{count}.flac"
        if count % FOLDER == 0:
            place.parent.mkdir(parents=True)
        place.write_bytes(flac)
        rows.append(
            f"{place.relative_to(root)}\t{count % SPEAKERS}\tA WORD OF {'ABCDEFG'[count % 7]}"
        )
        made, count = made + seconds, count + 1
    (root / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return made / 3600


def write_encoder(folder: Path) -> None:
    """A HuBERT as small as it works, with random weights."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.HubertModel(transformers.HubertConfig(**TINY)).save_pretrained(folder)


def point(work: Path, hours: float, workers: int, tasks: str = "both") -> Point:
    """One run on the corpus `work/corpus-<hours>` into a new results folder, then once more."""
    results = work / "results"
    shutil.rmtree(results, ignore_errors=True)
    command = [
        sys.executable, str(PROJECT / "benchmark.py"), "--upstream", f"hf:{work / 'encoder'}",
        "--suite", str(work / "suite"), "--downstream", ",".join(PARTS[tasks]),
        "--results", str(results), "--workers", str(workers), "--device", "cpu",
    ]  # fmt: skip
    seconds, spent, peak = _run(command, work / f"corpus-{hours:g}")
    disk = sum(file.stat().st_size for file in results.rglob("*") if file.is_file())
    again, *_ = _run(command, work / f"corpus-{hours:g}")
    return Point(tasks, hours, workers, seconds, spent, peak, disk / 1e9, again)


def _run(command: list[str], corpus: Path) -> tuple[float, float, float]:
    """Wall-clock seconds, CPU seconds of all its processes, and GB of the largest one."""
    environment = {**os.environ, "CORPUS": str(corpus), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", _WATCHED, *command], env=environment, cwd=PROJECT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = child.communicate()[0]
    seconds = time.perf_counter() - begun
    found = re.search(r"SPENT (\S+) (\S+)$", said.strip())
    if child.returncode or not found:
        sys.exit(f"bench: {' '.join(command)} failed:\n{said}")
    return seconds, float(found[1]), float(found[2])


# Resources of a command and of all its descendants: the usage of waited-for children.
_WATCHED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("SPENT", used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9)
sys.exit(status)
"""


def table(points: list[Point]) -> str:
    """Markdown; per hour of audio, what should stay the same."""
    lines = [
        "| tasks | hours | workers | time | CPU-s | CPU-s per hour | largest process | on disk "
        "| MB per hour | again |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        cells = [
            p.tasks, f"{p.hours:g}", p.workers, f"{p.seconds:.0f} s", f"{p.cpu_seconds:.0f}",
            f"{p.cpu_seconds / p.hours:.1f}", f"{p.peak_gb:.2f} GB", f"{p.disk_gb:.2f} GB",
            f"{1000 * p.disk_gb / p.hours:.1f}", f"{p.again_seconds:.0f} s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def grow(work: Path, hours: list[float], workers: list[int], tasks: list[str]) -> list[Point]:
    """Every size with every number of workers."""
    speech = Path(os.environ.get("SPEECH_SAMPLE", SPEECH)) / "librispeech_asr"
    write_encoder(work / "encoder")
    (work / "suite").mkdir(exist_ok=True)
    for name, recipe in RECIPES.items():
        (work / "suite" / f"{name}.yaml").write_text(recipe)
    points = []
    for size in hours:
        corpus = work / f"corpus-{size:g}"
        make_corpus(corpus, size, speech)
        for count in workers:
            for each in tasks:
                points.append(point(work, size, count, each))
                print(table(points[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        shutil.rmtree(corpus)
    return points


def measure(setup: Setup) -> list[dict[str, Any]]:
    """For `make bench`: two sizes with one worker, the larger with one for every core."""
    work = setup.work / "growth"
    work.mkdir()
    small, large = (0.2, 0.3) if setup.quick else (1.0, 4.0)
    every = sorted({1, os.cpu_count() or 1})
    points = [*grow(work, [small], [1], ["both"]), *grow(work, [large], every, ["both"])]
    return [each._asdict() for each in points]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench.growth")
    parser.add_argument("hours", nargs="*", type=float, default=[1.0, 10.0])
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--tasks", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, help="a disk with 120 MB an hour (default: /tmp)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="growth-", dir=args.work) as work:
        print(table(grow(Path(work), args.hours, args.workers, args.tasks)))


if __name__ == "__main__":
    main()
