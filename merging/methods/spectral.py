"""Methods that work on the singular values of task vectors: low rank, TSV-M, Iso-C.

What is no matrix (biases, scales, kernels of convolutions) has none: there they are `linear`, but
`low_rank` unrolls kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from merging.methods import Part
from merging.methods.dense import linear, mean_vector

SAME = 1e-6  # directions of several models with less than this between them are one


class Triplets(NamedTuple):
    """A matrix [m, n] as left [m, r] * values [r] @ right [r, n], the largest values first."""

    left: Tensor
    values: Tensor
    right: Tensor


def low_rank(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    keep: Part = 0.25,
    by: Literal["rank", "energy"] = "rank",
) -> Tensor:
    """Linear along the task vector's best low-rank approximation (Eckart and Young 1936).

    The mean task vector, as a matrix [out, the rest], keeps its largest singular values: the share
    `keep` of their number (`by: rank`) or of the sum of their squares (`by: energy`), rounded up.
    Biases and scales stay whole.
    """
    if base.ndim < 2:
        return linear(base, tuned, alpha=alpha)
    vector = mean_vector(base, tuned)
    left, values, right = torch.linalg.svd(vector.double().flatten(1), full_matrices=False)
    weight = torch.ones_like(values) if by == "rank" else values.square()
    reached = weight.cumsum(0) / weight.sum()
    rank = int((reached < keep).sum()) + 1
    truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
    return base + alpha * truncated.float().reshape(base.shape)


def tsv_m(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25) -> Tensor:
    """TSV-M: the models' largest singular directions, made orthogonal (arXiv 2412.00081).

    Of n task vectors each keeps the 1 / n of its triplets (u, s, v) with the largest s. All left
    directions side by side are replaced by the nearest orthonormal ones, U (U' U)^-1/2, which is
    the Procrustes solution, and so are the right ones; base + alpha * sum s u v'. Shares, the
    Procrustes step and the plain mean of what is no matrix are as in the authors' code. One model
    is `linear`. Directions that two models share to SAME count as one, as does its mean s: there
    the nearest orthonormal ones are not unique.
    """
    if base.ndim != 2:
        return linear(base, tuned, alpha=alpha)
    share = max(1, min(base.shape) // len(tuned))
    models = [_triplets(t.double() - base.double(), base) for t in tuned]
    left = _orthonormal(torch.cat([model.left[:, :share] for model in models], 1))
    right = _orthonormal(torch.cat([model.right[:share] for model in models]))
    values = torch.cat([model.values[:share] for model in models])
    return base + (alpha * (left * values) @ right).float()


def iso_c(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25) -> Tensor:
    """Iso-C: the sum of the task vectors with all its singular values equal (arXiv 2502.04959).

    Each is their mean, so that no direction of one task outshouts the others: base + alpha * mean s
    * sum u v'; what is no matrix takes the mean of the task vectors, as in the authors' code. alpha
    1 is not the tuned model, not even of one. Directions lost in rounding stay out, of the sum and
    of the mean: of a LoRA's task vector the paper's formula makes all else up.
    """
    if base.ndim != 2:
        return linear(base, tuned, alpha=alpha)
    total = torch.stack([t.double() - base.double() for t in tuned]).sum(0)
    left, values, right = _triplets(total, base)
    return base + (alpha * values.sum() / max(1, len(values)) * left @ right).float()


def _triplets(vector: Tensor, base: Tensor) -> Triplets:
    """Singular value decomposition, float64, without what storing `base` in float32 may add.

    Rounding moves a matrix [m, n] of values of size b by a random one with singular values below
    eps b (sqrt m + sqrt n) / (2 sqrt 3); their directions say nothing.
    """
    left, values, right = torch.linalg.svd(vector, full_matrices=False)
    rows, columns = base.shape
    size = base.double().norm() / (rows * columns) ** 0.5
    noise = torch.finfo(torch.float32).eps * size * (rows**0.5 + columns**0.5)
    rank = int((values > torch.maximum(noise, 1e-12 * values[0])).sum())
    return Triplets(left[:, :rank], values[:rank], right[:rank])


def _orthonormal(directions: Tensor) -> Tensor:
    """The nearest matrix whose rows or columns, whichever are fewer, are orthonormal."""
    left, values, right = torch.linalg.svd(directions, full_matrices=False)
    rank = int((values > SAME).sum())
    return left[:, :rank] @ right[:rank]
