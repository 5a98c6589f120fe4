"""This project on the same work, through its own functions: one pass, then all heads together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from downstream.run.prepare import Prepared
from downstream.run.train import Data, fit
from tests.bench import machine, s3prl_side
from tests.bench.machine import clock, memory_gb
from tests.bench.subject import Amount, Setup, amount, load_encoder, prepared, training
from upstream.base import SAMPLE_RATE, Upstream
from upstream.encoder.encoder import Encoder
from upstream.features import extract as cache
from upstream.features import precision
from upstream.features.clips import Clip
from upstream.features.codec import Features
from upstream.features.store import Store

PROBE = 120.0  # seconds of audio for the passes that are only compared with each other
ALPHAS = (1.0, 0.99, 0.98)  # factors on the weights behind the CNN


class Timed:
    """Features that count the time spent on reading them and the audio of the batches."""

    def __init__(self, features: Features, task: Prepared, device: str) -> None:
        self.features, self.device = features, device
        self.layers, self.dim, self.lens = features.layers, features.dim, features.lens
        self.seconds = [clip.seconds for clip in task.clips]
        self.train = set(task.splits[""]["train"])
        self.begun: float | None = None
        self.reading = self.audio = 0.0

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        begun = clock(self.device)
        if self.begun is None:
            self.begun = begun
        found = self.features.batch(indices)
        self.reading += clock(self.device) - begun
        self._hear(indices)
        return found

    def on(
        self, device: torch.device, order: Iterable[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Of a GPU: the time until a batch can be used there."""
        kept: Any = self.features
        batches = kept.on(device, order)
        while True:
            begun = clock(self.device)
            if self.begun is None:
                self.begun = begun
            batch = next(batches, None)
            if batch is None:
                return
            self.reading += clock(self.device) - begun
            self._hear(batch[0])
            yield batch

    def _hear(self, indices: Sequence[int]) -> None:
        self.audio += sum(self.seconds[i] for i in indices if i in self.train)


def timed_forward(upstream: Upstream, device: str) -> list[float]:
    """A list that grows by the seconds of every call of `upstream`."""
    begun: list[float] = []
    seconds: list[float] = []
    upstream.register_forward_pre_hook(lambda *_: begun.append(clock(device)))
    upstream.register_forward_hook(lambda *_: seconds.append(clock(device) - begun.pop()))
    return seconds


def measure(setup: Setup, name: str) -> dict[str, Any]:
    """One task: the pass over all its utterances, and training all learning rates' heads.

    SID and ER are trained in full; of PR and ASR a few steps are timed and scaled by their audio.
    """
    setup.prepare()
    task, encoder = prepared(setup, name), load_encoder(setup)
    forward = timed_forward(encoder, setup.device)
    store, fingerprint = Store(setup.work / "cache"), encoder.fingerprint()
    missing = store.missing(fingerprint, task.kind, task.clips)
    begun = clock(setup.device)
    for shard in cache.shards(missing):
        cache.extract(encoder, shard, [task.kind], store, batch_seconds=setup.batch_seconds)
    extracted = clock(setup.device) - begun
    features = Timed(store.open(fingerprint, task.kind, task.clips), task, setup.device)
    heads, steps = train(setup, task, features)
    whole = amount(task)
    full = steps == whole.steps
    scale = 1.0 if full else whole.audio / whole.rates / features.audio
    return {
        "steps": steps,
        "training_audio_seconds": features.audio,
        "pass_audio_seconds": sum(clip.seconds for clip in missing),
        "extract_seconds": extracted,
        "encoder_seconds": sum(forward),
        "heads_seconds": heads - features.reading,
        "reading_seconds": features.reading,
        "scaled_heads": (heads - features.reading) * scale,
        "scaled_reading": features.reading * scale,
        "utterances": len(training(task)),
        "whole": whole._asdict(),
        "encoder_flops": pass_flops(encoder, task.clips),
        "heads_flops": training_flops(encoder, task, whole),
        "memory_gb": memory_gb(setup.device),
    }


def train(setup: Setup, task: Prepared, features: Timed) -> tuple[float, int]:
    """Seconds of `fit`, and how many steps it did.

    A shortened training is timed from its first batch and selects on one dev utterance.
    """
    recipe, split = task.recipe, dict(task.splits[""])
    steps = min(setup.steps(recipe.name), recipe.train.steps)
    if steps < recipe.train.steps:
        split["train"], split["dev"] = training(task), split["dev"][:1]
        shorter = dataclasses.replace(recipe.train, steps=steps)
        recipe = dataclasses.replace(recipe, train=shorter)
    data = Data(features, task.items, task.labels(""))
    begun = clock(setup.device)
    fit(recipe, data, split, seed=0, device=setup.device)
    ended = clock(setup.device)
    if steps < task.recipe.train.steps and features.begun is not None:
        begun = features.begun
    return ended - begun, steps


def pass_flops(encoder: Encoder, clips: Sequence[Clip]) -> float:
    """What one pass over the clips needs."""
    lengths = [round(clip.seconds * SAMPLE_RATE) for clip in clips]
    return sum(machine.encoder_flops(encoder.config, length) for length in lengths)


def training_flops(encoder: Encoder, task: Prepared, whole: Amount) -> float:
    """What training all the task's heads needs."""
    kind = task.recipe.kind_of_task()
    shape = (encoder.num_layers, encoder.dim, task.labels("").size)
    rows = whole.audio * SAMPLE_RATE / encoder.stride
    if kind.features == "mean":
        rows = whole.audio / whole.seconds
    return rows * machine.head_flops(task.recipe.head_constructor()(*shape), *shape)


def measure_encoder(setup: Setup) -> dict[str, Any]:
    """Three upstreams with one CNN: a pass of each alone, and with the CNN's outputs shared.

    Besides: s3prl's expert and ours utterance by utterance, and the machine's peak.
    """
    setup.prepare()
    peak = machine.peak(setup.device)
    clips: list[Clip] = []
    most = 10.0 if setup.quick else PROBE if setup.device == "cpu" else math.inf
    for clip in prepared(setup, "asr").clips:
        if sum(one.seconds for one in clips) < most:
            clips.append(clip)
    encoder = load_encoder(setup)
    alone = compare_alone(setup, encoder, clips[:6])
    forward = timed_forward(encoder, setup.device)
    spent: dict[str, list[float]] = {"alone": [], "forward": [], "shared": []}
    for factor in ALPHAS:
        change_weights(encoder, factor)
        forward.clear()
        for name in ("alone", "shared"):
            store, begun = Store(setup.work / name), clock(setup.device)
            cache.extract(encoder, clips, ["mean"], store, share_cnn=name == "shared",
                          batch_seconds=setup.batch_seconds)  # fmt: skip
            spent[name].append(clock(setup.device) - begun)
        spent["forward"].append(sum(forward))
    lengths = [round(clip.seconds * SAMPLE_RATE) for clip in clips]
    low = {} if setup.device == "cpu" else low_precision(setup, encoder, clips, forward)
    return {
        "audio_seconds": sum(clip.seconds for clip in clips),
        "pass_seconds": spent["alone"],
        "forward_seconds": spent["forward"],
        "first_shared_pass_seconds": spent["shared"][0],
        "further_pass_seconds": spent["shared"][1:],
        "cnn_flops": sum(machine.cnn_flops(encoder.config, n) for n in lengths),
        "flops": pass_flops(encoder, clips),
        "peak_flops": max(peak, machine.peak(setup.device)),
        **alone,
        **low,
        "machine": machine.describe(setup.device),
    }


def low_precision(
    setup: Setup, encoder: Encoder, clips: Sequence[Clip], forward: list[float]
) -> dict[str, Any]:
    """A pass in bfloat16, twice (the first warms up), its peak, and what it does to the states."""
    encoder.precision, spent = "bfloat16", list[float]()
    for number in range(2):
        forward.clear()
        begun = clock(setup.device)
        cache.extract(encoder, clips, ["mean"], Store(setup.work / f"low-{number}"),
                      batch_seconds=setup.batch_seconds)  # fmt: skip
        spent.append(clock(setup.device) - begun)
    seconds, layers = sum(forward), precision.error(encoder, clips)
    encoder.precision = "float32"
    return {
        "low_pass_seconds": min(spent),
        "low_forward_seconds": seconds,
        "low_peak_flops": machine.peak(setup.device, torch.bfloat16),
        "low_error_by_layer": layers,
    }


def change_weights(encoder: Encoder, factor: float) -> None:
    """Another upstream with the same CNN."""
    for name, parameter in encoder.named_parameters():
        if "feature_extractor" not in name:
            parameter.data.mul_(factor)


def compare_alone(setup: Setup, ours: Encoder, clips: Sequence[Clip]) -> dict[str, float]:
    """Utterances one by one, in turn through s3prl's expert and through ours: no padding."""
    theirs = s3prl_side.load_expert(setup)
    spent = {"s3prl_alone_seconds": 0.0, "ours_alone_seconds": 0.0}
    with torch.inference_mode():
        for number, clip in enumerate([clips[0], *clips]):
            wav = clip.load().to(setup.device)
            times = [clock(setup.device)]
            theirs([wav])
            times.append(clock(setup.device))
            ours(wav[None], torch.tensor([len(wav)], device=setup.device))
            times.append(clock(setup.device))
            if number:  # the first time is for warming up
                for side, a, b in zip(spent, times, times[1:]):
                    spent[side] += b - a
    return spent
