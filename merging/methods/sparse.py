"""Methods that merge a part of each task vector: TIES, DARE, Breadcrumbs, DELLA.

All share one end: what is left of the task vectors is averaged, and alpha says how far to go along
it. With `elect` (from TIES) an average takes only the values whose sign is that of their sum; for
one model that changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods import Part
from upstream.common.errors import UserError
from upstream.common.schema import Share


def by_content(tuned: Sequence[Tensor]) -> list[Tensor]:
    """The tensors by digest: random masks and rounding do not depend on the models' order."""
    return sorted(tuned, key=lambda t: hashlib.sha1(t.numpy().tobytes()).digest())


def task_vectors(base: Tensor, tuned: Sequence[Tensor]) -> list[Tensor]:
    """tuned - base, by content."""
    return [t - base for t in by_content(tuned)]


def average(vectors: Sequence[Tensor], elect: bool) -> Tensor:
    """Mean of the vectors; with `elect`, value by value of those that agree with the sum's sign.

    Zeros do not vote, and where the sum is zero nothing is elected, as in the TIES paper's sgn
    (mergekit counts a tie as a vote for plus).
    """
    stack = torch.stack(list(vectors))
    if not elect:
        return stack.mean(0)
    agree = stack.sign() == stack.sum(0).sign()
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def band(vector: Tensor, density: float, gamma: float) -> Tensor:
    """The share `density` of values that is largest in magnitude after the `gamma` largest ones.

    At least one value stays, and so do all of equal magnitude at an edge: weights stored in half
    precision have many, and the sort would decide.
    """
    size = vector.abs().flatten()
    kept = max(1, int(density * len(size)))
    top = len(size) - int(gamma * len(size))
    low, high = size.kthvalue(top - kept + 1).values, size.kthvalue(top).values
    return vector * ((vector.abs() >= low) & (vector.abs() <= high))


def ties(
    base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25, density: Part = 0.2
) -> Tensor:
    """TIES: trim to the largest values, elect a sign, average what agrees (arXiv 2306.01708).

    `density` is the share of each task vector that stays. As mergekit's `ties` with weights 1 and
    lambda = alpha: each tensor is trimmed alone, where the paper trims the task vector as a whole.
    """
    vectors = [band(v, density, 0.0) for v in task_vectors(base, tuned)]
    return base + alpha * average(vectors, elect=True)


def dare(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    density: Part = 0.1,
    elect: bool = False,
    rng: torch.Generator,
) -> Tensor:
    """DARE: drop task-vector values at random and rescale the rest (arXiv 2311.03099).

    `density` is 1 - p: each value stays with this probability and is divided by it, so that the
    expectation is `linear` (mergekit rescales by the ratio of L1 norms, which is biased).
    """
    vectors = [
        v * torch.bernoulli(torch.full_like(v, density), generator=rng) / density
        for v in task_vectors(base, tuned)
    ]
    return base + alpha * average(vectors, elect)


def breadcrumbs(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    density: Part = 0.14,
    gamma: Share = 0.01,
    elect: bool = False,
) -> Tensor:
    """Model Breadcrumbs: leave out the largest and the smallest values (arXiv 2312.06795).

    Of each task vector the share `gamma` of largest values goes, the share `density` of next ones
    stays (the paper's beta is 1 - gamma - density). Raises UserError where the two exceed 1
    (mergekit lessens gamma in silence).
    """
    if density + gamma > 1:
        raise UserError(f"breadcrumbs: gamma: {gamma:g} must be at most 1 - density")
    vectors = [band(v, density, gamma) for v in task_vectors(base, tuned)]
    return base + alpha * average(vectors, elect)


def della(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    density: Part = 0.5,
    epsilon: Share = 0.15,
    elect: bool = True,
    rng: torch.Generator,
) -> Tensor:
    """DELLA: DARE that drops small values more often, then elects a sign (arXiv 2406.11617).

    In each row (output unit) a value stays with a probability that rises with its rank in magnitude
    from density - epsilon to density + epsilon, as in mergekit, and is divided by it, so that the
    expectation for one model is `linear`. (mergekit's one L1 ratio instead favours large values,
    its ranks run along axis 1 alone in convolutions, and a row of one value has probability 0/0.)
    """
    if density - epsilon <= 0 or density + epsilon > 1:
        raise UserError(
            f"della: epsilon: density {density:g} - {epsilon:g} must be above 0, + at most 1"
        )
    vectors = []
    for vector in task_vectors(base, tuned):
        chance = density + epsilon * _rank(vector)
        vectors.append(vector * torch.bernoulli(chance.clamp(max=1), generator=rng) / chance)
    return base + alpha * average(vectors, elect)


def _rank(vector: Tensor) -> Tensor:
    """Each value's rank in magnitude within its row, from -1 (smallest) to 1; 0 if alone."""
    rows = vector.reshape(len(vector) if vector.ndim > 1 else 1, -1)
    count = rows.shape[1]
    scale = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
    order = rows.abs().argsort(dim=1, stable=True).argsort(dim=1)
    return scale[order].reshape(vector.shape)
