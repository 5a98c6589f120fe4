"""Fisher, RegMean and LOT: against least squares, and where the data say nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from merging.methods import METHODS
from tests.merging.test_spectral import models

BASE = torch.tensor([[0.5, -0.25, 1.0, 0.75], [-1.5, 0.1, 0.3, -0.6]])
ONE = BASE + torch.tensor([[0.21, -0.1, -0.42, 0.05], [0.4, 0.31, -0.07, -0.33]])
TWO = BASE + torch.tensor([[0.35, 0.15, 0.32, -0.04], [0.22, -0.06, 0.28, -0.6]])


def test_fisher_weighs_value_by_value() -> None:
    base, tuned = torch.zeros(4), torch.ones(4)
    stats = [torch.tensor([1.0, 0.0, 0.0, 1e-30]), torch.tensor([3.0, 2.0, 0.0, 1e-30])]
    found = METHODS["fisher"](base, [tuned], alpha=0.5, stats=stats)
    torch.testing.assert_close(found, torch.tensor([0.75, 1.0, 0.5, 0.5]))
    assert torch.equal(
        METHODS["fisher"](BASE, [ONE, TWO], stats=[]), METHODS["linear"](BASE, [ONE, TWO])
    )


def test_regmean_has_the_nearest_outputs() -> None:
    """With whole Gram matrices, a least-squares solution; with diagonals, Fisher's weighting."""
    make = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 5, generator=make, dtype=torch.float64) for _ in range(3)]
    inputs = [torch.randn(40, 5, generator=make, dtype=torch.float64) for _ in range(3)]
    grams = [x.T @ x for x in inputs]
    share = [0.6, 0.2, 0.2]
    left = torch.cat([s**0.5 * x for s, x in zip(share, inputs)])
    right = torch.cat([s**0.5 * x @ w.T for s, x, w in zip(share, inputs, weights)])
    best = torch.linalg.lstsq(left, right).solution.T.float()
    base, *tuned = (w.float() for w in weights)
    params = {"alpha": 0.4, "stats": [g.float() for g in grams]}
    found = METHODS["regmean"](base, tuned, off_diagonal=1.0, **params)
    torch.testing.assert_close(found, best, atol=1e-4, rtol=0)
    assert not torch.allclose(METHODS["regmean"](base, tuned, **params), best, atol=1e-3)
    diagonals = [g.diagonal().float().expand(3, 5) for g in grams]
    torch.testing.assert_close(
        METHODS["regmean"](base, tuned, off_diagonal=0.0, **params),
        METHODS["fisher"](base, tuned, alpha=0.4, stats=diagonals),
        atol=1e-4, rtol=0,
    )  # fmt: skip


def test_regmean_leaves_inputs_that_never_fire_at_the_mean() -> None:
    gram = torch.zeros(4, 4)
    gram[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = METHODS["regmean"](BASE, [ONE], alpha=0.5, stats=[gram, 3 * gram])
    expected = METHODS["linear"](BASE, [ONE], alpha=0.5)
    expected[:, :2] = METHODS["linear"](BASE, [ONE], alpha=0.75)[:, :2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for nothing in ([], [torch.zeros(4, 4)] * 2):
        unseen = METHODS["regmean"](BASE, [ONE], alpha=0.5, stats=nothing)
        assert torch.equal(unseen, METHODS["linear"](BASE, [ONE], alpha=0.5))


def drift(merged: Tensor, tuned: Sequence[Tensor], inputs: Sequence[Tensor]) -> float:
    """Squared distance of the merged layer's outputs to each model's own."""
    pairs = zip(tuned, inputs)
    return sum(float((x @ (merged - own).double().T).square().sum()) for own, x in pairs)


@pytest.mark.parametrize("frames", [40, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_lot_drifts_least(count: int, frames: int) -> None:
    """Against numpy's least squares over all inputs at once; with fewer inputs than dimensions,
    the solution nearest to the base."""
    base, tuned = models((3, 5), count)
    make = torch.Generator().manual_seed(2)
    inputs = [torch.randn(frames, 5, generator=make, dtype=torch.float64) for _ in tuned]
    outputs = [x @ (t.double() - base.double()).T for x, t in zip(inputs, tuned)]
    best = np.linalg.lstsq(torch.cat(inputs).numpy(), torch.cat(outputs).numpy(), rcond=None)[0].T
    stats = [torch.eye(5), *(x.T @ x for x in inputs)]
    found = METHODS["lot"](base, tuned, alpha=1.0, stats=stats)
    torch.testing.assert_close(found, base + torch.from_numpy(best).float(), atol=1e-5, rtol=0)
    half = METHODS["lot"](base, tuned, alpha=0.5, stats=stats)
    torch.testing.assert_close(half, (base + found) / 2)
    least, mean = (drift(w, tuned, inputs) for w in (found, sum(tuned) / count))
    assert least < mean if count > 1 else least < 1e-9


def test_lot_is_not_carried_away_by_what_rounding_adds_to_the_statistics() -> None:
    """Fewer frames than inputs, and one that drowns the others, as speech has it: what float32
    leaves in empty directions would be divided by itself (twenty times the right answer)."""
    base, tuned = models((8, 200), 1)
    make = torch.Generator().manual_seed(2)
    inputs = torch.randn(50, 200, generator=make)
    inputs[:, 0] = 100.0
    exact = inputs.double().T @ inputs.double()
    found = METHODS["lot"](base, tuned, alpha=1.0, stats=[torch.eye(200), inputs.T @ inputs])
    pinv = torch.linalg.pinv(exact, hermitian=True, rtol=1e-12)
    expected = (tuned[0].double() - base.double()) @ exact @ pinv
    assert (found - base - expected).norm() < 0.01 * expected.norm()


def test_lot_of_one_model_is_its_task_vector_where_there_is_input() -> None:
    gram = torch.zeros(4, 4)
    gram[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = METHODS["lot"](BASE, [ONE], alpha=0.5, stats=[gram, gram])
    expected = BASE.clone()
    expected[:, :2] = METHODS["linear"](BASE, [ONE], alpha=0.5)[:, :2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    dead = METHODS["lot"](BASE, [ONE, TWO], alpha=1.0, stats=[torch.zeros(4, 4)] * 3)
    assert torch.equal(dead, BASE)
    for method in ("lot", "regmean"):
        plain = METHODS[method](BASE, [ONE, TWO], stats=[])
        assert torch.equal(plain, METHODS["linear"](BASE, [ONE, TWO]))


def test_lot_weighs_scales_by_the_squares_that_they_scale() -> None:
    base, tuned = torch.zeros(3), [torch.ones(3), torch.full((3,), 5.0)]
    stats = [torch.ones(3), torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])]
    found = METHODS["lot"](base, tuned, alpha=1.0, stats=stats)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 5.0]), atol=1e-4, rtol=0)
    assert torch.equal(
        METHODS["regmean"](base, tuned, stats=stats), METHODS["linear"](base, tuned)
    ), "RegMean has no say there"
