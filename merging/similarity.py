"""Do features stay while weights move? Upstreams against a reference, kept as files."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch

from downstream.report import layout
from downstream.run.prepare import Prepared
from downstream.run.schedule import Request, RunOptions
from merging.weights.movement import movement
from upstream.base import Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder
from upstream.features.clips import Clip
from upstream.features.provide import provide
from upstream.measures import FEWEST, MEASURES, Estimate, estimates
from upstream.similarity import (
    FOLDER,
    Similarity,
    deal,
    moments,
    paired_layers,
    read,
    require_strides,
)

VERSION = 1  # of the arithmetic: another number, and all is computed again
SEED = 0  # of the shuffled weights


class Audio(NamedTuple):
    """The utterances that upstreams are compared on."""

    corpus: str
    clips: list[Clip]
    units: list[str]  # of each, whom or what it is counted with
    unit: str

    @property
    def digest(self) -> str:
        """12 hex digits over audio and units."""
        rows = sorted(zip((clip.key for clip in self.clips), self.units))
        return hashlib.sha256(json.dumps([VERSION, rows]).encode()).hexdigest()[:12]


def draw(tasks: Sequence[Prepared], utterances: int, seed: int) -> Audio:
    """As many test utterances of the tasks, whatever order these come in. Raises UserError.

    A smaller number is part of a larger one. The unit is the speaker if there are at least five.
    """
    speakers: dict[str, tuple[Clip, str]] = {}
    for task in tasks:
        for split in task.splits.values():
            for i in split["test"]:
                speakers.setdefault(task.clips[i].key, (task.clips[i], task.items[i].speaker))

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed} {key}".encode()).digest()

    chosen = [speakers[key] for key in sorted(speakers, key=rank)[:utterances]]
    clips, names = [clip for clip, _ in chosen], [name for _, name in chosen]
    corpus = f"{tasks[0].recipe.suite}: {', '.join(task.recipe.name for task in tasks)}"
    if len(set(names)) >= FEWEST:
        return Audio(corpus, clips, names, "speakers")
    return Audio(corpus, clips, [clip.key for clip in clips], "utterances")


def shuffled(upstream: Upstream) -> Upstream:
    """A copy with the values of every weight tensor in random order.

    What is left is the architecture and the sizes of weights: nothing learnt.
    """
    other = copy.deepcopy(upstream)
    generator = torch.Generator().manual_seed(SEED)
    weights = [p for _, p in sorted(other.named_parameters()) if p.is_floating_point()]
    with torch.no_grad():
        for weight in weights:
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return other


def distances(reference: Upstream, other: Upstream) -> dict[str, float]:
    """`all` and each module -> |other - reference| / |reference|; empty for other architectures."""
    if not (isinstance(reference, Encoder) and isinstance(other, Encoder)):
        return {}
    first, second = reference.model.state_dict(), other.model.state_dict()
    for state in (first, second):
        state.pop("masked_spec_embed", None)  # no part of the encoder, and not in every file
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
        return {}
    return {**movement(first, second, lambda _: "all"), **movement(first, second)}


def compare(
    reference: Request, others: Sequence[Request], audio: Audio, how: RunOptions
) -> list[Similarity]:
    """Each of `others` against the reference; what is kept is not computed again. UserError."""
    deal(audio.units)  # too few are told before anything is loaded
    first = Named(reference.name, reference.load().to(how.device))
    found = []
    for request in others:
        second = Named(request.name, request.load().to(how.device))
        path = how.results / FOLDER / _file(first, second, audio)
        kept = read(path)
        if kept is None:
            weights = distances(first.model, second.model)
            # fine-tuned forms of the reference share its floor
            bare = shuffled(first.model if weights else second.model)
            floor = _floor(first, Named(f"{request.name}, shuffled", bare), audio, how)
            new = _measured(first, second, audio, how)
            kept = replace(new, floor=floor, weights=weights)
            disk.write_checked(path, asdict(kept))
        found.append(replace(kept, reference=first.name, other=second.name))
    return found


class Named(NamedTuple):
    """An upstream and what it is called."""

    name: str
    model: Upstream


def _file(first: Named, second: Named, audio: Audio) -> str:
    prints = (each.model.fingerprint() for each in (first, second))
    return f"{'_'.join([*prints, audio.digest])}.json"


def _floor(first: Named, bare: Named, audio: Audio, how: RunOptions) -> dict[str, list[Estimate]]:
    """The reference against weights that learnt nothing; empty where there are no weights."""
    if not list(bare.model.parameters()):
        return {}
    path = how.results / FOLDER / "floor" / _file(first, bare, audio)
    kept = read(path)
    if kept is None:
        kept = _measured(first, bare, audio, how)
        disk.write_checked(path, asdict(kept))
    return kept.measures


def _measured(first: Named, second: Named, audio: Audio, how: RunOptions) -> Similarity:
    """The measures alone, from one pass over the frames of both."""
    strides = (first.model.stride, second.model.stride)
    require_strides(*strides)
    layers = paired_layers(first.model.num_layers, second.model.num_layers)
    frames = [
        provide(
            each.model, audio.clips, "float16", how.store,
            name=each.name, share_cnn=True, batch_seconds=how.batch_seconds,
        )
        for each in (first, second)
    ]  # fmt: skip
    what = f"{first.name} and {second.name}"
    found = moments((frames[0], frames[1]), strides, audio.clips, deal(audio.units), layers, what)
    try:
        measures, mean = estimates(found)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    return Similarity(
        reference=first.name,
        other=second.name,
        fingerprints=[first.model.fingerprint(), second.model.fingerprint()],
        corpus=audio.corpus,
        audio=audio.digest,
        utterances=len(audio.clips),
        frames=int(found.frames.sum()),
        unit=audio.unit,
        units=len(set(audio.units)),
        layers=layers,
        measures=measures,
        mean=mean,
        floor={},
        weights={},
    )


def as_text(found: Sequence[Similarity]) -> str:
    """Tables of text: each pair by layer, its weights by module, and all pairs in a line each."""
    parts = []
    for each in found:
        columns = [w for name in each.measures for w in (MEASURES[name], "floor")]
        rows = [["hidden state", *columns]]
        for row, (i, j) in enumerate(each.layers):
            rows.append([f"{i} and {j}" if i != j else str(i)])
            for name, values in each.measures.items():
                rows[-1] += [_text(values[row]), _text(*each.floor.get(name, [])[row : row + 1])]
        parts.append(f"{each.other} against {each.reference}\n{layout.text(rows)}")
        moved = [(m, v) for m, v in each.weights.items() if m != "all"]
        if moved:
            listed = ", ".join(f"{module} {100 * value:.3g}" for module, value in moved)
            parts.append(layout.wrapped([f"weights moved, % of their length: {listed}"]))
    names = list(MEASURES)
    head = ["mean over hidden states", "weights moved %", *MEASURES.values()]
    rows = [
        [each.other, f"{100 * each.weights['all']:.3g}" if each.weights else ""]
        + [_text(each.mean[name]) if name in each.mean else "" for name in names]
        for each in found
    ]
    parts.append(layout.text([head, *rows]))
    first = found[0]
    notes = [
        f"{first.corpus}: {first.utterances} test utterances, {first.units} {first.unit}, "
        f"{first.frames} frames without silence; ±: half of the 95 % interval over {first.unit}",
        "floor: weights shuffled, nothing learnt; the ceiling, the same upstream, is 1",
    ]
    return "\n\n".join([*parts, layout.wrapped(notes)])


def _text(estimate: Estimate | None = None) -> str:
    """A similarity and half of its interval."""
    if estimate is None:
        return ""
    return f"{estimate.value:.4f} ±{estimate.value - estimate.low:.4f}"


def as_csv(found: Sequence[Similarity]) -> str:
    """CSV: one row per pair of hidden states and measure, or per module."""
    header = "reference,other,what,of,value,low,high,floor".split(",")
    rows: list[list[object]] = []
    for each in found:
        names = [each.reference, each.other]
        for name, values in each.measures.items():
            floors: list[object] = [floor.value for floor in each.floor.get(name, [])]
            floors = floors or [""] * len(values)
            for (i, j), v, floor in zip(each.layers, values, floors):
                rows.append([*names, name, f"{i}-{j}", v.value, v.low, v.high, floor])
            v = each.mean[name]
            rows.append([*names, name, "mean", v.value, v.low, v.high, ""])
        rows += [
            [*names, "weights", module, moved, "", "", ""] for module, moved in each.weights.items()
        ]
    return layout.as_csv(header, rows).rstrip("\n")


def as_json(found: Sequence[Similarity]) -> str:
    """All that is kept of each."""
    return json.dumps([asdict(each) for each in found], indent=1)
