"""SpecAugment on weighted-sum features, with SUPERB's settings (s3prl downstream/specaug.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upstream.features.device import moved

WARP = 5  # frames
FREQUENCY = (50, 4)  # widest mask, number of masks, over feature dimensions
TIME = (40, 2)


def specaug(x: Tensor, lens: Tensor) -> Tensor:
    """[B, T, D] zero-padded -> the same shape: time warp, then frequency masks, then time masks.

    lens [B]: best of the CPU, which draws all random numbers, also where x is on a GPU.
    """
    x = torch.stack([_warp(item, n) for item, n in zip(x, lens.tolist())])
    x = x * moved(_keep(x.shape[0], x.shape[2], *FREQUENCY), x.device)[:, None, :]
    return x * moved(_keep(x.shape[0], x.shape[1], *TIME), x.device)[:, :, None]


def _warp(item: Tensor, n: int) -> Tensor:
    """[T, D]: frames before a random centre are stretched to end at a random place near it."""
    if n - WARP <= WARP:
        return item
    centre = int(torch.randint(WARP, n - WARP, ()))
    warped = int(torch.randint(centre - WARP, centre + WARP, ())) + 1
    parts = [_resize(item[:centre], warped), _resize(item[centre:n], n - warped), item[n:]]
    return torch.cat(parts)


def _resize(part: Tensor, length: int) -> Tensor:
    size = (length, part.shape[1])
    return F.interpolate(part[None, None], size=size, mode="bicubic", align_corners=False)[0, 0]


def _keep(batch: int, length: int, widest: int, masks: int) -> Tensor:
    """[B, length] of 1 and 0: `masks` random spans of width 0..widest-1 per utterance are 0."""
    keep = torch.ones(batch, length)
    positions = torch.arange(length)
    for _ in range(masks):
        width = torch.randint(0, widest, (batch, 1))
        last = max(1, length - int(width.max()))
        start = torch.randint(0, last, (batch, 1))
        keep = keep * ~((positions >= start) & (positions < start + width))
    return keep
