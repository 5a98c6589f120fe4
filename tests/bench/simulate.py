"""What the whole SUPERB suite would take on 1, 8 and 64 devices, from figures measured on one.

Passes (ten minutes of audio each) and cells (recipe x head seed, all learning rates) of
`recipes/superb` for so many upstreams are handed to that many workers, first what an upstream must
pass, then its cells, the longest first. Speeds are those that `make bench` measured with a HuBERT
Base; of the tasks that it does not train, each is charged like its nearest relative, by the audio
(or, for time means, by the examples) that its heads see. Not in it: fine-tuning, dev evaluations,
the search of QbE, a disk or a decoder slower than the device.

`python -m tests.bench.simulate results/bench.json`
"""

from __future__ import annotations

import argparse
import heapq
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from downstream import recipe

Frames = Literal["kept", "recomputed", "shared"]  # on disk; by each cell; by one pass for all cells
SHARD = 600.0  # seconds of audio in a pass
WIDTH = 13 * 768  # values of a frame of a Base, all states
RATE = 50.0  # frames in a second
FURTHER = 0.67  # of a pass: an upstream whose CNN outputs are there from the first one's pass


class Audio(NamedTuple):
    """What a task hears, about: from the corpora's own descriptions and SUPERB's splits."""

    hours: float  # train, dev and test
    training: float  # hours of it that are trained on, cropped
    seconds: float  # of a training example, cropped
    like: str = ""  # the measured task whose heads cost as much; none trains no head
    folds: int = 1


SUITE = {
    "pr": Audio(111, 100, 12.7, "pr"), "asr": Audio(111, 100, 12.7, "asr"),
    "sf": Audio(150, 120, 3.9, "asr"), "sd": Audio(80, 58, 11.0, "pr"),
    "asv": Audio(350, 300, 7.5, "pr"), "qbe": Audio(24, 0, 6.0),
    "sid": Audio(350, 290, 7.5, "sid"), "ks": Audio(29, 23, 1.0, "sid"),
    "ic": Audio(19, 15, 2.3, "sid"), "er": Audio(7, 4, 4.5, "er", folds=5),
}  # fmt: skip
SAME = {"asr": "pr", "asv": "sid"}  # their audio is another task's
MEANS = ("sid", "ks", "ic", "er")


class Speeds(NamedTuple):
    """Of one device."""

    passed: float  # seconds of audio that pass the encoder in a second, reading included
    head: dict[str, float]  # seconds of one head for a second of audio (or a mean) that it sees


class Job(NamedTuple):
    """Seconds of a pass, or of a cell."""

    name: str
    encoder: float
    heads: float = 0.0

    @property
    def seconds(self) -> float:
        return self.encoder + self.heads


class Jobs(NamedTuple):
    """Of one upstream."""

    passes: list[Job]
    cells: list[Job]


class Outcome(NamedTuple):
    """All jobs on so many workers."""

    seconds: float
    work: float  # seconds of all jobs
    longest: float  # the longest job, which no further worker shortens
    bound: str


def speeds(raw: dict[str, Any]) -> Speeds:
    """From the raw figures of `make bench`."""
    ours, head = raw["ours"], {}
    own = [figures for figures in ours.values() if figures["pass_audio_seconds"]]
    for task, figures in ours.items():
        whole = figures["whole"]
        seen = whole["steps"] * whole["accumulate"] * whole["batch"] * whole["rates"]
        unit = 1.0 if task in MEANS else whole["seconds"]
        head[task] = (figures["scaled_heads"] + figures["scaled_reading"]) / (seen * unit)
    audio, spent = (sum(f[k] for f in own) for k in ("pass_audio_seconds", "extract_seconds"))
    return Speeds(audio / spent, head)


def jobs(found: Speeds, frames: Frames, first: bool) -> Jobs:
    """What one upstream needs. `first`: no other with the same CNN came before it."""
    once = [t for t in SUITE if t not in SAME and (frames == "kept" or t in MEANS)]
    count = round(sum(SUITE[task].hours for task in once) * 3600 / SHARD)
    cells = list[Job]()
    for name, path in recipe.suite("superb").items():
        audio, train = SUITE[name], recipe.load(path).train
        if train is None:
            continue
        seen = train.steps * train.accumulate * train.batch  # examples, by each head
        seen *= 1 if name in MEANS else audio.seconds
        heads = seen * len(train.lr) * found.head[audio.like]
        again = 0.0 if frames == "kept" or name in MEANS else seen / found.passed
        cells += [Job(name, again, heads)] * (train.seeds * audio.folds)
    if frames == "shared":
        cells = _shared(cells)
    one = Job("pass", (1.0 if first else FURTHER) * SHARD / found.passed)
    return Jobs([one] * count, cells)


def _shared(cells: list[Job]) -> list[Job]:
    """Cells that train on the same audio side by side, each epoch of it passed once for all."""
    rooms: dict[str, list[Job]] = {}
    for cell in cells:
        rooms.setdefault(SAME.get(cell.name, cell.name), []).append(cell)
    alone = [cell for cell in cells if not cell.encoder]
    joint = [
        Job(
            " with ".join(dict.fromkeys(cell.name for cell in room)),
            max(cell.encoder for cell in room),
            sum(cell.heads for cell in room),
        )
        for room in ([cell for cell in group if cell.encoder] for group in rooms.values())
        if room
    ]
    return alone + joint


def schedule(upstreams: list[Jobs], workers: int) -> Outcome:
    """All passes, upstream by upstream; then the cells, the longest first, each once its
    upstream's passes are done.
    """
    free = [0.0] * workers
    ready = [
        max((_give(free, job.seconds, 0.0) for job in each.passes), default=0.0)
        for each in upstreams
    ]
    waiting = [(cell, begins) for each, begins in zip(upstreams, ready) for cell in each.cells]
    for cell, begins in sorted(waiting, key=lambda pair: -pair[0].seconds):
        _give(free, cell.seconds, begins)
    everything = [job for each in upstreams for job in (*each.passes, *each.cells)]
    work, encoder = (sum(getattr(job, k) for job in everything) for k in ("seconds", "encoder"))
    longest, end = max(everything, key=lambda job: job.seconds), max(free)
    if end > 1.1 * work / workers:
        bound = f"the longest job, {longest.name}"
    else:
        bound = f"encoder {encoder / work:.0%}, heads {1 - encoder / work:.0%}"
    return Outcome(end, work, longest.seconds, bound)


def _give(free: list[float], seconds: float, begins: float) -> float:
    """The job to the worker that is free first; when it ends."""
    end = max(heapq.heappop(free), begins) + seconds
    heapq.heappush(free, end)
    return end


def described(figures: dict[str, Any]) -> str:
    """What a worker is."""
    name = figures["gpu"] or f"{figures['processor']} with {figures['threads']} threads"
    passed = speeds(figures["raw"]).passed
    return f"The superb suite, a worker being one {name} (encoder: {passed:.1f} x real time):"


def table(found: Speeds, upstreams: int, workers: list[int]) -> str:
    """Markdown: every way to frames on every number of workers."""
    lines = [
        "| frames | on disk, an upstream | workers | time | busy | longest job | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    hours = sum(a.hours for t, a in SUITE.items() if t not in MEANS and t != "asr")
    for frames in get_args(Frames):
        every = [jobs(found, frames, first=not number) for number in range(upstreams)]
        disk = f"{2 * WIDTH * RATE * 3600 * hours / 1e12:.1f} TB" if frames == "kept" else "means"
        for count in workers:
            end, work, longest, bound = schedule(every, count)
            cells = [frames, disk, count, _clock(end), f"{work / count / end:.0%}"]
            lines.append(f"| {' | '.join(map(str, [*cells, _clock(longest), bound]))} |")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    return f"{seconds / 86400:.1f} d" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Read what was measured, print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench.simulate")
    parser.add_argument("figures", type=Path, help="what `make bench` wrote")
    parser.add_argument("--upstreams", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    bench = json.loads(args.figures.read_text())
    for figures in [bench, *([bench["cuda"]] if "cuda" in bench else [])]:
        print(f"\n{described(figures)}\n")
        print(table(speeds(figures["raw"]), args.upstreams, args.workers))


if __name__ == "__main__":
    main()
