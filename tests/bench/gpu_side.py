"""What might make a GPU faster, tried: the compiler, FlexAttention, streams, CUDA graphs.

Nothing of it but the streams is in the product: it is to be put there where these figures say that
it pays. What a machine cannot do is told by its error, beside the figures of the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from downstream.base import HEADS
from downstream.recipe import Train
from downstream.run.learner import Batch, Lanes, Learner
from tests.bench.machine import clock, encoder_flops, peak
from tests.bench.subject import Setup, load_encoder
from upstream.base import SAMPLE_RATE
from upstream.encoder import encoder as encoders
from upstream.encoder.encoder import Encoder
from upstream.encoder.transformer import Attention
from upstream.features.forward import forward

SECONDS = 10.0  # of each utterance
RATES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
# head, its classes, utterances in a batch, frames of each (0: means)
STEPS = {
    "sid": ("utterance", 1251, 32, 0),
    "pr": ("frame_ctc", 74, 16, 600),
    "asr": ("recurrent_ctc", 32, 32, 600),
}


def measure(setup: Setup) -> dict[str, Any]:
    """Real-time factors of encoders with their share of the peak, and steps of heads a second."""
    setup.prepare()
    found: dict[str, Any] = {}
    hubert = load_encoder(setup)
    variants: dict[str, Callable[[], Encoder]] = {
        "hubert float32": lambda: hubert,
        "hubert bfloat16": lambda: _low(hubert),
        "hubert bfloat16 compiled": lambda: _compiled(_low(hubert)),
        "wavlm bfloat16": lambda: _low(wavlm(setup)),
        "wavlm bfloat16 compiled": lambda: _compiled(_low(wavlm(setup))),
        "wavlm bfloat16 flex": lambda: with_flex(_low(wavlm(setup)), compiled=True),
    }
    if setup.device == "cpu":  # does it run? In bfloat16 a CPU is very slow
        variants = {
            "hubert float32": lambda: hubert,
            "wavlm float32": lambda: wavlm(setup),
            "wavlm float32 flex": lambda: with_flex(wavlm(setup), compiled=False),
        }
    for name, make in variants.items():
        found[name] = _tried(lambda make=make: _speed(setup, make()))
    for task in STEPS:
        found[f"{task} one by one"] = _tried(lambda task=task: _steps(setup, task, False))
        if setup.device != "cpu":
            found[f"{task} on streams"] = _tried(lambda task=task: _steps(setup, task, True))
    if setup.device != "cpu":
        found["sid as a CUDA graph"] = _tried(lambda: _graphed(setup))
    return found


def _tried(act: Callable[[], dict[str, float]]) -> dict[str, Any]:
    try:
        return act()
    except Exception as error:  # whatever a compiler or a driver says
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def wavlm(setup: Setup) -> Encoder:
    """A WavLM of the bench's size with random weights."""
    import transformers

    folder = setup.work / "wavlm"
    if not folder.exists():
        config = load_encoder(setup).config
        sizes = {
            name: getattr(config, name)
            for name in ("conv_dim", "hidden_size", "intermediate_size", "num_hidden_layers",
                         "num_attention_heads", "num_conv_pos_embedding_groups",
                         "num_conv_pos_embeddings")
        }  # fmt: skip
        transformers.WavLMModel(transformers.WavLMConfig(**sizes)).save_pretrained(folder)
    return encoders.load(folder, normalize=False).to(setup.device).eval()


def _low(encoder: Encoder) -> Encoder:
    encoder.precision = "bfloat16"
    return encoder


def _compiled(encoder: Encoder) -> Encoder:
    model = encoder.model
    model.feature_extractor = torch.compile(model.feature_extractor, dynamic=True)
    model.encoder = torch.compile(model.encoder, dynamic=True)
    return encoder


def with_flex(encoder: Encoder, compiled: bool) -> Encoder:
    """The same WavLM, whose gated bias is computed inside the attention kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention

    def attention(self: Attention, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        assert bias is not None
        states = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gate = self._gate(states)[..., 0]
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(kept[b, j], s + gate[b, h, i] * bias[h, i, j], float("-inf"))

        found = attend(query, key, value, score_mod=score)
        return self.out_proj(found.transpose(1, 2).flatten(2))

    for module in encoder.modules():
        if isinstance(module, Attention):
            module.forward = MethodType(attention, module)  # type: ignore[method-assign]
    return encoder


def _speed(setup: Setup, encoder: Encoder) -> dict[str, float]:
    """Of a batch as a run has it, the best of three after two to warm up."""
    count = max(1, round(setup.batch_seconds / SECONDS)) if not setup.quick else 2
    wavs = [torch.randn(round(SECONDS * SAMPLE_RATE)) for _ in range(count)]
    best = float("inf")
    for trial in range(5):
        begun = clock(setup.device)
        forward(encoder, wavs)
        if trial > 1:
            best = min(best, clock(setup.device) - begun)
    low = encoder.precision != "float32"
    encoder.precision = "float32"
    flops = count * encoder_flops(encoder.config, len(wavs[0]))
    bound = peak(setup.device, torch.bfloat16 if low else torch.float32)
    return {"real_time": count * SECONDS / best, "of_peak": flops / best / bound}


def _learners(setup: Setup, task: str) -> tuple[list[Learner], Batch]:
    head, classes, batch, frames = STEPS[task]
    layers, dim = (3, 48) if setup.quick else (13, 768)
    small = {"projector": 16, "hidden": 16} if setup.quick and task == "asr" else {}
    first = HEADS[head](layers, dim, classes, **small)
    train = Train(steps=1, batch=batch, lr=RATES, eval_every=1)
    learners = [Learner(train, lr, copy.deepcopy(first).to(setup.device)) for lr in RATES]
    size = (
        (layers, batch, frames // (10 if setup.quick else 1), dim)
        if frames
        else (layers, batch, dim)
    )
    x = torch.randn(size, device=setup.device)
    lens = torch.full((batch,), size[2] if frames else 1)
    targets = [[1 + i % (classes - 1)] * (12 if frames else 1) for i in range(batch)]
    return learners, Batch(x, lens, targets)


def _steps(setup: Setup, task: str, beside: bool) -> dict[str, float]:
    """Updates of five learning rates a second."""
    learners, batch = _learners(setup, task)
    lanes = Lanes(learners, setup.device)
    if not beside:
        lanes.groups, lanes.streams = [[each] for each in learners], []
    count = 2 if setup.device == "cpu" else 100 if task == "sid" else 10
    for _ in range(2):
        lanes.backward(batch, 0)
        lanes.update()
    begun = clock(setup.device)
    for number in range(count):
        lanes.backward(batch, number)
        lanes.update()
    return {"updates_per_second": count / (clock(setup.device) - begun)}


def _graphed(setup: Setup) -> dict[str, float]:
    """SID's five learning rates, an update captured once and played again."""
    learners, batch = _learners(setup, "sid")
    right = torch.tensor(batch.targets, device=setup.device).flatten()

    def update() -> None:
        for each in learners:
            logits = each.head.body(each.head.weighted_sum(batch.x), batch.lens)
            torch.nn.functional.cross_entropy(logits, right).backward()
            each.update()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    begun = clock(setup.device)
    for _ in range(100):
        graph.replay()
    return {"updates_per_second": 100 / (clock(setup.device) - begun)}


def table(found: dict[str, Any]) -> str:
    """A line for each."""
    lines = []
    for name, figures in found.items():
        if "error" in figures:
            said = f"not possible here ({figures['error'].splitlines()[0]:.100})"
        elif "real_time" in figures:
            said = f"{figures['real_time']:,.0f} x real time, {figures['of_peak']:.0%} of the peak"
        else:
            said = f"{figures['updates_per_second']:,.1f} updates a second"
        lines.append(f"- {name}: {said}")
    return "\n".join(lines)
