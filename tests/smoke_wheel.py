"""The installed wheel, far from any clone: main job, own class, own suite. Run by make test-wheel.

Not a test of pytest's: the tests import the clone, and this must import what was installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import upstream.common

COMMAND = Path(sys.executable).with_name("speech-ft-bench")
SHORT = ["--seeds", "1", "--set", "train.steps=10", "--set", "train.eval_every=5"]

MINE = """
import torch
from upstream.base import Hidden, Upstream, valid

class Mine(Upstream):
    num_layers, dim, stride = 1, 400, 400

    def forward(self, wavs, lens):
        wavs = torch.nn.functional.pad(wavs, (0, -wavs.shape[1] % 400))
        frames = wavs.unflatten(1, (-1, 400))
        lens = (lens + 399) // 400
        return Hidden((frames * valid(lens, frames.shape[1])[:, :, None])[None], lens)
"""

KEYWORD = """
kind: task
task: classify
corpus: {name: manifest, root: corpus, target: word}
train: {steps: 20, batch: 8, lr: [1.0e-2], eval_every: 10, seeds: 1}
"""


def run(folder: Path, *words: str) -> str:
    """What the command prints in `folder`; ends this script where it fails."""
    print("$ speech-ft-bench", *words, flush=True)
    done = subprocess.run([COMMAND, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}\nexit status {done.returncode}")
    return done.stdout


def write_corpus(folder: Path) -> None:
    """A manifest of 24 tones of two pitches by six speakers."""
    import numpy as np
    import soundfile

    folder.mkdir()
    rows = ["path\tspeaker\tsplit\tword"]
    for number in range(24):
        pitch, speaker = number % 2, number // 4
        time = np.arange(8000) / 16_000
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin((1 + pitch) * 2000 * time), 16_000)
        split = "train" if speaker < 3 else "dev" if speaker < 4 else "test"
        rows.append(f"{number}.wav\ts{speaker}\t{split}\t{['low', 'high'][pitch]}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")


def main() -> None:
    clone = Path(__file__).resolve().parents[1]
    if clone / "upstream" in Path(upstream.common.__file__).resolve().parents:
        sys.exit("the clone was imported, not the wheel; run it with python -P")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert "hubert_base" in run(folder, "list", "upstreams")
        assert "hubert-base" in run(folder, "list", "published")
        run(folder, "describe", "hubert_demo")
        (folder / "mine.py").write_text(MINE)
        write_corpus(folder / "corpus")
        (folder / "words").mkdir()
        (folder / "words" / "keyword.yaml").write_text(KEYWORD)
        run(folder, "check", "--upstream", "mine.py:Mine")
        table = run(folder, "--upstream", "mine.py:Mine,hubert_demo,fbank", "--suite", "words")
        assert "mine.py:Mine" in table and "ACC" in table
        run(folder, "finetune", "recipes/demo/finetune.yaml", "--set", "steps=10",
            "--set", "eval_every=5", "--output", "tuned")  # fmt: skip
        run(folder, "merge", "--base", "hubert_demo", "--tuned", "tuned", "--set", "alpha=0.25",
            "--output", "merged")  # fmt: skip
        run(folder, "--upstream", "hf:merged,hf:tuned,hubert_demo", "--downstream", "er", *SHORT)
        run(folder, "compare", "hubert_demo", "./merged")
        assert (folder / "results" / "report.html").is_file()
    print("the wheel works")


if __name__ == "__main__":
    main()
