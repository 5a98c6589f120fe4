"""How alike the hidden states of two upstreams are on the same audio, layer by layer.

Speakers (where there are fewer than five, utterances) are dealt into ten groups, and all rests on
sums over each group, 3 D x D matrices a layer: frames pass once. What is drawn are speakers, not
frames, which resemble their neighbours whatever the upstream. So nothing is estimated from a
frame and itself, nor from two frames of one group, and intervals are over groups.

- `cka`: linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) with the unbiased
  estimate of HSIC (Song et al., JMLR 13, 2012, eq. 4) over groups in the place of samples: 0 on
  average for independent features, however few frames there are. Rotation, scale and shift have no
  say in it.
- `cosine`: of the two vectors of each frame, averaged. Only for equal widths; a common offset or a
  few large dimensions bring it near 1 for any two upstreams: compare it with the floor.
- `pwcca`: projection-weighted canonical correlations (Morcos et al., arXiv 1806.05759), weighted by
  the reference's activations. Directions and weights come from four fifths of the groups, the
  correlations from the others: on their own frames they are far above 0 for independent features.
  Any invertible linear map of the other upstream has no say in it. Directions of nearly the same
  correlation are not well defined, which moves it by up to about 0.001.

Intervals are 95 %, Student's t over groups: the jackknife that deletes one group at a time for
`cka`, the groups' own values for the others. tests/upstream/test_similarity.py simulates coverage;
that of `pwcca` does not count its 0.001.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from upstream.common.errors import UserError

MEASURES = {"cka": "debiased linear CKA", "cosine": "frame cosine", "pwcca": "PWCCA"}
GROUPS, FEWEST, FOLDS = 10, 5, 5
FRAMES_PER_VALUE = 10  # of either width: with fewer there is no PWCCA, its directions are noise
SMALLEST = 1e-5  # variance of a direction where each dimension has 1: below it lies rounding


@dataclass(frozen=True)
class Estimate:
    """A similarity with its 95 % interval."""

    value: float
    low: float
    high: float


class Moments(NamedTuple):
    """Means over the frames of each of G groups, for each of L pairs of layers."""

    frames: Tensor  # [G]
    x: Tensor  # [G, L, D] of the reference, minus a constant
    y: Tensor  # [G, L, E] of the other
    xx: Tensor  # [G, L, D, D]
    xy: Tensor
    yy: Tensor
    cosine: Tensor  # [G, L]; NaN where widths differ


def estimates(moments: Moments) -> tuple[dict[str, list[Estimate]], dict[str, Estimate]]:
    """Each measure for each pair of layers, and its mean over them.

    PWCCA is left out where frames are few, the cosine where widths differ. Raises UserError where
    hidden states do not vary.
    """
    values: dict[str, list[tuple[float, Tensor]]] = {}  # with what each group has to say, [G]
    width = max(moments.x.shape[-1], moments.y.shape[-1])
    enough = int(moments.frames.sum()) >= FRAMES_PER_VALUE * width
    for layer in range(moments.x.shape[1]):
        one = Moments(moments.frames, *(each[:, layer].double() for each in moments[1:]))
        values.setdefault("cka", []).append(_cka(one))
        if not torch.isnan(one.cosine).any():
            values.setdefault("cosine", []).append((float(one.cosine.mean()), one.cosine))
        if enough:
            found = _pwcca(one)
            values.setdefault("pwcca", []).append((float(found.mean()), found))
    for name, rows in values.items():
        if not all(torch.isfinite(groups).all() for _, groups in rows):
            raise UserError(f"similarity: no {MEASURES[name]}: some hidden state hardly varies")
    measures = {name: [_interval(*row) for row in rows] for name, rows in values.items()}
    mean = {}
    for name, rows in values.items():
        whole, groups = zip(*rows)
        mean[name] = _interval(sum(whole) / len(whole), torch.stack(groups).mean(0))
    return measures, mean


def _cka(m: Moments) -> tuple[float, Tensor]:
    """Debiased linear CKA of one layer, and the jackknife's pseudo-values [G]."""
    hsics = [_Hsic(m.x, m.y, m.xy), _Hsic(m.x, m.x, m.xx), _Hsic(m.y, m.y, m.yy)]

    def value(groups: Sequence[int]) -> float:
        xy, xx, yy = (each.of(groups) for each in hsics)
        return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else torch.nan

    every = range(len(m.x))
    whole = value(every)
    without = torch.tensor([value([h for h in every if h != g]) for g in every])
    return whole, len(every) * whole - (len(every) - 1) * without


class _Hsic:
    """Unbiased HSIC of linear kernels over groups, from their means and moments, without frames.

    Of distinct groups a, b, c, d: E k(a, b) l(a, b) + E k(a, b) E l(c, d) - 2 E k(a, b) l(a, c).
    """

    def __init__(self, x: Tensor, y: Tensor, xy: Tensor) -> None:
        flat = xy.flatten(1)
        self.two = (flat @ flat.T).numpy()  # [G, G]: mean of k(i, j) l(i, j), frame i of a, j of b
        self.k, self.other = (x @ x.T).numpy(), (y @ y.T).numpy()
        self.three = torch.stack([x @ each @ y.T for each in xy]).numpy()  # [a, b, c]

    def of(self, groups: Sequence[int]) -> float:
        """From these groups alone."""
        n = len(groups)
        square = np.ix_(groups, groups)
        apart = 1 - np.eye(n)
        k, other = self.k[square] * apart, self.other[square] * apart
        distinct = apart[:, :, None] * apart[:, None, :] * apart[None]
        three = (self.three[np.ix_(groups, groups, groups)] * distinct).sum()
        # pairs (a, b) and (c, d) without a group in common: all, less those that share one or two
        four = k.sum() * other.sum() - 4 * k.sum(0) @ other.sum(0) + 2 * (k * other).sum()
        pairs, triples = n * (n - 1), n * (n - 1) * (n - 2)
        first = (self.two[square] * apart).sum() / pairs
        return float(first + four / (triples * (n - 3)) - 2 * three / triples)


def _pwcca(m: Moments) -> Tensor:
    """PWCCA of one layer [G], by directions from the folds that a group is not in.

    The mean is the estimate; a group's value is how far it moves its fold's correlations, in the
    first order.
    """
    xx, xy, yy = (
        _about_mean(m.x, m.x, m.xx),
        _about_mean(m.x, m.y, m.xy),
        _about_mean(m.y, m.y, m.yy),
    )
    fold = torch.arange(len(m.x)) % FOLDS
    found = torch.empty(len(m.x), dtype=xx.dtype)
    for held_out in range(FOLDS):
        inside, outside = fold == held_out, fold != held_out
        train = (each[outside].mean(0) for each in (xx, xy, yy))
        a, b, weights = _directions(*train)
        both = torch.stack([((each @ b) * a).sum(0) for each in xy[inside]])  # [groups, K]
        one = torch.stack([((each @ a) * a).sum(0) for each in xx[inside]])
        two = torch.stack([((each @ b) * b).sum(0) for each in yy[inside]])
        first, second = one.mean(0), two.mean(0)
        size = (first * second).sqrt()
        correlations = both.mean(0) / size
        moves = (one - first) / first + (two - second) / second
        found[inside] = (both / size - correlations * moves / 2) @ weights
    return found


def _about_mean(x: Tensor, y: Tensor, xy: Tensor) -> Tensor:
    """[G, D, E]: second moments of each group about the mean of all groups."""
    mean, other = x.mean(0), y.mean(0)
    rows = [each - a[:, None] * other - mean[:, None] * (b - other) for a, b, each in zip(x, y, xy)]
    return torch.stack(rows)


def _directions(xx: Tensor, xy: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical directions a [D, K], b [E, K] and the weight of each [K], which sum to 1."""
    first, second = _whitening(xx), _whitening(yy)
    u, _, v = torch.linalg.svd(first.T @ xy @ second, full_matrices=False)
    a = first @ u
    weights = (a.T @ xx).abs().sum(1)
    return a, second @ v.T, weights / weights.sum()


def _whitening(covariance: Tensor) -> Tensor:
    """[D, K]: K uncorrelated directions of variance 1, those without variance left out."""
    scale = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0)
    values, vectors = torch.linalg.eigh(covariance * scale[:, None] * scale)
    kept = values > SMALLEST
    return scale[:, None] * vectors[:, kept] / values[kept].sqrt()


def _interval(value: float, groups: Tensor) -> Estimate:
    """Student's t from a value for each group; nothing is more alike than 1."""
    error = float(groups.std()) / len(groups) ** 0.5
    half = float(stdtrit(len(groups) - 1, 0.975)) * error
    return Estimate(value, value - half, min(1.0, value + half))
