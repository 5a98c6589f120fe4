"""HuBERT in miniature, from scratch, on one core: how the demo's pre-trained encoder was made.

Departures from the published recipe (arXiv:2106.07447), which is hopeless at this budget. (1) The
convolutional stem is trained first, to regress the log spectrum of its own frame, then frozen: its
outputs are computed once and kept in memory. (2) Two heads predict k-means clusters, of MFCC with
and without cepstral mean normalisation, so that speaker and channel stay in the representation
along with the phones; frames that are not masked count too, at a lower weight. (3) No second
iteration: clusters of a middle layer agree with the phones no better than those of MFCC do.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import torchaudio
import transformers
import yaml
from torch import Tensor, nn
from transformers import HubertModel

from downstream.corpora import synthetic
from downstream.recipe import read_corpus
from merging.pretraining.hubert import Model, encode, new_model, save
from merging.pretraining.stem import HOP, Stem, schedule, stem_outputs, train_stem, update
from merging.pretraining.targets import masked_spans, mfcc_targets
from upstream import audio
from upstream.base import SAMPLE_RATE
from upstream.checkpoints.tensor_files import load_state, save_state
from upstream.common import DATA, PROJECT, disk
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.common.schema import Amount, Bound, Natural, Positive, Share, build, read_yaml

SAVE_SECONDS = 120.0  # at most this much training is lost when the process is killed
Speed = Annotated[float, Bound(0.5, 2.0)]  # 0.9: slower and lower, as by another speaker
SAMPLE = PROJECT.parent / "shared" / "speech"  # SPEECH_SAMPLE overrides


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that fixes a pre-training run; the keys of `recipes/*/pretrain.yaml`."""

    kind: Literal["pretrain"]
    seed: Natural
    corpus: dict[str, Any]  # options of downstream.corpora.synthetic.read
    real_share: Share  # of the training crops
    model: Model
    stem: Stem
    steps: Positive
    batch: Positive
    seconds: Amount  # of a training crop
    lr: Amount
    warmup: Natural  # steps
    clusters: Positive
    mask_start: Share  # probability that a frame starts a masked span
    mask_span: Positive  # frames
    unmasked_weight: float
    checkpoint_every: Positive  # steps
    # options of corpora whose split `train` is heard; without any, all of the sample
    real: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=lambda: [1.0])  # real speech is heard at each
    snapshot_every: Natural = 0  # steps; 0: none is kept


def gather(config: PretrainConfig, root: Path, say: Callable[[str], None]) -> list[list[Tensor]]:
    """[synthetic, real] utterances, [N] int16 each; real is empty without a corpus or the sample.

    Raises UserError where a corpus of the recipe cannot be read, or all of them are too short.
    """
    sources = []
    real_paths = _real_paths(config, root.parent.parent, say)
    synthetic_paths = [e.path for e in synthetic.read(root, "text", **config.corpus)]
    parts = [("synthetic", synthetic_paths, [1.0]), ("real", real_paths, config.speeds)]
    for name, paths, speeds in parts:
        minimum = round(2 * config.seconds * SAMPLE_RATE)
        wavs = [
            piece
            for speed in speeds
            for piece in _joined(_read(progress(paths, f"reading {name}"), speed), minimum)
        ]
        hours = sum(map(len, wavs)) / SAMPLE_RATE / 3600
        times = f" at {len(speeds)} speeds" if len(speeds) > 1 else ""
        say(f"{name} speech: {len(paths)} files, {hours:.2f} h{times}")
        sources.append(wavs)
    if config.real and not sources[1]:
        least = 2 * config.seconds
        raise UserError(f"real, speeds: hold no {least:g} s of speech in split train")
    return sources


def _real_paths(config: PretrainConfig, results: Path, say: Callable[[str], None]) -> list[str]:
    """The files of real speech that are heard."""
    if config.real:
        heard = []
        for number, corpus in enumerate(config.real):
            examples = read_corpus(corpus, f"real[{number}]", results)
            heard += [example.path for example in examples if example.split == "train"]
        return heard
    sample = Path(os.environ.get("SPEECH_SAMPLE", SAMPLE))
    paths = sorted(str(p) for p in sample.rglob("*") if p.suffix in (".flac", ".wav"))
    if not paths:
        say(f"no real speech at {sample}: going on without")
    return paths


def _read(paths: Iterable[str], speed: float) -> Iterator[Tensor]:
    """Utterances as [N] int16, played at `speed`: pitch and formants move with the tempo."""
    for path in paths:
        wav = audio.load(path)
        if speed != 1.0:
            rate = round(SAMPLE_RATE * speed)
            wav = torchaudio.functional.resample(wav, rate, SAMPLE_RATE).clamp(-1, 1)
        yield (wav * 32767).to(torch.int16)


def _joined(wavs: Iterable[Tensor], minimum: int) -> Iterator[Tensor]:
    """Neighbours joined until each piece is at least `minimum` long, so that a crop always fits."""
    waiting: list[Tensor] = []
    for wav in wavs:
        waiting.append(wav)
        if sum(len(piece) for piece in waiting) >= minimum:
            yield torch.cat(waiting)
            waiting = []


class Batches:
    """Random crops of cached frames: (stem outputs, targets, mask), a pure function of the step."""

    def __init__(self, sources: list[list[Tensor]], config: PretrainConfig) -> None:
        self.config = config
        self.length = round(config.seconds * SAMPLE_RATE / HOP)
        self.stems = torch.cat([stem for source in sources for stem in source])
        self.starts: list[Tensor] = []  # per source: every frame at which a crop may start
        offset = 0
        for source in sources:
            starts = [torch.arange(0)]
            for stem in source:
                starts.append(offset + torch.arange(max(0, len(stem) - self.length + 1)))
                offset += len(stem)
            self.starts.append(torch.cat(starts))

    def __call__(self, step: int, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        real = round(config.batch * config.real_share) if len(self.starts[1]) else 0
        begin = [
            starts[torch.randint(len(starts), (count,), generator=rng)]
            for starts, count in zip(self.starts, (config.batch - real, real))
            if count
        ]
        frames = torch.cat(begin)[:, None] + torch.arange(self.length)
        starts = torch.rand(config.batch, self.length, generator=rng) < config.mask_start
        mask = masked_spans(starts, config.mask_span)
        return self.stems[frames].float(), targets[:, frames].long(), mask


def pretrain(config: PretrainConfig, output: Path) -> None:
    """Train, or go on training: an HF folder with its log; interruptions do not change the result.

    The synthetic corpus is that of `corpora/synthetic` beside `output`, spoken there if missing.
    Raises UserError without eSpeak NG, or if `output` holds a run of another recipe.
    """
    state = output / "state"
    disk.make_folder(state)
    recipe, text = output / "pretrain.yaml", yaml.safe_dump(asdict(config), sort_keys=False)
    if recipe.exists() and disk.read(recipe, disk.RECORD_BYTES) != text.encode():
        raise UserError(f"{output} was begun with another recipe: choose another --output")
    disk.write(recipe, text)

    def say(text: str) -> None:
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}"
        print(line, flush=True)
        disk.append(output / "pretrain.log", line + "\n")

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    say(f"python {platform.python_version()}, {versions}, {torch.get_num_threads()} thread(s)")
    checkpoint, done, cpu = state / "checkpoint.pt", 0, 0.0
    saved = load_state(checkpoint) if checkpoint.exists() else {}
    if saved.get("step") == config.steps:
        say("finished before")
        return
    torch.manual_seed(config.seed)
    model = new_model(config.model)
    batches, targets = _prepare(model, config, output, say)

    torch.manual_seed(config.seed)  # again: the same heads whether or not the stem was found
    heads = nn.ModuleList(nn.Linear(config.model.hidden, config.clusters) for _ in range(2))
    weights = [w for w in [*model.parameters(), *heads.parameters()] if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    parts: dict[str, Any] = {"model": model, "heads": heads, "optimizer": optimizer}
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, cpu = saved["step"], saved["cpu"]
        say(f"resumed at step {done} of {config.steps}")

    logged: list[Tensor] = []
    written = time.monotonic()
    for step in range(done + 1, config.steps + 1):
        frames, labels, mask = batches(step, targets)
        hidden = encode(model, frames, mask)
        loss, facts = _loss(hidden, heads, labels, mask, config.unmasked_weight)
        update(optimizer, weights, loss, config.lr * schedule(step, config.warmup, config.steps))
        logged.append(facts)
        if step % max(1, config.steps // 250) == 0:
            masked, content, channel = torch.stack(logged).mean(0).tolist()
            accuracy = f"masked accuracy {content:.3f} (content) {channel:.3f} (channel)"
            seconds = f"{cpu + time.process_time():.0f} CPU-s"
            say(f"step {step} of {config.steps}: masked loss {masked:.3f}, {accuracy}, {seconds}")
            logged.clear()
        due = time.monotonic() - written > SAVE_SECONDS or step % config.checkpoint_every == 0
        if due or step == config.steps:
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= {"step": step, "cpu": cpu + time.process_time()}
            save_state(saved, checkpoint)
            save(model, output)
            written = time.monotonic()
        if config.snapshot_every and step % config.snapshot_every == 0:
            save(model, output / "snapshots" / f"step-{step:06d}")
    disk.remove_file(state / "stems.pt")  # a gigabyte for 20 hours of audio


def _prepare(
    model: HubertModel, config: PretrainConfig, output: Path, say: Callable[[str], None]
) -> tuple[Batches, Tensor]:
    """Train the stem of `model`; what it makes of all audio, and the targets.

    All of it is made once: a run that goes on reads no audio.
    """
    state = output / "state"
    stem, stems, targets = (state / f"{name}.pt" for name in ("stem", "stems", "targets"))
    complete = stems.exists() and targets.exists()
    sources = [] if complete else gather(config, output.parent / "corpora" / "synthetic", say)
    wavs = [wav for source in sources for wav in source]
    trained = _kept(stem, lambda: train_stem(model, wavs, config.stem, config.seed, say))
    model.feature_extractor.load_state_dict(trained)
    model.feature_extractor.requires_grad_(False)
    outputs = _kept(stems, lambda: [stem_outputs(model, source) for source in sources])
    made = _kept(targets, lambda: mfcc_targets(wavs, config.clusters, config.seed))
    return Batches(outputs, config), made


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, made once: a run that goes on finds it."""
    if not path.exists():
        save_state(make(), path)
    return load_state(path)


def _loss(
    hidden: Tensor, heads: nn.ModuleList, labels: Tensor, mask: Tensor, unmasked: float
) -> tuple[Tensor, Tensor]:
    """The training loss, and [masked loss, right (content), right (channel)] to log."""
    masked_loss, loss, right = 0.0, hidden.new_zeros(()), []
    for head, label in zip(heads, labels):
        logits = head(hidden)
        each = F.cross_entropy(logits.transpose(1, 2), label, reduction="none")
        inside = each[mask].mean()
        loss = loss + inside + unmasked * each[~mask].mean()
        masked_loss += inside.item()
        right.append((logits.argmax(-1) == label)[mask].float().mean().item())
    return loss, torch.tensor([masked_loss, *right])


def from_recipe(recipe: Path, output: Path) -> Path:
    """`pretrain`; another process that does the same is waited for. Raises UserError."""
    config = build(PretrainConfig, read_yaml(recipe), str(recipe))
    with disk.lease(output, wait=True):
        pretrain(config, output)
    return output


def from_scratch(results: Path) -> Path:
    """The demo's encoder, pre-trained anew under `results`; interrupted, the same call goes on."""
    return from_recipe(DATA / "recipes" / "demo" / "pretrain.yaml", results / "pretrained")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    try:
        from_recipe(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(str(error))
