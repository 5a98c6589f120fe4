"""Frozen hidden states to scores. Knows upstreams only as Upstream and Hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from downstream.report.statistics import Difference, Rows


def paired(a: Rows, b: Rows) -> Difference:
    """`downstream.paired(a, b)`: the difference of two scores; see `statistics.paired`."""
    from downstream.report.statistics import (
        paired as difference,  # pandas is imported on the first use
    )

    return difference(a, b)
