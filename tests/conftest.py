"""What many tests need: the project on the path, the speech sample, a made-up corpus."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Two threads for tiny models win nothing, and beside a busy process they are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile
import yaml

# What a shell without job control starts in the background is deaf to Ctrl-C, and so its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("SPEECH_SAMPLE", str(ROOT.parent / "shared" / "speech"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LABELS = ["low", "mid", "high"]


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder: tones of three pitches by six speakers, with a text of one word each."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    rows = ["path\tspeaker\tsplit\tlabel\ttext"]
    for speaker in range(6):
        split = ["train", "train", "train", "dev", "test", "test"][speaker]
        for number in range(12):
            label = number % 3
            time = np.arange(int(16_000 * rng.uniform(0.3, 0.6))) / 16_000
            wav = 0.3 * np.sin(2 * np.pi * [200, 600, 1800][label] * time)
            wav += 0.02 * rng.standard_normal(len(time))
            name = f"{speaker}-{number}.wav"
            soundfile.write(folder / name, wav, 16_000)
            rows.append(f"{name}\ts{speaker}\t{split}\t{LABELS[label]}\t{LABELS[label].upper()}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def suite(tmp_path: Path, tones: Path) -> Path:
    """A suite of two tasks and a merged upstream on the tones, seconds to run."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    corpus = f"corpus: {{name: manifest, root: {tones}, target: %s}}\n"
    (folder / "label.yaml").write_text(
        "kind: task\ntask: classify\n" + corpus % "label"
        + "train: {steps: 60, batch: 12, lr: [1.0e-2, 1.0e-1], eval_every: 20, seeds: 2}\n"
    )  # fmt: skip
    (folder / "word.yaml").write_text(
        "kind: task\ntask: asr\n" + corpus % "text"
        + "head: {projector: 16, hidden: 16, depth: 1}\n"
        + "train: {steps: 20, batch: 12, lr: [1.0e-2], eval_every: 10, seeds: 2, specaug: true}\n"
    )  # fmt: skip
    return folder


@pytest.fixture
def recipes(suite: Path) -> Path:
    """The suite with a merged upstream: a tiny HuBERT, fine-tuned on the labels."""
    from tests import tiny  # torch and transformers, which xdist's own process needs for nothing

    base = tiny.hf_folder(suite.parent, "hubert")
    common = {"kind": "finetune", "upstream": str(base), "steps": 20, "batch": 6}
    for name, task in (("finetune", "label"), ("finetune_word", "word")):
        content = {**common, "task": f"{task}.yaml", "eval_every": 5, "lr": 1e-2}
        if task == "word":
            content |= {"specaug": True, "head": {"projector": 8, "hidden": 8, "depth": 1}}
        (suite / f"{name}.yaml").write_text(yaml.safe_dump(content))
    content = {"kind": "merge", "base": str(base), "tuned": ["finetune.yaml"]}
    (suite / "merged.yaml").write_text(yaml.safe_dump({**content, "params": {"alpha": 0.25}}))
    return suite


@pytest.fixture(autouse=bool(os.environ.get("PRETEND_GPU")))
def on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With PRETEND_GPU=1 any test runs as on a machine with a GPU (tests/pretend.py)."""
    from tests.pretend import pretended

    with pretended(monkeypatch):
        yield
