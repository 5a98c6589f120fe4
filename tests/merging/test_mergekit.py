"""Agreement with mergekit 0.1.5's own functions, and where its definitions are not followed.

Slow, and skipped where mergekit is not installed. These functions need but a part of what it
requires, so that a folder beside the environment is enough:

    pip install --no-deps --target /tmp/mergekit mergekit==0.1.5
    pip install pydantic click  # if they are not there
    PYTHONPATH=/tmp/mergekit python -m pytest -m slow tests/test_mergekit.py

What it proves for the default run too is in test_methods.py as numbers made with mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.methods import METHODS
from merging.methods.sparse import by_content

pytest.importorskip("mergekit", reason="see the docstring for how to install it")
arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
sparsify = pytest.importorskip("mergekit.sparsify")
slerp = pytest.importorskip("mergekit.merge_methods.slerp").slerp
stock = pytest.importorskip("mergekit.merge_methods.model_stock").model_stock_merge_method
groups = pytest.importorskip("mergekit.merge_methods.base")

pytestmark = pytest.mark.slow
SHAPES = [(1,), (7,), (40, 30), (1, 9), (6, 5, 4)]
COUNTS = [1, 2, 3]
KIND = {"ties": "magnitude", "dare": "random", "breadcrumbs": "magnitude_outliers"}
KIND |= {"della": "della_magprune"}


def models(shape: Sequence[int], count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and fine-tuned tensors whose task vectors have something in common."""
    make = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(shape, generator=make) for _ in range(2))
    return base, [base + 0.1 * (common + torch.randn(shape, generator=make)) for _ in range(count)]


def theirs(method: str, base: Tensor, tuned: Sequence[Tensor], **params: Any) -> Tensor:
    """mergekit's sparse merge; weights 1 and lambda as alpha, unless `params` say otherwise."""
    consensus = arithmetic.ConsensusMethod.sum if params.pop("elect", True) else None
    merger = arithmetic.GeneralizedTaskArithmeticMerge(
        consensus, sparsify.SparsificationMethod(KIND[method]), True, False, method, None, None
    )
    group = groups.TensorGroup.from_tensors([base, *tuned], base_index=0)
    ids = [entry.id for entry in group.non_base]
    params = {"weight": 1.0, "lambda": 0.25, "normalize": True, "rescale": False, **params}
    for each in ("weight", "density", "gamma", "epsilon"):
        if each in params:
            params[each] = dict.fromkeys(ids, params[each])
    return merger.merge_group(group, int8_mask=False, **params)


def mergekit_stock(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    return stock([groups.TensorGroup.from_tensors([base, *tuned], base_index=0)])[0]


def rng(seed: int) -> torch.Generator:
    """Draws what torch's own generator draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.61, 1.0])
def test_ties(shape: tuple[int, ...], count: int, density: float) -> None:
    base, tuned = models(shape, count)
    ours = METHODS["ties"](base, by_content(tuned), alpha=0.25, density=density)
    expected = theirs("ties", base, by_content(tuned), density=density)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_with_the_same_masks(
    shape: tuple[int, ...], count: int, elect: bool, density: float
) -> None:
    """mergekit without its L1 rescaling; the 1 / density of the paper put into lambda."""
    base, tuned = models(shape, count)
    ours = METHODS["dare"](base, tuned, alpha=0.25, density=density, elect=elect, rng=rng(3))
    settings = {"density": density, "elect": elect, "lambda": 0.25 / density}
    torch.testing.assert_close(ours, theirs("dare", base, by_content(tuned), **settings))


@pytest.mark.parametrize("shape", [(40,), (40, 30), (6, 5, 4)])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("density, gamma", [(0.14, 0.01), (0.5, 0.2), (0.9, 0.1)])
def test_breadcrumbs(
    shape: tuple[int, ...], count: int, elect: bool, density: float, gamma: float
) -> None:
    base, tuned = models(shape, count)
    given = {"density": density, "gamma": gamma, "elect": elect}
    ours = METHODS["breadcrumbs"](base, tuned, alpha=0.25, **given)
    torch.testing.assert_close(ours, theirs("breadcrumbs", base, by_content(tuned), **given))


@pytest.mark.parametrize("shape", [(7,), (40, 30), (1, 9)])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("density, epsilon", [(0.5, 0.15), (0.3, 0.25), (0.8, 0.1)])
def test_della_drops_the_same_values(
    shape: tuple[int, ...], count: int, density: float, epsilon: float
) -> None:
    """The masks of all models, seen where only the sign of each value matters."""
    base = torch.zeros(shape)
    tuned = [t.abs() for t in models(shape, count)[1]]
    given = {"density": density, "epsilon": epsilon, "elect": False}
    ours = METHODS["della"](base, tuned, alpha=1.0, **given, rng=rng(5))
    expected = theirs("della", base, by_content(tuned), **given)
    assert torch.equal(ours != 0, expected != 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [0.001, 0.1, 10.0])  # the first is parallel: linear
def test_slerp(shape: tuple[int, ...], alpha: float, size: float) -> None:
    base, (tuned,) = models(shape, 1)
    tuned = base + size * 10 * (tuned - base)
    expected = slerp(torch.tensor([alpha]), base[None], tuned[None])[0]
    torch.testing.assert_close(METHODS["slerp"](base, [tuned], alpha=alpha), expected)


@pytest.mark.parametrize("shape", [(40,), (40, 30), (6, 5, 4)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(shape: tuple[int, ...], count: int) -> None:
    base, tuned = models(shape, count)
    torch.testing.assert_close(METHODS["model_stock"](base, tuned), mergekit_stock(base, tuned))


def test_where_alpha_differs_one_model_cancels_mergekits_weight() -> None:
    """mergekit's ties and della divide by the sum of weights: 0.25 of one model becomes 1."""
    base, tuned = models((40, 30), 1)
    cancelled = theirs("ties", base, tuned, density=1.0, weight=0.25, **{"lambda": 1.0})
    torch.testing.assert_close(cancelled, tuned[0])
    ours = METHODS["ties"](base, tuned, alpha=0.25, density=1.0)
    torch.testing.assert_close(ours, base + 0.25 * (tuned[0] - base))


def test_where_ties_differs_a_tied_vote_is_none() -> None:
    """mergekit elects plus when votes are even, so that the sign of a model's weights matters."""
    base, tuned = torch.zeros(1), [torch.ones(1), -torch.ones(1)]
    assert theirs("ties", base, tuned, density=1.0, **{"lambda": 1.0}) == 1
    assert METHODS["ties"](base, tuned, alpha=1.0, density=1.0) == 0


def test_where_dare_differs_rescaling_by_the_l1_norm_is_biased() -> None:
    """Of one value mergekit keeps `density` on average; the paper's 1 / density keeps it whole."""
    base, tuned = torch.zeros(1), [torch.ones(1)]
    drawn = rng(0)
    kept = [
        theirs("dare", base, tuned, density=0.1, rescale=True, **{"lambda": 1.0})
        for _ in range(2000)
    ]
    ours = [METHODS["dare"](base, tuned, alpha=1.0, density=0.1, rng=drawn) for _ in range(2000)]
    assert abs(float(torch.stack(kept).mean()) - 0.1) < 0.03
    assert abs(float(torch.stack(ours).mean()) - 1.0) < 0.3


def test_where_breadcrumbs_differs_small_tensors_and_a_gamma_that_does_not_fit() -> None:
    """mergekit drops a tensor of one value whole, and lessens gamma when density + gamma > 1."""
    base, tuned = torch.zeros(1), [torch.ones(1)]
    assert theirs("breadcrumbs", base, tuned, density=0.9, gamma=0.01) == 0
    assert METHODS["breadcrumbs"](base, tuned, alpha=1.0, density=0.9) == 1
    ten = torch.arange(1.0, 11.0)
    lessened = theirs("breadcrumbs", torch.zeros(10), [ten], density=0.9, gamma=0.5)
    assert int((lessened != 0).sum()) == 9  # the largest one is gone, not the largest five


def test_where_della_differs_rows_of_one_value() -> None:
    """mergekit's probability is 0/0 there; ours the density."""
    with pytest.raises(RuntimeError):
        theirs("della", torch.zeros(2, 1), [torch.ones(2, 1)], density=0.5, epsilon=0.1)
    drawn = METHODS["della"](torch.zeros(999, 1), [torch.ones(999, 1)], alpha=1.0, rng=rng(0))
    assert abs(float(drawn.mean()) - 1) < 0.15


def test_where_della_differs_convolutions() -> None:
    """mergekit ranks along axis 1 alone: here rows of one value each again."""
    base, tuned = torch.zeros(2, 1, 9), [torch.ones(2, 1, 9)]
    with pytest.raises(RuntimeError):
        theirs("della", base, tuned, density=0.5, epsilon=0.1)


def test_where_slerp_differs_a_zero_tensor_is_linear() -> None:
    """mergekit takes zero for a vector at a right angle: sin(45 degrees) halfway, not a half."""
    base, tuned = torch.zeros(2), torch.tensor([3.0, 4.0])
    halfway = slerp(torch.tensor([0.5]), base[None], tuned[None])[0]
    torch.testing.assert_close(halfway, tuned * 0.5**0.5)
    torch.testing.assert_close(METHODS["slerp"](base, [tuned], alpha=0.5), tuned * 0.5)


def test_where_model_stock_differs_opposed_and_tiny_task_vectors() -> None:
    """mergekit goes 18-fold backwards at a cosine of -0.9, and takes tiny vectors for opposed."""
    base = torch.zeros(2)
    opposed = [torch.tensor([1.0, 0.0]), torch.tensor([-0.9, 0.19**0.5])]
    torch.testing.assert_close(mergekit_stock(base, opposed), -18 * (opposed[0] + opposed[1]) / 2)
    assert torch.equal(METHODS["model_stock"](base, opposed), base)
    tiny = [torch.tensor([1e-4, 0.0]), torch.tensor([1e-4, 0.0])]
    assert float(mergekit_stock(base, tiny)[0]) < 0.03e-4
    torch.testing.assert_close(METHODS["model_stock"](base, tiny), tiny[0])
