"""The promises that every upstream keeps, by name; `benchmark.py check` runs them on yours."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from upstream.audio import pad
from upstream.base import SAMPLE_RATE, Hidden, Upstream
from upstream.common.registry import Registry

LENGTHS = (16_000, 9_001, 5_333)  # samples; none a multiple of a usual stride but the first
FRAMES_OFF = 5  # s3prl's tolerance between the frames promised by the stride and those that come
CLOSE = 1e-4  # largest difference, relative to the largest feature, that rounding explains


class Promise(NamedTuple):
    name: str
    kept: bool
    evidence: str  # one line on what was seen


Seen = tuple[bool, str]
PROMISES: Registry[Callable[[Upstream], Seen]] = Registry("promise")


def check(upstream: Upstream) -> list[Promise]:
    """Run every promise on `upstream`. An exception inside one breaks that one only."""
    results = []
    for name in PROMISES:
        try:
            seen = PROMISES[name](upstream)
        except Exception as error:  # whatever a user's class raises is evidence against it
            seen = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
        results.append(Promise(name, *seen))
    return results


def _waves(*lengths: int) -> list[Tensor]:
    """Noise that swells and fades, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    waves = [torch.randn(n, generator=generator) for n in lengths]
    return [0.1 * wave * torch.hann_window(len(wave), periodic=False) + 0.01 for wave in waves]


def _batch(upstream: Upstream, waves: list[Tensor], spare: int = 0) -> tuple[Tensor, Tensor]:
    """The waves, padded `spare` samples beyond the longest, and their lengths, on its device."""
    tensor = next(chain(upstream.parameters(), upstream.buffers()), torch.empty(0))
    wavs, lens = pad(waves)
    return torch.nn.functional.pad(wavs, (0, spare)).to(tensor.device), lens.to(tensor.device)


def _run(upstream: Upstream, waves: list[Tensor] | None = None, spare: int = 0) -> Hidden:
    with torch.inference_mode():
        layers, lens = upstream(*_batch(upstream, waves or _waves(*LENGTHS), spare))
    return Hidden(layers.cpu(), lens.cpu())


def _all_finite(layers: Tensor) -> Seen:
    bad = int((~torch.isfinite(layers)).sum())
    return bad == 0, f"{bad} of {layers.numel()} values are NaN or infinite"


@PROMISES.register("shape")
def _shape(upstream: Upstream) -> Seen:
    layers, lens = _run(upstream)
    shape, batch = list(layers.shape), len(LENGTHS)
    due = [upstream.num_layers, batch, *shape[2:3], upstream.dim]
    evidence = f"layers {shape}, promised {due}; lens {list(lens.shape)}"
    return shape == due and lens.shape == (batch,), evidence


@PROMISES.register("dtype")
def _dtype(upstream: Upstream) -> Seen:
    layers, lens = _run(upstream)
    kept = layers.dtype == torch.float32 and lens.dtype == torch.int64
    return kept, f"{layers.dtype}, {lens.dtype}"


@PROMISES.register("frame count")
def _frame_count(upstream: Upstream) -> Seen:
    """As many frames as the stride says, and the same number for every further second."""
    seconds = [1, 2, 4]
    frames = [_run(upstream, _waves(n * SAMPLE_RATE)).layers.shape[2] for n in seconds]
    off = [n - s * SAMPLE_RATE / upstream.stride for n, s in zip(frames, seconds)]
    near = max(map(abs, off)) < FRAMES_OFF and all(abs(b - a) <= 1 for a, b in pairwise(off))
    return near, f"{frames} frames in {seconds} s at a stride of {upstream.stride} samples"


@PROMISES.register("lengths")
def _lengths(upstream: Upstream) -> Seen:
    layers, lens = _run(upstream)
    frames, longest = lens.tolist(), layers.shape[2]
    kept = min(frames) >= 1 and max(frames) <= longest
    off = [abs(n - size / upstream.stride) for n, size in zip(frames, LENGTHS)]
    return kept and max(off) < FRAMES_OFF, f"lens {frames} of {longest} frames"


@PROMISES.register("finite")
def _finite(upstream: Upstream) -> Seen:
    return _all_finite(_run(upstream).layers)


@PROMISES.register("silence")
def _silence(upstream: Upstream) -> Seen:
    return _all_finite(_run(upstream, [torch.zeros(SAMPLE_RATE), *_waves(SAMPLE_RATE)]).layers)


@PROMISES.register("very short input")
def _short(upstream: Upstream) -> Seen:
    layers, lens = _run(upstream, _waves(10))
    finite, evidence = _all_finite(layers)
    kept = finite and 1 <= int(lens[0]) <= layers.shape[2]
    return kept, f"{int(lens[0])} frame(s) from 10 samples; {evidence}"


@PROMISES.register("determinism")
def _determinism(upstream: Upstream) -> Seen:
    first, second = _run(upstream).layers, _run(upstream).layers
    gap = float((first - second).abs().max())
    return gap == 0, f"two runs differ by {gap:.1e}"


@PROMISES.register("eval mode")
def _eval_mode(upstream: Upstream) -> Seen:
    training = [name or "itself" for name, module in upstream.named_modules() if module.training]
    return not training, f"{len(training)} modules in training mode: {' '.join(training[:2])}"


@PROMISES.register("padding has no say")
def _padding(upstream: Upstream) -> Seen:
    """Neither the company of longer utterances nor spare zeros change an utterance."""
    waves = _waves(*LENGTHS)
    batch = _run(upstream, waves, spare=3_000)
    gap, size = 0.0, 1e-12
    for i, wave in enumerate(waves):
        alone, n = _run(upstream, [wave]), int(batch.lens[i])
        if n != int(alone.lens[0]):
            return False, f"{n} frames in a batch, {int(alone.lens[0])} alone ({len(wave)} samples)"
        gap = max(gap, float((alone.layers[:, 0, :n] - batch.layers[:, i, :n]).abs().max()))
        size = max(size, float(alone.layers.abs().max()))
    evidence = f"alone and padded differ by {gap:.1e} of up to {size:.2g}"
    return gap <= CLOSE * max(1.0, size), evidence


@PROMISES.register("input untouched")
def _untouched(upstream: Upstream) -> Seen:
    batch, before = (_batch(upstream, _waves(*LENGTHS)) for _ in range(2))
    with torch.inference_mode():
        upstream(*batch)
    kept = all(map(torch.equal, batch, before))
    return kept, f"the caller's waves and lengths {'stay' if kept else 'do not stay'} as they were"


@PROMISES.register("no gradient")
def _no_gradient(upstream: Upstream) -> Seen:
    with torch.no_grad():
        layers = upstream(*_batch(upstream, _waves(LENGTHS[0]))).layers
    held = sum(value.grad is not None for value in upstream.parameters())
    evidence = f"output {'keeps' if layers.requires_grad else 'without'} a graph under no_grad"
    return not layers.requires_grad and not held, f"{evidence}, {held} parameters hold gradients"


@PROMISES.register("fingerprint")
def _fingerprint(upstream: Upstream) -> Seen:
    """The same twice; another one as soon as any weight changes."""
    first, again = upstream.fingerprint(), upstream.fingerprint()
    if first != again or not re.fullmatch("[0-9a-f]{12}", first):
        return False, f"{first}, then {again}; 12 hex digits that stay are due"
    weight = next((value for value in upstream.parameters() if value.numel()), None)
    if weight is None:
        return True, f"{first}; no weights"
    held = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] += 1
        changed = upstream.fingerprint()
        weight.copy_(held)
    return changed != first, f"{first}; {changed} after one weight changed"
