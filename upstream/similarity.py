"""Two upstreams on the same audio: the frames that sound, summed, and what is kept of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.common.schema import build
from upstream.common.text import LONGEST_PATH, read_name
from upstream.features.clips import Clip
from upstream.features.codec import Features
from upstream.features.provide import in_order
from upstream.measures import FEWEST, GROUPS, MEASURES, Estimate, Moments

FOLDER = "similarity"  # below the results folder
SILENCE = 35.0  # dB below the loudest frame: in the valley between speech and noise, results/LOG.md
BATCH = 8  # utterances


@dataclass(frozen=True)
class Similarity:
    """What `benchmark.py similarity` found of two upstreams; a file of results/similarity."""

    reference: str
    other: str
    fingerprints: list[str]  # of the two
    corpus: str  # suite and tasks whose test audio it is
    audio: str  # 12 hex digits over the utterances and their units
    utterances: int
    frames: int  # that count: no padding, no silence
    unit: str  # what is dealt into groups: speakers or utterances
    units: int
    layers: list[list[int]]  # hidden states that are compared: [of the reference, of the other]
    measures: dict[str, list[Estimate]]  # a name in MEASURES -> for each pair in `layers`
    mean: dict[str, Estimate]  # over layers
    floor: dict[str, list[Estimate]]  # the same with the other's weights shuffled; may be empty
    weights: dict[str, float]  # module, or `all` -> |other - reference| / |reference|; or empty


def similarities(results: Path) -> list[Similarity]:
    """All that a results folder keeps; what is damaged or no similarity is left out."""
    found = map(read, sorted((results / FOLDER).glob("*.json")))
    return [each for each in found if each is not None]


def read(path: Path) -> Similarity | None:
    """A kept similarity; None if it is not there or not one."""
    try:
        kept = build(Similarity, disk.read_checked(path) or {}, str(path))
    except disk.Unreadable:
        raise
    except UserError:
        return None
    rows = [*kept.measures.values(), *kept.floor.values()]
    whole = all(len(row) == len(kept.layers) for row in rows) and len(kept.fingerprints) == 2
    whole = whole and all(len(pair) == 2 for pair in kept.layers)
    if not whole or not {*kept.measures, *kept.mean, *kept.floor} <= MEASURES.keys():
        return None
    try:
        names: dict[str, Any] = {
            key: read_name(getattr(kept, key), key, LONGEST_PATH)
            for key in ("reference", "other", "corpus", "audio", "unit")
        }
    except ValueError:
        return None
    return replace(kept, **names)


def deal(units: Sequence[str]) -> list[int]:
    """Of each utterance's unit the group. Raises UserError for fewer than five units."""
    order = sorted(set(units), key=lambda unit: hashlib.sha256(unit.encode()).digest())
    if len(order) < FEWEST:
        raise UserError(
            f"similarity: {len(order)} utterances are too few; an interval needs {FEWEST} or more"
        )
    place = {unit: number % GROUPS for number, unit in enumerate(order)}
    return [place[unit] for unit in units]


def paired_layers(reference: int, other: int) -> list[list[int]]:
    """Hidden states at the same relative depth; as many pairs as the deeper upstream has."""
    count = max(reference, other)
    steps = max(1, count - 1)
    return [[round(i * (n - 1) / steps) for n in (reference, other)] for i in range(count)]


def require_strides(reference: int, other: int) -> None:
    """Raises UserError for frames that cannot be brought to one length in samples."""
    if max(reference, other) % min(reference, other):
        raise UserError(
            f"similarity: frames of {reference} and of {other} samples cannot be compared; "
            "one must be a multiple of the other"
        )


def sounding(wav: Tensor, stride: int, frames: int) -> Tensor:
    """[frames] bool: the `stride` samples that belong to a frame are not silence.

    Silence is SILENCE dB or more below the utterance's loudest frame; zeros are silence always.
    """
    wav = torch.nn.functional.pad(wav, (0, max(0, frames * stride - len(wav))))
    power = wav[: frames * stride].reshape(frames, stride).square().mean(1)
    return (power > 0) & (power > power.max() * 10 ** (-SILENCE / 10))


def moments(
    features: tuple[Features, Features],
    strides: tuple[int, int],
    clips: Sequence[Clip],
    groups: Sequence[int],
    layers: Sequence[Sequence[int]],
    what: str = "",
) -> Moments:
    """One pass over the frames of `clips` from two upstreams, in whatever order these come.

    The frames of the finer stride are averaged over those of the coarser. Raises UserError for
    an utterance without a sound and for numbers of frames that do not fit.
    """
    order = sorted(range(len(clips)), key=lambda i: (groups[i], clips[i].key))
    batches = [
        members[start : start + BATCH]
        for _, run in itertools.groupby(order, groups.__getitem__)
        for members in [list(run)]
        for start in range(0, len(members), BATCH)
    ]
    totals: list[list[Tensor]] = []
    shift: list[Tensor] = []
    both = zip(*(in_order(each, batches) for each in features))
    for (indices, *first), (_, *second) in progress(both, what, len(batches)):
        x, y = _frames((first, second), strides, [clips[i] for i in indices], layers)
        if not shift:  # a constant takes no part in any result, but digits from float32
            shift = [x.mean(1, keepdim=True), y.mean(1, keepdim=True)]
        cosine = (
            cosine_similarity(x, y, -1).sum(1) if x.shape == y.shape else x[:, 0, 0] * torch.nan
        )
        x, y = x - shift[0], y - shift[1]
        count = torch.full((), x.shape[1], dtype=torch.float64)
        parts = [count, x.sum(1), y.sum(1), x.mT @ x, x.mT @ y, y.mT @ y, cosine]
        if len(totals) <= groups[indices[0]]:
            totals.append(parts)
        else:
            totals[-1] = [total + part for total, part in zip(totals[-1], parts)]
    counts, *sums = map(torch.stack, zip(*totals))
    means = [s / counts.to(s).view(-1, *[1] * (s.dim() - 1)) for s in sums]
    return Moments(counts, *means)


def _frames(
    batches: tuple[Sequence[Tensor], Sequence[Tensor]],
    strides: tuple[int, int],
    clips: Sequence[Clip],
    layers: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """[L, n, D], [L, n, E]: of each (x [L, B, T, D], lens) the frames that sound, at one stride."""
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    stride = max(strides)
    for row, clip in enumerate(clips):
        rows = []
        for (x, lens), own, chosen in zip(batches, strides, zip(*layers)):
            each, ratio = x[list(chosen), row, : int(lens[row])].cpu(), stride // own
            whole = max(1, each.shape[1] // ratio)
            rows.append(each[:, : whole * ratio].unflatten(1, (whole, -1)).mean(2))
        counts = [each.shape[1] for each in rows]
        if max(counts) - min(counts) > 2:
            raise UserError(
                f"{clip.path}: {counts[0]} frames of one upstream, {counts[1]} of the other"
            )
        heard = sounding(clip.load(), stride, min(counts))
        if not heard.any():
            raise UserError(f"{clip.path}: holds nothing but silence; drop the row")
        for each, place in zip(rows, kept):
            place.append(each[:, : min(counts)][:, heard])
    return torch.cat(kept[0], 1), torch.cat(kept[1], 1)
