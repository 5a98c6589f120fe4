"""What a run has to do: cells that are missing, and the passes over audio that they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from downstream.run import cell as evaluate
from downstream.run.cell import Identity, Prepared
from upstream.base import Upstream
from upstream.features import extract as cache
from upstream.features.clips import Clip
from upstream.features.extract import Kind
from upstream.features.store import Store, free_bytes


class Request(NamedTuple):
    """An upstream to score: its name on the command line and in the tables, and loader options."""

    spec: str
    options: dict[str, Any]


Load = Callable[[Request], Upstream]
Where = Literal["auto", "cache", "recompute"]


@dataclass(frozen=True)
class Settings:
    """How cells are computed; nothing here changes a score."""

    results: Path
    workers: int
    device: str
    cache_gb: float = 20.0
    batch_seconds: float = 32.0
    features: Where = "auto"  # frames: kept on disk if they fit, or one of the two by force

    @property
    def store(self) -> Store:
        return Store(self.results / "cache")


class Pass(NamedTuple):
    """One shard of utterances through one upstream, for every task that needs them."""

    request: Request
    clips: list[Clip]
    kinds: list[Kind]
    share_cnn: bool


class Job(NamedTuple):
    """One missing cell."""

    request: Request
    identity: Identity
    prepared: Prepared
    seed: int


class Wave(NamedTuple):
    """Passes and cells of upstreams whose features fit the disk budget together."""

    passes: list[Pass]
    cells: list[Job]
    entries: set[tuple[str, Kind]]  # (fingerprint, kind) that must not be evicted meanwhile
    bytes: int  # that the passes will write


class Work(NamedTuple):
    """What a run has to do."""

    identities: list[Identity]
    kept: int
    waves: list[Wave]

    @property
    def cells(self) -> list[Job]:
        return [job for wave in self.waves for job in wave.cells]


class Needs(NamedTuple):
    """What one upstream still has to compute for some tasks, and where their features will be."""

    kinds: list[Kind | None]  # task by task what is on disk; None: frames recomputed from audio
    missing: dict[Kind, list[Clip]]  # utterances still to pass, by what is kept of them
    bytes: int  # that keeping them takes


def survey(
    requests: Sequence[Request],
    load: Load,
    tasks: Sequence[Prepared],
    seeds: int | None,
    settings: Settings,
) -> Work:
    """Load (and so build) every upstream and find its missing passes and cells."""
    identities: list[Identity] = []
    found: list[_Found] = []
    kept = 0
    passing: set[tuple[str, Kind, str]] = set()
    for request in requests:
        upstream = load(request)
        identity = Identity(request.spec, upstream.fingerprint(), upstream.source)
        identities.append(identity)
        cells: list[Job] = []
        unfinished = []
        for prepared in tasks:
            count = seeds or prepared.recipe.train.seeds
            left = evaluate.missing(identity, prepared, count, settings.results)
            kept += count - len(left)
            cells += [Job(request, identity, prepared, seed) for seed in left]
            unfinished += [prepared] if left else []
        needs = needed(upstream, identity.fingerprint, unfinished, settings)
        for kind, clips in needs.missing.items():  # two names of one upstream: merged:alpha=0
            keys = {clip.key: (identity.fingerprint, kind, clip.key) for clip in clips}
            needs.missing[kind] = [clip for clip in clips if keys[clip.key] not in passing]
            passing.update(keys.values())
        entries = {(identity.fingerprint, kind) for kind in needs.kinds if kind}
        wave = Wave(_passes(request, needs), cells, entries, needs.bytes)
        seconds = sum(clip.seconds for one in wave.passes for clip in one.clips)
        cnn = upstream.cnn_fingerprint()
        found.append(_Found(wave, cnn, cache.bytes_of(upstream, "cnn", seconds) if cnn else 0))
    return Work(identities, kept, _waves(_shared(found, settings), settings))


def needed(
    upstream: Upstream, fingerprint: str, tasks: Sequence[Prepared], settings: Settings
) -> Needs:
    """Frames are kept where they fit the budget, else the CNN's outputs, else nothing."""
    space = min(settings.cache_gb * 1e9, 0.9 * free_bytes(settings.store.root))
    cnn = upstream.cnn_fingerprint()
    kinds: list[Kind | None] = []
    missing: dict[Kind, dict[str, Clip]] = {}
    total = 0
    for prepared in tasks:
        wishes: list[Kind] = [prepared.kind]
        if prepared.kind != "mean" and settings.features != "cache":
            wishes = wishes * (settings.features == "auto") + ["cnn"] * (cnn is not None)
        kinds.append(None)
        forced = prepared.kind == "mean" or settings.features == "cache"
        for kind in wishes:
            entry = cnn if kind == "cnn" and cnn else fingerprint
            new = {clip.key: clip for clip in settings.store.missing(entry, kind, prepared.clips)}
            new = {k: c for k, c in new.items() if k not in missing.get(kind, {})}
            size = cache.bytes_of(upstream, kind, sum(clip.seconds for clip in new.values()))
            if forced or total + size <= space:
                missing.setdefault(kind, {}).update(new)
                kinds[-1] = kind
                total += size
                break
    return Needs(kinds, {k: list(clips.values()) for k, clips in missing.items() if clips}, total)


def _passes(request: Request, needs: Needs) -> list[Pass]:
    """Utterances that need the same kinds, shard by shard: none passes twice."""
    kinds: dict[str, list[Kind]] = {}
    clips: dict[str, Clip] = {}
    for kind, wanted in needs.missing.items():
        for clip in wanted:
            clips[clip.key] = clip
            kinds.setdefault(clip.key, []).append(kind)
    groups: dict[tuple[Kind, ...], list[Clip]] = {}
    for key, clip in clips.items():
        groups.setdefault(tuple(kinds[key]), []).append(clip)
    return [
        Pass(request, shard, list(group), share_cnn="cnn" in group)
        for group, members in groups.items()
        for shard in cache.shards(members)
    ]


class _Found(NamedTuple):
    wave: Wave
    cnn: str | None  # fingerprint of the upstream's CNN
    cnn_bytes: int  # that its outputs would take


def _shared(found: Sequence[_Found], settings: Settings) -> list[Wave]:
    """Speech-FT never trains the CNN: upstreams with the same one pass its outputs on on disk."""
    users = Counter(one.cnn for one in found if one.wave.passes)
    waves = []
    for wave, cnn, size in found:
        there = cnn is not None and (settings.store.root / cnn / "cnn").is_dir()
        fits = wave.bytes + size <= settings.cache_gb * 1e9
        if cnn is not None and (there or users[cnn] > 1) and fits:
            passes = [one._replace(share_cnn=True) for one in wave.passes]
            wave = Wave(passes, wave.cells, wave.entries | {(cnn, "cnn")}, wave.bytes + size)
        waves.append(wave)
    return waves


def _waves(found: Sequence[Wave], settings: Settings) -> list[Wave]:
    """Consecutive upstreams together as long as what they write fits the budget."""
    waves: list[Wave] = []
    for wave in found:
        if waves and waves[-1].bytes + wave.bytes <= settings.cache_gb * 1e9:
            last = waves.pop()
            merged = (last.passes + wave.passes, last.cells + wave.cells)
            wave = Wave(*merged, last.entries | wave.entries, last.bytes + wave.bytes)
        waves.append(wave)
    for wave in waves:
        # the long ones first, so that no process waits for the last
        wave.cells.sort(key=lambda job: job.prepared.kind == "mean")
    return [wave for wave in waves if wave.cells]
