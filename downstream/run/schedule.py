"""What a run has to do: the cells that are missing, and the passes over audio that they need.

A run is rounds of passes and then cells. A round's features fit the disk budget together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from downstream.run import cell as cells
from downstream.run.cell import Identity
from downstream.run.prepare import Prepared
from upstream import load
from upstream.base import Upstream
from upstream.common.disk import free_bytes
from upstream.features.clips import Clip, overlapping
from upstream.features.extract import Kind, bytes_of, shards
from upstream.features.store import Store

Where = Literal["auto", "cache", "recompute"]


class Request(NamedTuple):
    """An upstream to score."""

    name: str  # on the command line and in the tables
    spec: str  # what to load: of one that is built here, the folder of its weights
    options: dict[str, Any] = {}  # of its loader

    def load(self) -> Upstream:
        return load(self.spec, **self.options)


@dataclass(frozen=True)
class RunOptions:
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


class CellJob(NamedTuple):
    """One missing cell."""

    request: Request
    identity: Identity
    prepared: Path  # what `Prepared.save` wrote
    seed: int
    seen: int  # test utterances that the upstream was fine-tuned on


class Round(NamedTuple):
    """Passes and cells of upstreams whose features fit the disk budget together."""

    passes: list[Pass]
    cells: list[CellJob]
    entries: set[tuple[str, Kind]]  # (fingerprint, kind) that must not be evicted meanwhile
    bytes: int  # that the passes will write


class Work(NamedTuple):
    """What a run has to do."""

    identities: list[Identity]
    kept: int
    rounds: list[Round]

    @property
    def cells(self) -> list[CellJob]:
        return [job for part in self.rounds for job in part.cells]


class Needs(NamedTuple):
    """What an upstream still has to compute for some tasks, and where their features will be."""

    kinds: dict[str, Kind | None]  # by a task's revision; None: its frames are recomputed
    missing: dict[Kind, list[Clip]]  # utterances still to pass, by what is kept of them
    bytes: int  # that keeping them takes


def survey(
    requests: Sequence[Request], tasks: Sequence[Prepared], seeds: int | None, options: RunOptions
) -> Work:
    """Load every upstream and find its missing passes and cells."""
    identities: list[Identity] = []
    rounds: list[Round] = []
    files = [task.save(options.store.root / "prepared") for task in tasks]
    quick = {file for file, task in zip(files, tasks) if task.kind == "mean"}
    cnns: list[tuple[str | None, int]] = []  # of each round's upstream: fingerprint, bytes
    kept = 0
    for request in requests:
        upstream = request.load()
        identity = Identity(request.name, upstream.fingerprint(), upstream.source)
        identities.append(identity)
        jobs: list[CellJob] = []
        unfinished = []
        for task, file in zip(tasks, files):
            count = seeds or task.recipe.train.seeds
            missing = cells.missing(identity, task, count, options.results)
            kept += count - len(missing)
            seen = len(overlapping(upstream.heard, task.tested)) if missing else 0
            jobs += [CellJob(request, identity, file, seed, seen) for seed in missing]
            unfinished += [task] if missing else []
        needs = needed(upstream, identity.fingerprint, unfinished, options)
        entries = {(identity.fingerprint, kind) for kind in needs.kinds.values() if kind}
        rounds.append(Round(_passes(request, needs), jobs, entries, needs.bytes))
        cnn = upstream.cnn_fingerprint()
        seconds = sum(clip.seconds for job in rounds[-1].passes for clip in job.clips)
        cnns.append((cnn, bytes_of(upstream, "cnn", seconds) if cnn else 0))
    rounds = [r for r in _joined(_sharing(rounds, cnns, options), options) if r.cells]
    for joined in rounds:
        # the long ones first, so that no process waits for the last
        joined.cells.sort(key=lambda job: job.prepared in quick)
    return Work(identities, kept, rounds)


def needed(
    upstream: Upstream, fingerprint: str, tasks: Sequence[Prepared], options: RunOptions
) -> Needs:
    """Means are kept; of frames what fits the budget: themselves, else what the CNN put out."""
    space = min(options.cache_gb * 1e9, 0.9 * free_bytes(options.store.root))
    cnn = upstream.cnn_fingerprint()
    kinds: dict[str, Kind | None] = {}
    missing: dict[Kind, dict[str, Clip]] = {}
    total = 0
    for task in tasks:
        forced = task.kind == "mean" or options.features == "cache"
        wanted: list[Kind] = [task.kind] if forced or options.features == "auto" else []
        wanted += ["cnn"] if cnn and not forced else []
        kinds[task.revision] = None
        for kind in wanted:
            clips = missing.get(kind, {})
            entry = cnn if kind == "cnn" and cnn else fingerprint
            new = options.store.missing(entry, kind, task.clips)
            new = [clip for clip in new if clip.key not in clips]
            size = bytes_of(upstream, kind, sum(clip.seconds for clip in new))
            if forced or total + size <= space:
                missing[kind] = clips | {clip.key: clip for clip in new}
                kinds[task.revision] = kind
                total += size
                break
    return Needs(kinds, {k: list(clips.values()) for k, clips in missing.items() if clips}, total)


def _passes(request: Request, needs: Needs) -> list[Pass]:
    """Utterances that need the same kinds, shard by shard: none passes twice."""
    clips = {clip.key: clip for members in needs.missing.values() for clip in members}
    kinds: dict[str, tuple[Kind, ...]] = {}
    for kind, members in needs.missing.items():
        for clip in members:
            kinds[clip.key] = (*kinds.get(clip.key, ()), kind)
    groups: dict[tuple[Kind, ...], list[Clip]] = {}
    for key, group in kinds.items():
        groups.setdefault(group, []).append(clips[key])
    return [
        Pass(request, shard, list(group), share_cnn="cnn" in group)
        for group, members in groups.items()
        for shard in shards(members)
    ]


def _sharing(
    rounds: Sequence[Round], cnns: Sequence[tuple[str | None, int]], options: RunOptions
) -> Iterator[Round]:
    """Speech-FT never trains the CNN: upstreams with the same one share its outputs, on disk."""
    users = Counter(cnn for alone, (cnn, _) in zip(rounds, cnns) if alone.passes)
    for alone, (cnn, size) in zip(rounds, cnns):
        shared = cnn and (users[cnn] > 1 or options.store.folder(cnn, "cnn").is_dir())
        if cnn and shared and alone.bytes + size <= options.cache_gb * 1e9:
            passes = [job._replace(share_cnn=True) for job in alone.passes]
            kept: set[tuple[str, Kind]] = {(cnn, "cnn"), *alone.entries}
            yield Round(passes, alone.cells, kept, alone.bytes + size)
        else:
            yield alone


def _joined(rounds: Iterable[Round], options: RunOptions) -> Iterator[Round]:
    """Consecutive upstreams together as long as what they write fits the budget."""
    joined = Round([], [], set(), 0)
    for alone in rounds:
        if joined.bytes + alone.bytes > options.cache_gb * 1e9:
            yield joined
            joined = Round([], [], set(), 0)
        joined = Round(
            joined.passes + alone.passes,
            joined.cells + alone.cells,
            joined.entries | alone.entries,
            joined.bytes + alone.bytes,
        )
    yield joined
