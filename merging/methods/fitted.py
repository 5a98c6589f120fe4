"""Methods that weigh weights by what they do on data: Fisher, RegMean, LOT.

Their `stats` were gathered on calibration clips, one tensor for each of [base, *tuned]; without
them they are `linear`. To Fisher and RegMean the base is one more model, of weight 1 - alpha, and
each of n tuned ones has alpha / n: a weighted mean that the data correct. LOT goes from the base
towards what suits the tuned models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    [in, in] of each model's inputs, off-diagonals times `off_diagonal`. RIDGE keeps unseen
    directions at the weighted mean, and so does all that is no matrix.
    """
    weights = _weights(alpha, len(tuned), "regmean")
    mean = linear(base, tuned, alpha=alpha).double()
    if not stats or base.ndim < 2:
        return mean.float()

    def scaled(weight: float, gram: Tensor) -> Tensor:
        diagonal = torch.diag(gram.double().diagonal())
        return weight * (off_diagonal * gram.double() + (1 - off_diagonal) * diagonal)

    grams = (scaled(weight, gram) for weight, gram in zip(weights, stats, strict=True))
    return (mean + _nearest(mean, (base, *tuned), grams, RIDGE)).float()


def lot(
    base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25, stats: Sequence[Tensor]
) -> Tensor:
    """LOT Merging: the task vector whose features drift least from the tuned models' (2505.23859).

    Base + alpha * T. With T_i = W_i - base and the inputs X_i of each tuned model's layer, its
    feature drift sum |X_i (base + T)^T - X_i W_i^T|^2 = sum |X_i (T - T_i)^T|^2 is convex in T, and
    its gradient 2 sum (T - T_i) G_i, G_i = X_i^T X_i (`stats`), is zero at

        T = (sum T_i G_i) (sum G_i)^+

    with the pseudo-inverse, here the limit of a small ridge: where no input ever went, the base
    stays. The scale of a layer norm acts value by value, so that G_i is a diagonal (`stats` [in]):
    a mean weighted by the squares of the normalized inputs. Of all else (biases, kernels) T is the
    mean task vector. Both closed forms are the paper's (the abstract; equations 9 and 12 as others
    cite them). That one set of audio calibrates all models is ours: there each task has its own.

    With one model T is its task vector, but for directions that its inputs never take. RegMean
    fits outputs as well, but the base's too, with weight 1 - alpha. Calibrate on more frames than a
    layer has inputs (3,072 in a Base): fewer can all be fitted, which goes far off. Directions that
    inputs hardly take are where models are told apart: there T may be long, and its effective
    alpha far from `alpha`.
    """
    if not stats or base.ndim > 2:
        return linear(base, tuned, alpha=alpha)
    origin, grams = base.double(), (gram.double() for gram in stats[1:])
    # float32 rounds `stats` by at most eps / 2 of their trace: what is below is no input
    ridge = max(RIDGE, base.shape[-1] * torch.finfo(torch.float32).eps)
    return (origin + alpha * _nearest(origin, tuned, grams, ridge)).float()


def _nearest(
    origin: Tensor, models: Sequence[Tensor], grams: Iterable[Tensor], ridge: float
) -> Tensor:
    """The change of `origin`, float64, that minimises sum |X_i (origin + change - W_i)^T|^2.

    `models` W_i [out, in] with X_i^T X_i [in, in], or [in] with their diagonals [in]. `ridge`, a
    share of the mean diagonal, makes it zero in directions that no input takes.
    """
    shift, total = torch.zeros_like(origin), torch.zeros((), dtype=torch.float64)
    for model, gram in zip(models, grams, strict=True):
        change = model.double() - origin
        shift += change * gram if gram.ndim == 1 else change @ gram
        total = total + gram
    diagonal = total if total.ndim == 1 else total.diagonal()
    diagonal += ridge * diagonal.mean().clamp(min=1e-300)
    return shift / total if total.ndim == 1 else torch.linalg.solve(total, shift, left=False)
