"""s3prl's own expert, featurizer, heads and optimizer, the encoder inside every micro-step.

The loop is the one of its `downstream/runner.py`: encoder without gradient, featurizer, SpecAugment
(ASR), head, loss divided by the accumulation, backward; after so many micro-batches clipping and an
update. Its logging, decoding of training batches and dev evaluations are left out, and reading
audio is not charged to it: its worker processes do that meanwhile.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from downstream.base import Labels
from downstream.run.prepare import Prepared
from tests.bench.machine import clock, memory_gb
from tests.bench.subject import Setup, amount, prepared, training
from upstream.base import SAMPLE_RATE

SPECAUG: dict[str, Any] = {  # of its asr config
    "apply_time_warp": True, "time_warp_window": 5, "time_warp_mode": "bicubic",
    "apply_freq_mask": True, "freq_mask_width_range": [0, 50], "num_freq_mask": 4,
    "apply_time_mask": True, "time_mask_width_range": [0, 40], "num_time_mask": 2,
}  # fmt: skip
HALVED = 300_000  # samples: a slice of PR that starts with a longer utterance is halved


def load_expert(setup: Setup) -> Any:
    """Its HuBERT expert, with the same weights as ours."""
    from s3prl.upstream.hubert.expert import UpstreamExpert

    return UpstreamExpert(setup.work / "encoder.pt").to(setup.device).eval()


class TheirHead(nn.Module):
    """Projector, model and loss as its downstream experts put them together."""

    def __init__(self, task: str, dim: int, classes: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        from s3prl.downstream.asr.model import RNNs
        from s3prl.downstream.model import FrameLevel, UtteranceLevel

        width = sizes.get("projector", 1024) if task == "asr" else 256
        self.projector = nn.Linear(dim, width)
        self.ctc = task in ("pr", "asr")
        self.model: Any
        if task == "asr":
            hidden, no = [sizes.get("hidden", 1024)] * 2, [False, False]
            settings = (True, hidden, [0.2, 0.2], no, no, [1, 1], "concat", -1)
            self.model = RNNs(width, classes, 320, "LSTM", *settings)
        elif task == "pr":
            self.model = FrameLevel(width, classes)
        else:
            self.model = UtteranceLevel(width, classes, post_net={"select": "FrameLevel"})
        self.objective: Any = nn.CTCLoss(blank=0, zero_infinity=True)
        if not self.ctc:
            self.objective = nn.CrossEntropyLoss()

    def forward(self, features: list[Tensor], targets: list[list[int]]) -> Tensor:
        """The loss of a batch of unpadded features."""
        device = features[0].device
        lens = torch.IntTensor([len(feature) for feature in features])
        padded = self.projector(pad_sequence(features, batch_first=True))
        if not self.ctc:
            logits, _ = self.model(padded, lens.to(device))
            return self.objective(logits, torch.LongTensor([t[0] for t in targets]).to(device))
        logits, lens = self.model(padded, lens)
        labels = pad_sequence([torch.LongTensor(t) for t in targets], batch_first=True)
        counts = torch.IntTensor([len(t) for t in targets])
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        return self.objective(log_probs, labels.to(device), lens, counts)


def micro_batches(task: Prepared, labels: Labels, count: int) -> list[list[int]]:
    """`count` batches as its samplers draw them, seeded.

    SID and ER: shuffled. PR: slices of utterances that follow each other in target length. ASR:
    buckets of 16 that follow each other in audio length (its 32, which it always halves).
    """
    train, size = training(task), task.recipe.train.batch
    drawn = random.Random(0)
    if task.recipe.name in ("sid", "er"):
        epochs = -(-count * size // len(train))
        order = [i for _ in range(epochs) for i in drawn.sample(train, len(train))]
        return [order[k * size : (k + 1) * size] for k in range(count)]
    if task.recipe.name == "pr":
        train.sort(key=lambda i: -len(labels.encode(task.targets[i])))
        starts = [min(len(train) - size, drawn.randrange(len(train))) for _ in range(count)]
        long = HALVED / SAMPLE_RATE
        halved = [size // 2 if task.clips[train[s]].seconds > long else size for s in starts]
        return [train[s : s + n] for s, n in zip(starts, halved)]
    train.sort(key=lambda i: -task.clips[i].seconds)
    buckets = [train[k : k + size] for k in range(0, len(train), size)]
    return [bucket for _ in range(count) for bucket in drawn.sample(buckets, len(buckets))][:count]


def measure(setup: Setup, name: str) -> dict[str, Any]:
    """Time a few micro-steps of one task and scale them to all steps and learning rates.

    Time is scaled by the audio in the batches, so that a draw of long ones does not count double.
    """
    from s3prl.downstream.specaug import SpecAug
    from s3prl.optimizers import get_optimizer
    from s3prl.upstream.interfaces import Featurizer

    setup.prepare()
    task, count = prepared(setup, name), setup.micro_steps(name)
    recipe = task.recipe
    labels = task.labels("")
    expert = load_expert(setup)
    featurizer = Featurizer(expert, upstream_device=setup.device).to(setup.device).train()
    head = TheirHead(name, featurizer.output_dim, labels.size, recipe.head)
    head = head.to(setup.device).train()
    settings = {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": recipe.train.lr[-1]}
    optimizer = get_optimizer([featurizer, head], recipe.train.steps, settings)
    parameters = [*featurizer.parameters(), *head.parameters()]
    specaug = SpecAug(**SPECAUG) if recipe.train.specaug else None
    batches = micro_batches(task, labels, count)
    shortest = sorted(training(task), key=lambda i: task.clips[i].seconds)[:2]  # to warm up
    spent = {"encoder": 0.0, "head": 0.0, "input": 0.0}
    for number, batch in enumerate([shortest, *batches]):
        times = [clock(setup.device)]
        wavs = [task.clips[i].load().to(setup.device) for i in batch]
        times.append(clock(setup.device))
        with torch.no_grad():
            states = expert(wavs)
        times.append(clock(setup.device))
        features = featurizer(wavs, states)
        if specaug:
            features, _ = specaug(features)
        loss = head(features, [labels.encode(task.targets[i]) for i in batch])
        (loss / recipe.train.accumulate).backward()
        if number % recipe.train.accumulate == 0:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
            optimizer.step()
            optimizer.zero_grad()
        times.append(clock(setup.device))
        if number:
            for part, a, b in zip(("input", "encoder", "head"), times, times[1:]):
                spent[part] += b - a
    audio = sum(task.clips[i].seconds for batch in batches for i in batch)
    whole = amount(task)
    padded = sum(len(b) * max(task.clips[i].seconds for i in b) for b in batches)
    return {
        "micro_steps": count,
        "micro_batch": recipe.train.batch,
        "audio_seconds": audio,
        "padded_audio_seconds": padded,
        **{f"{part}_seconds": seconds for part, seconds in spent.items()},
        "scaled_encoder": spent["encoder"] / audio * whole.audio,
        "scaled_heads": spent["head"] / audio * whole.audio,
        "memory_gb": memory_gb(setup.device),
    }
