"""Classifiers without training: nearest neighbours, and a linear one in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# Vectors [B, D] -> [B] classes, for each setting.
Guess: TypeAlias = Callable[[Tensor], dict[float, Tensor]]
NEIGHBOURS = (1, 3, 5, 10, 20)
SHRINKAGE = (1e-3, 1e-2, 0.1, 0.3, 1.0)  # 1: the nearest class mean


def neighbours(x: Tensor, y: Tensor, classes: int) -> Guess:
    """The most frequent class of the k nearest of x [N, D] by cosine, in a tie the nearer ones."""
    x, most = F.normalize(x, dim=1), min(max(NEIGHBOURS), len(x))
    votes = 1 - 1e-3 * torch.arange(most, device=x.device)  # ranks decide between equal counts

    def guess(vectors: Tensor) -> dict[float, Tensor]:
        near = y[(F.normalize(vectors, dim=1) @ x.T).topk(most).indices]
        found = {}
        for k in NEIGHBOURS:
            chosen = near[:, :k]
            counts = torch.zeros(len(near), classes, device=x.device)
            counts.scatter_add_(1, chosen, votes[:k].expand_as(chosen))
            found[float(k)] = counts.argmax(1)
        return found

    return guess


def discriminants(x: Tensor, y: Tensor, classes: int) -> Guess:
    """Linear discriminant analysis of x [N, D]: a Gaussian for each class, all of one covariance.

    The class of the highest posterior, for each share by which that covariance is shrunk towards a
    sphere of the same trace.
    """
    counts = y.bincount(minlength=classes).to(x)
    means = x.new_zeros(classes, x.shape[1]).index_add_(0, y, x) / counts[:, None]
    rest = x - means[y]
    within, centres = (rest.T @ rest).double() / len(x), means.T.double()
    sphere = torch.eye(len(within)).to(within) * within.diagonal().mean().clamp(min=1e-9)
    found = {}
    for share in SHRINKAGE:
        weights = torch.linalg.solve((1 - share) * within + share * sphere, centres)
        bias = (counts / len(x)).log() - (centres * weights).sum(0) / 2
        found[share] = weights.float(), bias.float()
    return lambda vectors: {s: (vectors @ w + b).argmax(1) for s, (w, b) in found.items()}
