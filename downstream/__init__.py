"""Frozen hidden states to scores. Knows upstreams only as Upstream and Hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from downstream.report.statistics import Interval
    from downstream.report.summary import Summary


def paired(a: Sequence[Summary], b: Sequence[Summary], metric: str) -> Interval:
    """`downstream.paired(a, b, "wer")`: the difference of two scores; see `statistics.paired`."""
    from downstream.report import statistics  # not before it is used

    return statistics.paired(a, b, metric)
