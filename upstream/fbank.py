"""The FBANK baseline of SUPERB: what a learned upstream has to beat."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upstream import dsp
from upstream.base import Hidden, Upstream

BINS = 80  # mel
EPS = 1e-10


class Fbank(Upstream):
    """80 Kaldi log mel energies, their deltas and delta-deltas: one layer of 240, every 10 ms.

    As s3prl/upstream/baseline (fbank.yaml, extracter.py), each utterance on its own, no partial
    windows. An utterance shorter than one window counts as zero-padded to one.
    `cmvn`: per-utterance mean and (unbiased) deviation are removed. The mean over time is then
    exactly zero, so a task whose head averages over time (SID, ER, KS, IC) learns nothing from it;
    SUPERB's leaderboard scores those with `fbank_no_cmvn`.
    """

    num_layers, dim, stride = 1, 3 * BINS, dsp.KALDI_HOP
    source = "Kaldi's filter bank (upstream/dsp.py)"

    def __init__(self, cmvn: bool = True) -> None:
        super().__init__()
        self.cmvn = cmvn

    def identity(self) -> dict[str, Any]:
        return {"features": "kaldi fbank 80, 25/10 ms, 2 deltas of 5", "cmvn": self.cmvn}

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        """wavs [B, N] in [-1, 1], lens [B] in samples -> layers [1, B, T, 240]."""
        rows = [self._features(wav[:n]) for wav, n in zip(wavs, lens.tolist())]
        frames = torch.tensor([len(row) for row in rows], device=wavs.device)
        return Hidden(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[None], frames)

    def frames(self, samples: Tensor) -> Tensor:
        """As of Upstream: 98 for 16000."""
        return (samples.clamp(min=dsp.KALDI_WINDOW) - dsp.KALDI_WINDOW) // dsp.KALDI_HOP + 1

    def _features(self, wav: Tensor) -> Tensor:
        """[n] -> [T, 240]."""
        wav = F.pad(wav, (0, max(0, dsp.KALDI_WINDOW - len(wav))))
        static = dsp.kaldi_fbank(wav, BINS)
        delta = dsp.deltas(static.T)
        x = torch.cat([static, delta.T, dsp.deltas(delta).T], dim=1)
        if not self.cmvn:
            return x
        # One frame has no unbiased deviation: s3prl's NaN becomes the zero the numerator is.
        spread = x.std(0, correction=1) if len(x) > 1 else torch.zeros_like(x[0])
        return (x - x.mean(0)) / (EPS + spread)


no_cmvn = partial(Fbank, cmvn=False)
