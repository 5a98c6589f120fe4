"""Methods that weigh weights by what they do on data: Fisher and RegMean.

Their `stats` were gathered on calibration clips, one tensor for each of [base, *tuned]. The base
has weight 1 - alpha and each of n tuned models alpha / n: both are a weighted mean that the data
correct, and `linear` where the data say nothing (no statistics, or zero).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods.dense import linear
from upstream.common.errors import UserError
from upstream.common.schema import Share

RIDGE = 1e-6  # of the mean diagonal: inputs that never fire leave a Gram matrix singular


def _weights(alpha: float, tuned: int, method: str) -> list[float]:
    """Weights of [base, *tuned]; a negative one would let the denominator vanish: UserError."""
    if not 0 <= alpha <= 1:
        raise UserError(f"{method}: alpha: {alpha:g} must be from 0 to 1; linear takes any")
    return [1 - alpha] + [alpha / tuned] * tuned


def fisher(
    base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25, stats: Sequence[Tensor]
) -> Tensor:
    """Mean weighted by each model's Fisher information (Matena and Raffel, arXiv 2111.09832).

    sum w F theta / sum w F, value by value; `stats` are the diagonals F >= 0, shaped like `base`.
    Computed as a correction of the weighted mean, which is exact where one model has all weight.
    """
    weights = _weights(alpha, len(tuned), "fisher")
    mean = linear(base, tuned, alpha=alpha).double()
    if not stats:
        return mean.float()
    total, shift = torch.zeros_like(mean), torch.zeros_like(mean)
    for weight, model, information in zip(weights, (base, *tuned), stats, strict=True):
        total += weight * information.double()
        shift += weight * information.double() * (model.double() - mean)
    return (mean + shift / torch.where(total > 0, total, 1.0)).float()


def regmean(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    off_diagonal: Share = 0.9,
    stats: Sequence[Tensor],
) -> Tensor:
    """RegMean: the linear layer whose outputs are nearest to all models' (arXiv 2212.09849).

    W = (sum w W_i G_i) (sum w G_i)^-1 for weights [out, in] and `stats` the Gram matrices X^T X
    [in, in] of each model's inputs, off-diagonals times `off_diagonal`. Solved in float64 for the
    correction of the weighted mean; RIDGE keeps unseen directions at that mean.
    """
    weights = _weights(alpha, len(tuned), "regmean")
    mean = linear(base, tuned, alpha=alpha).double()
    if not stats:
        return mean.float()
    total, shift = torch.zeros_like(stats[0], dtype=torch.float64), torch.zeros_like(mean)
    for weight, model, gram in zip(weights, (base, *tuned), stats, strict=True):
        diagonal = torch.diag(gram.double().diagonal())
        scaled = weight * (off_diagonal * gram.double() + (1 - off_diagonal) * diagonal)
        total += scaled
        shift += (model.double() - mean) @ scaled
    ridge = RIDGE * total.diagonal().mean().clamp(min=1e-300)
    total.diagonal().add_(ridge)
    return (mean + torch.linalg.solve(total, shift, left=False)).float()
