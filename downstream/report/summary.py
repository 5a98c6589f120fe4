"""What statistics need of one head's records: its score, and again without each cluster."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from downstream.base import AND, Count, Direction, Metric, Record
from downstream.tasks.metrics import of_result
from upstream.common.errors import UserError

Array: TypeAlias = NDArray[np.float64]

ACCURACY = "accuracy"
PREDICTED = {"hypothesis", "errors", "total", "score"}  # all else in a record is the test set's


class Sample(NamedTuple):
    """One metric of K heads that differ in their seed, and again without each of C clusters."""

    whole: Array  # [K]
    without: Array  # [C, K]


@dataclass(frozen=True)
class Summary:
    """All that statistics need of one head's records."""

    test: str  # hash: two heads with the same one were tested on the same
    utterances: int
    unit: str  # what a cluster is: speakers or folds
    clusters: list[str]
    samples: dict[str, Sample]  # metric, or view on its groups (`wer/worst`) -> [1], [C, 1]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> group -> score
    # of an accuracy: what guessing among the test set's classes scores, and its largest class
    baselines: dict[str, tuple[float, float]] = field(default_factory=dict)


def summarise(
    records: Sequence[Record], metric: str, directions: Mapping[str, Direction] = {}
) -> Summary:
    """The summary of one head's records; `metric` is that of records that name none.

    directions: of a user's metrics; registered ones have their own.

    Raises UserError for no records, an id that comes twice, or references that are all empty.
    """
    if not records:
        raise UserError("there are no predictions to compare; run the benchmark first")
    if len({(r.id, r.metric) for r in records}) < len(records):
        raise UserError("utterances are predicted twice; ids must differ")
    facts = sorted(
        [str(value) for key, value in r._asdict().items() if key not in PREDICTED] for r in records
    )
    by_metric: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_metric[record.metric or metric].append(record)
    clusters = sorted({cluster for r in records for cluster in r.clusters})
    samples: dict[str, Sample] = {}
    groups: dict[str, dict[str, float]] = {}
    baselines: dict[str, tuple[float, float]] = {}
    for name, mine in by_metric.items():
        if name == ACCURACY and (levels := _baselines(mine)):
            baselines[name] = levels
        known = of_result(name, directions.get(name, "lower"))
        samples[name] = _sample(known, mine, clusters)
        if len({r.group for r in mine}) > 1:
            groups[name], views = _views(known, mine, clusters)
            samples |= {f"{name}/{view}": sample for view, sample in views.items()}
    return Summary(
        test=hashlib.sha256(repr(facts).encode()).hexdigest()[:12],
        utterances=len({r.id for r in records}),
        unit="folds" if records[0].fold else "speakers",
        clusters=clusters,
        samples=samples,
        groups=groups,
        baselines=baselines,
    )


def stacked(summaries: Sequence[Summary], metric: str) -> Sample:
    """The heads of several seeds side by side."""
    samples = [summary.samples[metric] for summary in summaries]
    return Sample(*map(np.hstack, zip(*samples)))


def _sample(metric: Metric, records: Sequence[Record], clusters: Sequence[str]) -> Sample:
    """The score of one head, and without each cluster in turn.

    Ratios of sums have a closed form; whatever else is counted again without the cluster. With
    folds, which are the clusters, the score is their unweighted mean. What two speakers share, a
    trial or a mixture, goes with either: left out with its first speaker alone, it would show half
    of what a speaker moves.
    """
    score = metric.score
    if records[0].fold:
        alone = np.array([score([r for r in records if r.fold == c]) for c in clusters])
        whole, without = alone.mean(), _rest(alone) / (len(alone) - 1 or math.nan)
        return Sample(np.array([whole]), without[:, None])
    if counts := [r for r in records if isinstance(r, Count)]:
        sums = {cluster: np.zeros(2) for cluster in clusters}
        for count in counts:
            for cluster in count.clusters:
                sums[cluster] += count.errors, count.total
        whole = np.sum([(count.errors, count.total) for count in counts], axis=0)
        errors, total = (whole - [*sums.values()]).T
        rest = 100 * errors / np.where(total > 1e-9 * whole[1], total, math.nan)
        without = rest if metric.better == "lower" else 100 - rest
    else:
        again = metric.kept(records) if metric.kept else lambda k: score([*compress(records, k)])
        without = np.array([_or_nan(again, keep) for keep in _others(records, clusters)])
    return Sample(np.array([score(records)]), without[:, None])


def _views(
    metric: Metric, records: Sequence[Record], clusters: Sequence[str]
) -> tuple[dict[str, float], dict[str, Sample]]:
    """The score of every group of utterances (all folds together), and the VIEWS on them."""
    by_group: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_group[record.group].append(record._replace(fold="", speaker=AND.join(record.clusters)))
    parts = [_sample(metric, by_group[group], clusters) for group in sorted(by_group)]
    scores = Sample(*(np.stack(each)[..., 0] for each in zip(*parts)))  # [G], [G, C]
    worst = np.max if metric.better == "lower" else np.min
    views = {
        "macro": Sample(*(np.mean(x, 0, keepdims=True).T for x in scores)),
        "worst": Sample(*(worst(x, 0, keepdims=True).T for x in scores)),
        "spread": Sample(*(np.ptp(x, 0, keepdims=True).T for x in scores)),
    }
    return dict(zip(sorted(by_group), scores.whole.tolist())), views


def _baselines(records: Sequence[Record]) -> tuple[float, float] | None:
    """Chance level and majority class in per cent; None unless records are labels of two classes.

    Of the classes in the references; a head that knows more would guess right less often. With
    folds the unweighted mean over them, as the score is.
    """
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if not isinstance(record, Count) or record.total != 1:
            return None
        labels[record.fold][record.reference] += 1
    classes = sum(labels.values(), Counter[str]())
    if len(classes) < 2:
        return None
    majority = classes.most_common(1)[0][0]
    shares = [count[majority] / count.total() for count in labels.values()]
    return 100 / len(classes), 100 * sum(shares) / len(shares)


def _rest(parts: Array) -> Array:
    """Of each part, the sum of all others."""
    return parts.sum() - parts


def _others(records: Sequence[Record], clusters: Sequence[str]) -> Iterator[NDArray[np.bool_]]:
    """For each cluster a mask of the records without it."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        for cluster in record.clusters:
            members[cluster].append(index)
    for cluster in clusters:
        keep = np.ones(len(records), dtype=bool)
        keep[members[cluster]] = False
        yield keep


def _or_nan(score: Callable[[Any], float], kept: Any) -> float:
    """NaN where what is kept has no score, such as an EER without impostors."""
    try:
        return score(kept)
    except UserError:
        return math.nan
