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
  correlations from the others: on their own frames they would be far above 0 for independent
  features. Any invertible linear map of the other upstream has no say in it.

Intervals are 95 %, Student's t over groups: the jackknife that deletes one group at a time for
`cka`, the groups' own values for the others. tests/upstream/test_similarity.py simulates coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        self.two = flat @ flat.T  # [G, G]: mean of k(i, j) l(i, j) over frames i of a, j of b
        self.k, self.other = x @ x.T, y @ y.T
        self.three = torch.stack([x @ each @ y.T for each in xy])  # [a, b, c]

    def of(self, groups: Sequence[int]) -> float:
        """From these groups alone."""
        n = len(groups)
        index = torch.tensor(groups)
        pick = [torch.meshgrid(*[index] * dims, indexing="ij") for dims in (2, 3)]
        two, k, other = (each[pick[0]] for each in (self.two, self.k, self.other))
        three = self.three[pick[1]]
        apart = 1 - torch.eye(n, dtype=two.dtype)
        third = apart[:, :, None] * apart[:, None, :] * apart[None]
        k, other = k * apart, other * apart
        # pairs (a, b) and (c, d) without a group in common: all, less those that share one or two
        four = k.sum() * other.sum() - 4 * (k.sum(0) @ other.sum(0)) + 2 * (k * other).sum()
        counts = [n * (n - 1), n * (n - 1) * (n - 2), n * (n - 1) * (n - 2) * (n - 3)]
        sums = [(two * apart).sum(), (three * third).sum(), four]
        first, mixed, product = (float(s) / c for s, c in zip(sums, counts))
        return first + product - 2 * mixed


def _pwcca(m: Moments) -> Tensor:
    """PWCCA of one layer in each group [G], by directions from the folds that it is not in."""
    fold = torch.arange(len(m.x)) % FOLDS
    found = torch.empty(len(m.x), dtype=torch.float64)
    for held_out in range(FOLDS):
        a, b, weights = _directions(m, fold != held_out)
        for group in torch.nonzero(fold == held_out)[:, 0].tolist():
            xx, xy, yy = _covariances(m, [group])
            variances = ((a.T @ xx).T * a).sum(0) * ((b.T @ yy).T * b).sum(0)
            correlations = ((xy @ b) * a).sum(0) / variances.clamp(min=0).sqrt()
            found[group] = (weights * correlations.nan_to_num()).sum()
    return found


def _directions(m: Moments, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical directions a [D, K], b [E, K] and the weight of each [K], which sum to 1."""
    xx, xy, yy = _covariances(m, groups)
    first, second = _whitening(xx), _whitening(yy)
    u, _, v = torch.linalg.svd(first.T @ xy @ second, full_matrices=False)
    a = first @ u
    weights = (a.T @ xx).abs().sum(1)
    return a, second @ v.T, weights / weights.sum()


def _covariances(m: Moments, groups: Tensor | list[int]) -> tuple[Tensor, Tensor, Tensor]:
    x, y = m.x[groups].mean(0), m.y[groups].mean(0)
    xx, xy, yy = (each[groups].mean(0) for each in (m.xx, m.xy, m.yy))
    return xx - x[:, None] * x, xy - x[:, None] * y, yy - y[:, None] * y


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
