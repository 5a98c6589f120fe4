"""Score an encoder of your own against a filter bank, on a tiny corpus that is made here.

    python docs/score_own_encoder.py FOLDER      # own_encoder, if no folder is given

It writes a corpus of tones (twelve speakers, three pitches) and a suite of one task into FOLDER,
and scores the class below on it with `benchmark.py`'s own command; results are in FOLDER/results.
The bands are coarser than the filter bank's, and the tones are close together: expect it to be
worse. To score yours on real data, put the class into a file: `--upstream FILE.py:CLASS`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from upstream.base import Hidden, Upstream, valid

RATE = 16_000  # samples a second
PITCHES = {"low": 500.0, "mid": 580.0, "high": 670.0}  # Hz, give or take 5 %
SPEAKERS, TAKES = 12, 6  # takes of each pitch by each speaker
TASK = """\
kind: task
task: classify
corpus: {{name: manifest, root: {root}, target: pitch, split_by: speaker, dev: 0.2, test: 0.5}}
train: {{steps: 150, batch: 24, lr: [1.0e-3, 1.0e-2], eval_every: 50, seeds: 3}}
"""


class Bands(Upstream):
    """Log energies of 40 bands of equal width in frames of 25 ms; nothing is learnt."""

    num_layers, dim, stride = 1, 40, 400

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        """wavs [B, N], lens [B] in samples -> layers [1, B, T, 40], lens [B] in frames."""
        spare = -wavs.shape[1] % self.stride
        frames = torch.nn.functional.pad(wavs, (0, spare)).unflatten(1, (-1, self.stride))
        power = torch.fft.rfft(frames).abs().square()[..., :200]  # [B, T, 200]
        bands = power.unflatten(-1, (self.dim, -1)).mean(-1).add(1e-6).log()  # [B, T, 40]
        lens = (lens + self.stride - 1) // self.stride
        mask = valid(lens, bands.shape[1])[:, :, None]
        return Hidden((bands * mask)[None], lens)


def write_corpus(folder: Path) -> None:
    """Short noisy tones, and manifest.tsv with the columns path, speaker and pitch."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    rows = ["path\tspeaker\tpitch"]
    for speaker in range(SPEAKERS):
        for take in range(TAKES):
            for pitch, hertz in PITCHES.items():
                time = np.arange(int(RATE * generator.uniform(0.3, 0.6))) / RATE
                tone = hertz * generator.normal(1, 0.05)
                wave = 0.1 * np.sin(2 * np.pi * tone * time)
                wave += 0.1 * generator.standard_normal(len(time))
                name = f"{speaker}-{take}-{pitch}.wav"
                soundfile.write(folder / name, wave, RATE)
                rows.append(f"{name}\tspeaker{speaker}\t{pitch}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")


def main(folder: Path) -> int:
    """Make corpus and suite, score and compare; returns the exit status of the command."""
    import benchmark  # not above: the class's file is read again in every process that needs it

    write_corpus(folder / "corpus")
    suite = folder / "suite"
    suite.mkdir(exist_ok=True)
    (suite / "pitch.yaml").write_text(TASK.format(root=(folder / "corpus").absolute()))
    upstreams = f"{os.path.relpath(__file__)}:Bands,fbank_no_cmvn"
    flags = ["--suite", suite, "--reference", "fbank_no_cmvn", "--workers", 1]
    command = ["--upstream", upstreams, *flags, "--results", folder / "results"]
    return benchmark.main([str(word) for word in command])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_encoder")))
