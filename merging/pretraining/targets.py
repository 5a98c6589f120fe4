"""Stage 2 of pre-training: what it predicts, k-means clusters of MFCC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.pretraining.stem import MEL, spectra
from upstream import dsp

if TYPE_CHECKING:
    from sklearn.cluster import MiniBatchKMeans

CEPSTRA = 13
SAMPLE = 200_000  # frames that k-means sees


def mfcc(wav: Tensor) -> Tensor:
    """[T, 39]: 13 cepstra of the log-mel spectrum with first and second differences."""
    mel, _ = spectra(wav[None])
    cepstra = mel[0] @ dsp.dct_matrix(CEPSTRA, MEL)
    first = dsp.deltas(cepstra.T).T
    return torch.cat([cepstra, first, dsp.deltas(first.T).T], -1)


def cluster(features: list[Tensor], k: int, seed: int) -> Tensor:
    """K-means on 200,000 random frames; the nearest centre of every frame, [frames] int16."""
    frames = torch.cat(features).numpy()
    rng = np.random.default_rng(seed)
    return nearest(means(frames[rng.permutation(len(frames))[:SAMPLE]], k, seed), frames)


def means(sample: NDArray[np.float32], k: int, seed: int) -> MiniBatchKMeans:
    """K-means of frames [N, D], N at least k."""
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(k, batch_size=10_000, n_init=3, random_state=seed).fit(sample)


def nearest(fitted: MiniBatchKMeans, frames: NDArray[np.float32]) -> Tensor:
    """The nearest centre of each frame, [N] int16."""
    return torch.from_numpy(fitted.predict(frames).astype(np.int16))


def masked_spans(starts: Tensor, span: int) -> Tensor:
    """[B, T] bool: each start and the `span - 1` frames behind it."""
    mask = starts.clone()
    for _ in range(span - 1):  # each span grows by one frame to the right
        mask[:, 1:] |= mask[:, :-1].clone()
    return mask


def mfcc_targets(wavs: list[Tensor], k: int, seed: int) -> Tensor:
    """[2, frames] int16: clusters of MFCC with, and without, the utterance mean removed.

    Cepstra and differences are divided by the deviation of the cepstrum: low ones do not decide.
    """
    raw = [mfcc(wav.float() / 32768) for wav in wavs]
    flat = [cepstra - cepstra.mean(0) for cepstra in raw]
    deviation = torch.cat(flat).std(0)[:CEPSTRA].repeat(3)
    return torch.stack([cluster([c / deviation for c in kind], k, seed) for kind in (flat, raw)])
