"""SUPERB's one number: how far an upstream is from FBANK (0) towards the best known (1000).

superb_s (leaderboard, frontend/src/overall_metrics.js): of each task the mean over its metrics of
1000 (x - fbank) / (best - fbank), then the mean over tasks. Several sets of constants are in use;
results/published/constants.csv has them with their sources, and a score is named by its set.
"""

from __future__ import annotations

import csv
import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from downstream.report.groups import TaskVersion
from downstream.report.results import Result
from downstream.report.statistics import Interval, from_error, interval, paired, seed_spread
from downstream.report.summary import Sample, Summary, stacked
from upstream.common import DATA

CONSTANTS = DATA / "results" / "published" / "constants.csv"
METRIC = "superb_score"
CORPORA = {  # the constants mean something on SUPERB's own data only
    "asr": "librispeech", "pr": "librispeech", "ks": "speech_commands", "sid": "voxceleb1",
    "ic": "fluent_speech_commands", "er": "iemocap", "sf": "snips", "asv": "voxceleb1_trials",
    "sd": "librimix", "qbe": "quesst2014",
}  # fmt: skip
NAMES = {  # other names are the same
    "acc": "accuracy", "f1": "slot_f1", "cer": "slot_cer", "mtwv": "mtwv_superb",
}  # fmt: skip


Value = TypeVar("Value", float, np.ndarray)


class Constant(NamedTuple):
    """One metric of one task in one set."""

    metric: str  # in METRICS of the tasks
    fbank: float
    best: float

    def way(self, value: Value) -> Value:
        """How far from FBANK (0) to the best (1000) a score is."""
        return 1000 * (value - self.fbank) / (self.best - self.fbank)


Tasks = Mapping[TaskVersion, Sequence[Result]]  # of one upstream, the seeds of a task together
Heads = Mapping[str, Sequence[Summary]]  # of one upstream, its heads by SUPERB's name of a task
Peers = Mapping[str, Sequence[Sequence[Summary]]]  # by task, the heads of every upstream


@functools.cache
def sets() -> dict[str, dict[str, list[Constant]]]:
    """Set -> task -> its constants."""
    found: dict[str, dict[str, list[Constant]]] = defaultdict(lambda: defaultdict(list))
    with CONSTANTS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            metric = row["metric"].removeprefix(row["task"] + "_")
            constant = Constant(NAMES.get(metric, metric), float(row["fbank"]), float(row["sota"]))
            found[row["set"]][row["task"]].append(constant)
    return found


def task_of(result: Result) -> str | None:
    """SUPERB's name of the task, if this is one of its ten on its own data."""
    task = str(result.score.recipe.get("task", ""))
    corpus = result.score.recipe.get("corpus") or {}
    return task if CORPORA.get(task, "") == corpus.get("name") else None


def complete(tasks: Tasks) -> dict[str, dict[str, TaskVersion]]:
    """Of one suite: the sets all of whose tasks are there, each in one version on SUPERB's data."""
    versions: dict[str, list[TaskVersion]] = defaultdict(list)
    for version, (first, *_) in tasks.items():
        if task := task_of(first):
            versions[task].append(version)
    single = {task: each[0] for task, each in versions.items() if len(each) == 1}
    return {
        name: {task: single[task] for task in constants}
        for name, constants in sets().items()
        if constants.keys() <= single.keys()
    }


def score(
    name: str,
    a: Heads,
    b: Heads | None = None,
    peers: Mapping[str, Sequence[Sequence[Summary]]] = {},
) -> Interval:
    """The score with the constants of set `name`, or the difference `a` minus `b`.

    peers: all upstreams that the seeds' variance is pooled over.

    The tasks count as independent samples: their variances add, the degrees of freedom are
    Satterthwaite's. Where a task has no interval, the score has none. Raises UserError, like
    `statistics.paired`, for sides that cannot be paired.
    """
    parts = {}
    for task, constants in sets()[name].items():
        gain = _gain(constants, a[task])
        if b is not None:
            paired(a[task], b[task], constants[0].metric)  # refuses other test sets
            other = _gain(constants, b[task])
            gain = Sample(gain.whole - other.whole, gain.without - other.without)
        spread = seed_spread([_gain(constants, heads) for heads in peers.get(task, ())])
        parts[task] = interval(gain, spread, 1 if b is None else 2)
    value = sum(part.value for part in parts.values()) / len(parts)
    unknown = [task for task, part in parts.items() if math.isnan(part.standard_error)]
    if unknown:
        return Interval(value, reason=f"no interval in {', '.join(unknown)}")
    squares = [(part.standard_error / len(parts)) ** 2 for part in parts.values()]
    variance = sum(squares)
    freedom = sum(square**2 / part.df for square, part in zip(squares, parts.values()))
    return from_error(value, math.sqrt(variance), variance**2 / freedom)


def _gain(constants: Sequence[Constant], heads: Sequence[Summary]) -> Sample:
    """The mean over a task's metrics of the way from FBANK (0) to the best (1000)."""
    samples = [stacked(heads, c.metric) for c in constants]
    ways = [Sample(*map(c.way, sample)) for c, sample in zip(constants, samples)]
    return Sample(*(sum(parts) / len(ways) for parts in zip(*ways)))
