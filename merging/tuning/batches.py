"""The batches of stage 1, of similar length: so many utterances, or so many seconds of audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from downstream.run.order import Stream, bounded
from merging.tuning.recipe import TuningRecipe
from upstream.base import SAMPLE_RATE
from upstream.features.clips import Clip


def training(
    recipe: TuningRecipe,
    clips: Sequence[Clip],
    indices: Sequence[int],
    windows: Mapping[int, Sequence[int]],
    stride: int,
    seed: int,
) -> Stream:
    """Micro-batches by their number; `stride` of a frame in samples."""
    if recipe.batch is not None:
        frames = (torch.tensor([clip.seconds for clip in clips]) * SAMPLE_RATE / stride).long()
        return Stream(indices, frames, recipe.batch, seed, True, windows)
    assert recipe.batch_seconds is not None
    heard = [max(clips[j].seconds for j in windows.get(i, [i])) for i in range(len(clips))]
    samples = (torch.tensor(heard, dtype=torch.float64) * SAMPLE_RATE).ceil().long()
    most = recipe.batch_seconds * SAMPLE_RATE
    return Stream(indices, samples, None, seed, True, windows, most=most)


def scoring(recipe: TuningRecipe, clips: Sequence[Clip], indices: Sequence[int]) -> list[list[int]]:
    """All of `indices`, in batches."""
    order = sorted(indices, key=lambda i: clips[i].seconds)
    if recipe.batch is not None:
        return [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
    assert recipe.batch_seconds is not None
    order.reverse()
    parts = bounded([clips[i].seconds for i in order], recipe.batch_seconds)
    return [[order[place] for place in part] for part in parts]
