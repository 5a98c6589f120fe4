"""What is measured: one encoder, four tasks on real speech, and how much of each is timed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from downstream.run.prepare import Prepared
    from upstream.encoder.encoder import Encoder

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
SPEECH = PROJECT.parent / "shared" / "speech"
TASKS = ("sid", "er", "pr", "asr")


@dataclasses.dataclass(frozen=True)
class Setup:
    """One device and one size; `work` is a temporary folder for weights and features."""

    work: Path
    device: str
    quick: bool

    def micro_steps(self, task: str) -> int:
        """How many micro-batches of s3prl are timed (ASR's takes minutes of CPU time)."""
        if self.quick:
            return 1
        return 20 if self.device != "cpu" else {"sid": 3, "er": 6, "pr": 3, "asr": 2}[task]

    def steps(self, task: str) -> int:
        """How many of our training steps are timed: all where the head sees time means."""
        if self.quick:
            return 2
        if task in ("sid", "er"):
            return 1000
        return 50 if self.device != "cpu" else {"pr": 10, "asr": 2}[task]

    @property
    def batch_seconds(self) -> float:
        """Audio in a batch of the encoder, as a run has it."""
        return 32.0 if self.device == "cpu" else 600.0

    def prepare(self) -> None:
        """Threads as a user has them, and the speech sample where the suite looks for it."""
        torch.set_num_threads(os.cpu_count() or 1)
        os.environ.setdefault("SPEECH_SAMPLE", str(SPEECH))


class Amount(NamedTuple):
    """What a whole training of a task is: 1,000 updates for each of five learning rates."""

    steps: int
    accumulate: int
    batch: int
    rates: int
    seconds: float  # mean length of a training utterance

    @property
    def audio(self) -> float:
        """Seconds of audio that pass a head in all."""
        return self.steps * self.accumulate * self.batch * self.rates * self.seconds


def write_encoder(setup: Setup) -> None:
    """A HuBERT Base (tiny if quick) with random weights, in transformers' and s3prl's formats."""
    import transformers

    from upstream.checkpoints.write import to_s3prl
    from upstream.encoder import encoder as encoders

    small: dict[str, Any] = {
        "conv_dim": [32] * 7, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16,
    }  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.HubertConfig(**(small if setup.quick else {}))
    transformers.HubertModel(config).save_pretrained(setup.work / "encoder")
    encoder = encoders.load(setup.work / "encoder", normalize=False)
    torch.save(to_s3prl(encoder), setup.work / "encoder.pt")


def load_encoder(setup: Setup) -> Encoder:
    """Our reading of it."""
    from upstream.encoder import encoder as encoders

    return encoders.load(setup.work / "encoder", normalize=False).to(setup.device).eval()


def prepared(setup: Setup, task: str) -> Prepared:
    """The task's recipe with its corpus read."""
    from downstream import recipe
    from downstream.run.prepare import prepare

    small = {"head.projector": 32, "head.hidden": 32} if setup.quick and task == "asr" else None
    return prepare(recipe.load(HERE / "suite" / f"{task}.yaml", small), setup.work)


def training(task: Prepared) -> list[int]:
    """Training utterances, each file once (a long one of SID has several crops).

    For CTC tasks so many that all batches are full, as nearly all are on a whole corpus.
    """
    train, size = task.splits[""]["train"], task.recipe.train.batch
    once = list({task.clips[i].path: i for i in reversed(train)}.values())[::-1]
    return once if task.kind == "mean" else once[: len(once) // size * size]


def amount(task: Prepared) -> Amount:
    """What s3prl and we both have to do."""
    train, clips = task.recipe.train, [task.clips[i] for i in training(task)]
    seconds = sum(clip.seconds for clip in clips) / len(clips)
    return Amount(train.steps, train.accumulate, train.batch, len(train.lr), seconds)
