"""Methods that keep every value of the task vectors: linear, arcs, over depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upstream.checkpoints.tensor_names import Place
from upstream.common.errors import UserError

SLERP_PARALLEL = 0.9995  # mergekit's threshold


def mean_vector(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """The mean task vector, a new tensor."""
    if len(tuned) == 1:  # the same bits without two copies
        return tuned[0] - base
    return torch.stack([t - base for t in tuned]).mean(0)


def linear(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25) -> Tensor:
    """Base + alpha * mean task vector: Speech-FT's stage 2 (arXiv 2502.12672), WiSE-FT."""
    return mean_vector(base, tuned).mul_(alpha).add_(base)


def task_arithmetic(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25) -> Tensor:
    """Base + alpha * sum of task vectors (arXiv 2212.04089): of n, n times as far as `linear`."""
    return linear(base, tuned, alpha=alpha * len(tuned))


def soup(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 1.0) -> Tensor:
    """Uniform model soup: the mean of the tuned models (arXiv 2203.05482), whatever the base is.

    A recipe's `choose: {tasks: [...], members: greedy}` makes it a greedy soup.
    """
    return torch.lerp(base, torch.stack(list(tuned)).mean(0), alpha)


def _cosine(one: Tensor, two: Tensor) -> float:
    """Cosine of two tensors seen as vectors, in float64; NaN if one is zero."""
    a, b = one.double().flatten(), two.double().flatten()
    return float((a / a.norm()) @ (b / b.norm()))


def slerp_falls_back(base: Tensor, tuned: Tensor) -> bool:
    """Whether `slerp` is linear here: a zero tensor, or |cos| > SLERP_PARALLEL."""
    return not abs(_cosine(base, tuned)) <= SLERP_PARALLEL


def slerp(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 0.25) -> Tensor:
    """Along the arc between base and one tuned model (Shoemake 1985), tensor by tensor.

    Linear where the arc is not defined or too short to matter, see `slerp_falls_back`.
    Raises UserError for several tuned models.
    """
    if len(tuned) != 1:
        raise UserError(f"slerp: needs one tuned model, not {len(tuned)}; use linear for several")
    if slerp_falls_back(base, tuned[0]):
        return linear(base, tuned, alpha=alpha)
    angle = torch.tensor(_cosine(base, tuned[0]), dtype=torch.float64).acos()
    near, far = (torch.sin(share * angle) / angle.sin() for share in (1 - alpha, alpha))
    return (near * base.double() + far * tuned[0].double()).float()


def lines(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    shallow: float = 0.0,
    place: Place,
    depth: int,
) -> Tensor:
    """LiNeS: alpha grows linearly with depth, shallow layers stay near the base.

    arXiv 2410.17146. The last layer goes alpha far, the first `shallow` * alpha: the paper's alpha
    is `shallow` * alpha here, and its beta (1 - `shallow`) * alpha. What lies outside the layers
    counts as the first, the head as the last.
    """
    layer = depth if place.part == "head" else place.layer or 1
    rise = (layer - 1) / max(depth - 1, 1)
    return linear(base, tuned, alpha=alpha * (shallow + (1 - shallow) * rise))


def model_stock(base: Tensor, tuned: Sequence[Tensor], *, alpha: float = 1.0) -> Tensor:
    """Model Stock: the more the task vectors agree, the farther (arXiv 2403.19522).

    Goes alpha * n c / (1 + (n - 1) c) along the mean task vector, c being their mean cosine in
    this tensor. Vectors that disagree (c < 0) give the base: the paper's geometry has no such case,
    and its ratio would go backwards without bound. Raises UserError for one model.
    """
    count = len(tuned)
    if count < 2:
        raise UserError("model_stock: needs two or more tuned models; use linear for one")
    vectors = torch.stack([t - base for t in tuned]).double().reshape(count, -1)
    # No larger eps: task vectors of a light fine-tuning are tiny, and their cosines still count.
    unit = normalize(vectors, dim=1, eps=1e-300)
    cosines = unit @ unit.T
    agree = float((cosines.sum() - cosines.trace()) / (count * (count - 1)))
    agree = min(max(agree, 0.0), 1.0)
    return linear(base, tuned, alpha=alpha * count * agree / (1 + (count - 1) * agree))
