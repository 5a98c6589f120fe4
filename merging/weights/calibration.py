"""Calibration: what Fisher, RegMean and LOT Merging need to know, measured on unlabelled audio.

Utterances pass one by one, unpadded. Memory per model, float32: `fisher` takes two copies of the
weights (0.8 GB for a Base, 2.5 GB for a Large) beside the activations of one utterance; `gram`
0.6 GB for a Base, 2.1 GB for a Large.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from downstream import recipe as task_recipes
from downstream.run.prepare import prepare
from upstream.checkpoints.tensor_files import guarded, save_tensors
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.common.schema import Natural, Positive
from upstream.encoder.encoder import Encoder
from upstream.features.clips import Clip

Kind = Literal["fisher", "gram"]
Statistics = dict[str, Tensor]

# Of the estimators: another number, and kept statistics are measured again.
VERSION: dict[Kind, int] = {"fisher": 1, "gram": 2}


@dataclass(frozen=True)
class Calibration:
    """Which audio a merge recipe calibrates on: some of a task's training utterances."""

    task: str  # a task recipe beside the merge recipe; its labels are not used
    utterances: Positive = 64
    seed: Natural = 0  # of the choice of utterances and of the Fisher information's random signs


def fisher(
    encoder: Encoder, wavs: Iterable[Tensor], *, draws: int = 1, seed: int = 0
) -> Statistics:
    """Diagonal Fisher information of the encoder: parameter name -> float32 of its shape.

    A headless encoder has no labels, so this is not the classification Fisher of Matena and Raffel
    (arXiv 2111.09832) but that of the Gaussian model N(h(wav), I) with the last hidden state h
    [T, D] as its mean: F = E diag(J' J) / T over utterances, J the Jacobian of h. The last state
    alone: stage 1 trains it, every parameter acts on it, and it is layer-normed, whereas the states
    inside a pre-norm model (Large) grow with depth and the largest would decide alone.

    diag(J' J) = E (J' z)^2 for random signs z (Hutchinson), `draws` of them an utterance, drawn
    from `seed` and the utterance's samples: order does not matter. The relative standard deviation
    is below sqrt(2 / (draws * utterances)) where utterances are alike: 18 % for 64.

    `wavs`: [N] each, 16 kHz. Raises UserError for no utterance and for values that are not finite.
    """
    # views that want gradients, whatever is frozen in the encoder itself
    leaves = {n: p.detach().requires_grad_() for n, p in encoder.model.named_parameters()}
    weights = {f"model.{name}": leaf for name, leaf in leaves.items()}
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    inputs, count = tuple(leaves.values()), 0
    encoder.eval()
    for wav in wavs:
        count += 1
        with torch.enable_grad():
            h = functional_call(encoder, weights, _alone(encoder, wav)).layers[-1, 0]
        signs = _signs(wav, (draws, *h.shape), seed).to(h) / len(h) ** 0.5
        for left, z in zip(reversed(range(draws)), signs):
            # squared for each utterance alone: the square of a batch's sum is another quantity
            gradients = torch.autograd.grad(h, inputs, z, retain_graph=left > 0, allow_unused=True)
            for total, gradient in zip(sums.values(), gradients):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
    return _mean(sums, count * draws, encoder)


def gram(encoder: Encoder, wavs: Iterable[Tensor]) -> Statistics:
    """Gram matrices for RegMean (arXiv 2212.09849) and LOT: name of a weight -> X' X / frames.

    X are all inputs of a Linear, one row a frame (WavLM's `gru_rel_pos_linear`: a row a head), the
    matrix [in, in] float32. Every Linear of the encoder has one. Of the layer norms above the CNN,
    X are the inputs that the scale acts on, normalized, and only the diagonal [in] is kept.
    `wavs`: [N] each, 16 kHz. Raises UserError for no utterance and for values that are not finite.
    """
    modules = {
        f"{name}.weight": each
        for name, each in encoder.model.named_modules()
        if isinstance(each, (nn.Linear, nn.LayerNorm)) and not name.startswith("feature_extractor.")
    }
    sums = {name: _empty(each) for name, each in modules.items()}

    def add(total: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        if isinstance(module, nn.LayerNorm):
            rows = F.layer_norm(rows, module.normalized_shape, eps=module.eps)
            total.add_(rows.square().sum(0))
        else:
            total.addmm_(rows.T, rows)

    hooks = [
        each.register_forward_pre_hook(partial(add, sums[name])) for name, each in modules.items()
    ]
    encoder.eval()
    frames = 0
    try:
        with torch.no_grad():
            for wav in wavs:
                frames += encoder(*_alone(encoder, wav)).layers.shape[2]
    finally:
        for hook in hooks:
            hook.remove()
    return _mean(sums, frames, encoder)


def _empty(module: nn.Linear | nn.LayerNorm) -> Tensor:
    """Where the inputs of a module are summed: a Linear's products, a layer norm's squares."""
    if isinstance(module, nn.LayerNorm):
        return torch.zeros(module.normalized_shape, device=module.weight.device)
    size = module.in_features
    return torch.zeros(size, size, device=module.weight.device)


def _alone(encoder: Encoder, wav: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of one, where the encoder is."""
    device = next(encoder.parameters()).device
    return wav[None].to(device), torch.tensor([len(wav)], device=device)


def _signs(wav: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random signs that depend on nothing but the seed and the utterance."""
    digest = hashlib.blake2b(wav.cpu().contiguous().numpy().tobytes(), digest_size=8)
    digest.update(str(seed).encode())
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
    return torch.randint(2, shape, generator=generator) * 2 - 1


def _mean(sums: Statistics, count: int, encoder: Encoder) -> Statistics:
    """The sums, divided in place, on the CPU."""
    if count == 0:
        raise UserError(f"{encoder.source}: nothing to calibrate on; give at least one utterance")
    for name, total in sums.items():
        if not torch.isfinite(total.div_(count)).all():
            raise UserError(f"{encoder.source}: the statistics of {name} are not finite")
    return {name: total.cpu() for name, total in sums.items()}


def statistics(
    kind: Kind, encoder: Encoder, clips: Sequence[Clip], folder: Path, seed: int = 0
) -> Statistics:
    """`fisher` or `gram` of an encoder over `clips`, measured once and kept under `folder`.

    What comes back is mapped from a file, so several models' need not fit in memory. UserError.
    """
    settings = {"seed": seed} if kind == "fisher" else {}
    text = json.dumps([VERSION[kind], settings, sorted(clip.key for clip in clips)])
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    path = folder / encoder.fingerprint() / name
    if not path.exists():
        home = next(encoder.parameters()).device
        wavs = (clip.load() for clip in progress(clips, f"{kind} of {encoder.source}", len(clips)))
        with disk.writing(path):
            disk.make_folder(path.parent)  # fail now, not after the work
            encoder.to("cuda" if torch.cuda.is_available() else "cpu")
            try:
                sums = fisher(encoder, wavs, seed=seed) if kind == "fisher" else gram(encoder, wavs)
            finally:
                encoder.to(home)
            save_tensors(sums, path, {"source": encoder.source, "utterances": str(len(clips))})
    disk.require_file(path)
    with guarded(path, "damaged; delete it and run again"):
        return safetensors.torch.load_file(path)


def utterances(plan: Calibration, recipe_folder: Path, results: Path) -> list[Clip]:
    """The training utterances that a merge recipe calibrates on (of the first fold, as stage 1).

    The same seed's smaller choice is part of its larger one. Raises UserError.
    """
    prepared = prepare(task_recipes.load(recipe_folder / plan.task), results)
    train = next(iter(prepared.splits.values()))["train"]
    if not 1 <= plan.utterances <= len(train):
        raise UserError(
            f"calibrate: utterances must be between 1 and {len(train)}, "
            f"the training utterances of {plan.task}, not {plan.utterances}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(plan.seed))
    return [prepared.clips[train[i]] for i in order[: plan.utterances].tolist()]


def calibrated(
    kind: Kind, encoders: Sequence[Encoder], plan: Calibration, recipe_folder: Path, results: Path
) -> list[Statistics]:
    """Statistics of each encoder ([base, *tuned]); what is not kept yet is measured. UserError."""
    clips = utterances(plan, recipe_folder, results)
    return [statistics(kind, e, clips, results / "calibration", plan.seed) for e in encoders]
