"""Classifiers without training: nearest neighbours, and a linear one in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# Vectors [B, D] -> [B] classes, for each setting.
Guess: TypeAlias = Callable[[Tensor], dict[float, Tensor]]
# From vectors [N, D], their classes [N] and the number of classes.
Fit: TypeAlias = Callable[[Tensor, Tensor, int], Guess]
# Means [L, D] of utterances -> of each setting the classes said of them.
Said: TypeAlias = Callable[[Sequence[Tensor]], dict[float, list[list[int]]]]
BLOCK = 512  # vectors compared with all training vectors at once
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


def fitted(
    fit: Fit, means: Sequence[Tensor], layer: int, classes: Sequence[int], size: int
) -> Said:
    """What `fit` makes of a layer of means [L, D] with their classes; dimensions normalised."""
    x = _layer(means, layer)
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-9)
    guess = fit((x - mean) / deviation, torch.tensor(classes, device=x.device), size)

    def said(outputs: Sequence[Tensor]) -> dict[float, list[list[int]]]:
        blocks = [guess((v - mean) / deviation) for v in _layer(outputs, layer).split(BLOCK)]
        return {s: torch.cat([b[s] for b in blocks])[:, None].tolist() for s in blocks[0]}

    return said


def _layer(outputs: Sequence[Tensor], layer: int) -> Tensor:
    """[N, D] of means [L, D], read one by one."""
    return torch.stack([each[layer] for each in outputs])
