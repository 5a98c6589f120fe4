"""Methods of singular values: against the papers' formulas in numpy, and beyond them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from merging.methods import METHODS


def models(shape: Sequence[int], count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and tuned models around it."""
    make = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=make)
    return base, [base + 0.1 * torch.randn(shape, generator=make) for _ in range(count)]


def test_low_rank_keeps_the_largest_directions() -> None:
    vector = torch.zeros(3, 4)
    vector[0, 1], vector[2, 3], vector[1, 0] = (
        4.0,
        3.0,
        0.1,
    )  # singular values; energy 16 : 9 : 0.01
    first, two = vector.clone(), vector.clone()
    first[2, 3] = first[1, 0] = two[1, 0] = 0.0
    for params, expected in (
        ({"keep": 0.3}, first), ({"keep": 0.34}, two), ({"keep": 1.0}, vector),
        ({"keep": 0.6, "by": "energy"}, first), ({"keep": 0.99, "by": "energy"}, two),
    ):  # fmt: skip
        found = METHODS["low_rank"](torch.ones(3, 4), [1 + vector], alpha=0.5, **params)
        torch.testing.assert_close(found, 1 + 0.5 * expected)
    conv = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    found = METHODS["low_rank"](torch.zeros(6, 2, 5), [conv], alpha=1.0, keep=0.5)
    assert int(torch.linalg.matrix_rank(found.flatten(1), rtol=1e-4)) == 3


def in_numpy(method: str, base: Tensor, tuned: Sequence[Tensor]) -> np.ndarray:
    """The change at alpha 1 of a full-rank matrix, from the papers' formulas."""
    origin = base.double().numpy()
    vectors = [t.double().numpy() - origin for t in tuned]
    if method == "iso_c":
        u, s, vt = np.linalg.svd(sum(vectors), full_matrices=False)
        return s.mean() * u @ vt
    kept = min(base.shape) // len(tuned)
    triplets = [np.linalg.svd(vector, full_matrices=False) for vector in vectors]
    u = np.hstack([u[:, :kept] for u, _, _ in triplets])
    s = np.concatenate([s[:kept] for _, s, _ in triplets])
    v = np.hstack([vt[:kept].T for _, _, vt in triplets])
    left, right = (scipy.linalg.polar(x)[0] for x in (u, v))
    return left @ np.diag(s) @ right.T


@pytest.mark.parametrize("shape", [(6, 6), (12, 7), (7, 12)])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_singular_directions_as_the_papers_have_them(
    method: str, shape: tuple[int, int], count: int
) -> None:
    base, tuned = models(shape, count)
    found = METHODS[method](base, tuned, alpha=0.7) - base
    expected = torch.from_numpy(0.7 * in_numpy(method, base, tuned)).float()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    values = torch.linalg.svdvals(found)
    if method == "iso_c":
        torch.testing.assert_close(values, values.mean().expand_as(values), atol=1e-5, rtol=0)


def test_tsv_m_adds_what_lies_in_directions_of_its_own() -> None:
    """Where models do not interfere all of both stays; a direction of both is there once."""
    base = torch.zeros(4, 6)
    one, two = base.clone(), base.clone()
    one[0, 0], one[1, 1], two[2, 3], two[3, 5] = 4.0, 3.0, 2.0, 1.0
    found = METHODS["tsv_m"](base, [one, two], alpha=1.0)
    torch.testing.assert_close(found, one + two)
    torch.testing.assert_close(METHODS["tsv_m"](base, [one, one], alpha=1.0), one)
    torch.testing.assert_close(METHODS["tsv_m"](base, [one, 2 * one], alpha=1.0), 1.5 * one)
    torch.testing.assert_close(METHODS["tsv_m"](base, [one, base], alpha=0.5), 0.5 * one)
    many = [torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    assert METHODS["tsv_m"](torch.zeros(2, 3), many).isfinite().all(), "more models than directions"


def test_what_rounding_leaves_of_a_low_rank_task_vector_is_no_direction() -> None:
    """A LoRA's change of rank 2, stored in float32: Iso-C must not blow the other 62 up."""
    make = torch.Generator().manual_seed(1)
    base = torch.randn(64, 80, generator=make)
    change = torch.randn(64, 2, generator=make) @ torch.randn(2, 80, generator=make) * 1e-3
    found = METHODS["iso_c"](base, [base + change], alpha=1.0) - base
    u, s, vt = np.linalg.svd(change.double().numpy(), full_matrices=False)
    expected = torch.from_numpy(s[:2].mean() * u[:, :2] @ vt[:2]).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2)])
def test_what_is_no_matrix_takes_the_mean_task_vector(method: str, shape: tuple[int, ...]) -> None:
    base, tuned = models(shape, 2)
    assert torch.equal(METHODS[method](base, tuned), METHODS["linear"](base, tuned))
