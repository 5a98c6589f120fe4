"""What a build cost is its own: not the memory of what the process did before."""

from __future__ import annotations

import sys

import pytest
import torch

from merging.cost import begin_peak, cost, peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_the_peak_is_of_what_was_begun() -> None:
    begin_peak()
    size = 400_000_000
    block = torch.zeros(size, dtype=torch.uint8).add_(1)
    with_block = peak_bytes()
    del block
    assert peak_bytes() == pytest.approx(with_block, rel=0.01), "a peak stays"
    begin_peak()
    assert peak_bytes() < with_block - 0.9 * size, "and is forgotten"


def test_bytes_stored_are_those_of_the_weights() -> None:
    weights = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16)}
    assert cost(1.5, 2, weights) == {
        "seconds": 1.5,
        "peak_memory_bytes": 2,
        "stored_bytes": 4 * 15 + 2 * 7,
    }
