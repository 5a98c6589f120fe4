"""Stage 1 of pre-training: the convolutional stem learns to show the spectrum of its own frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstream import dsp
from upstream.base import SAMPLE_RATE
from upstream.common.progress import progress
from upstream.common.schema import Amount, Positive

if TYPE_CHECKING:  # seconds, in every command that fine-tunes or merges
    from transformers import HubertModel

WINDOW, HOP = 400, 320  # receptive field and stride of the stem, samples
MEL, NARROW = 40, 48  # mel bands; narrow-band bins up to 1.5 kHz, where the pitch shows


@dataclass(frozen=True)
class Stem:
    steps: Positive
    batch: Positive
    seconds: Amount
    lr: Amount


def spectra(wavs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mel [B, T, 40] and narrow-band log spectrum [B, T, 48] of each frame the stem sees."""
    mel_bank = dsp.mel_filter_bank(257, 40.0, SAMPLE_RATE / 2, MEL, SAMPLE_RATE)
    frames = wavs.unfold(-1, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(frames, 512).abs().square()
    mel = (power @ mel_bank + 1e-6).log()
    return mel, (power[..., :NARROW] + 1e-6).log()


def train_stem(
    model: HubertModel, wavs: list[Tensor], config: Stem, seed: int, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Fit the stem, through a linear read-out, to the log spectra of its frames; its weights."""
    stem = model.feature_extractor
    width = model.config.conv_dim[-1]
    readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, MEL + NARROW))
    weights = [*stem.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    length = round(config.seconds * SAMPLE_RATE)
    rng = torch.Generator().manual_seed(seed)
    total = 0.0
    for step in range(1, config.steps + 1):
        chosen = torch.randint(len(wavs), (config.batch,), generator=rng).tolist()
        batch = torch.stack([_crop(wavs[i], length, rng) for i in chosen]).float() / 32768
        mel, narrow = spectra(batch)
        level = mel.mean((1, 2), keepdim=True)  # group norm removes it, so it is no target
        target = torch.cat([mel - level, narrow - level], -1)
        if step == 1:
            center, scale = target.mean((0, 1)), target.std((0, 1))
        predicted = readout(stem(batch).transpose(1, 2))
        loss = F.mse_loss(predicted, (target - center) / scale)
        rate = schedule(step, config.steps // 20, config.steps)
        update(optimizer, weights, loss, config.lr * rate)
        total += loss.item()
        if step % (every := max(1, config.steps // 10)) == 0:
            say(f"stem step {step}: loss {total / every:.3f}")
            total = 0.0
    return dict(stem.state_dict())


def _crop(wav: Tensor, length: int, rng: torch.Generator) -> Tensor:
    start = int(torch.randint(max(1, len(wav) - length + 1), (1,), generator=rng))
    piece = wav[start : start + length]
    return F.pad(piece, (0, length - len(piece)))


def schedule(step: int, warmup: int, steps: int) -> float:
    """Linear up over `warmup`, linear down to 0 at `steps`."""
    return min(step / max(1, warmup), (steps - step + 1) / max(1, steps - warmup))


def update(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], loss: Tensor, lr: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


@torch.no_grad()
def stem_outputs(model: HubertModel, wavs: list[Tensor]) -> list[Tensor]:
    """[T, C] float16 for each whole utterance, as it will be when the encoder is used."""
    return [
        model.feature_extractor(wav[None].float() / 32768)[0].T.half()
        for wav in progress(wavs, "stem outputs")
    ]
