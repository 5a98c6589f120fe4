"""All upstreams that stand in one place: what the seeds' variance is pooled over.

A run, `compare`, `report` and `matrix` of one results folder pool over all that it holds of a task
in the same version and on the same test set, so that they say the same of a pair. Weights that are
there under two names count once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from downstream.report.groups import TaskVersion, version
from downstream.report.results import Result
from downstream.report.statistics import Interval, SeedSpread, interval, seed_spread
from downstream.report.summary import Sample, Summary, stacked
from downstream.report.verdicts import Margin, margin_of
from upstream.common.errors import UserError

Key: TypeAlias = tuple[str, tuple[int, ...]]  # a metric; the `id` of results, which live longer


class Pool:
    """Results, and what was computed of them."""

    def __init__(self, results: Iterable[Result], margins: Mapping[str, Margin] = {}) -> None:
        self.margins = margins
        self._heads: dict[TaskVersion, dict[str, dict[int, Result]]] = {}
        for r in results:
            upstreams = self._heads.setdefault(version(r), defaultdict(dict))
            upstreams[r.cell.fingerprint].setdefault(r.cell.seed, r)
        self._samples: dict[Key, Sample] = {}
        self._intervals: dict[Key, Interval] = {}
        self._summaries: dict[tuple[TaskVersion, str], list[list[Summary]]] = {}
        self._spreads: dict[tuple[TaskVersion, str, str], SeedSpread | None] = {}

    def margin(self, result: Result) -> Margin:
        """What its task may lose."""
        return margin_of(result.cell.task, self.margins)

    def summaries(self, result: Result) -> list[list[Summary]]:
        """The heads of every upstream on the task, version and test set of a result.

        What cannot be read is told where it is shown, and is no part of the pool.
        """
        key = version(result), result.summary.test
        if key not in self._summaries:
            groups = []
            for heads in self._heads.get(key[0], {}).values():
                group = [s for s in map(_summary, heads.values()) if s and s.test == key[1]]
                groups += [group] if group else []
            self._summaries[key] = groups
        return self._summaries[key]

    def spread(self, result: Result, metric: str) -> SeedSpread | None:
        """Of the heads on the result's task; None if nothing has two."""
        key = version(result), result.summary.test, metric
        if key not in self._spreads:
            groups = self.summaries(result)
            self._spreads[key] = seed_spread(
                [stacked(group, metric) for group in groups if metric in group[0].samples]
            )
        return self._spreads[key]

    def sample(self, group: Sequence[Result], metric: str) -> Sample:
        """The heads of several seeds side by side."""
        key = metric, tuple(map(id, group))
        if key not in self._samples:
            self._samples[key] = stacked([r.summary for r in group], metric)
        return self._samples[key]

    def interval(self, group: Sequence[Result], metric: str) -> Interval:
        """Of the mean over the heads of one upstream."""
        key = metric, tuple(map(id, group))
        if key not in self._intervals:
            spread = self.spread(group[0], metric)
            self._intervals[key] = interval(self.sample(group, metric), spread)
        return self._intervals[key]


def _summary(result: Result) -> Summary | None:
    try:
        return result.summary
    except UserError:
        return None
