"""What a run has to do: the cells that are missing, and the passes over audio that they need.

A run is rounds of passes and then cells. A round's features fit the disk budget together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from downstream.run import cell as cells
from downstream.run.cell import Identity
from downstream.run.cluster import LOCAL
from downstream.run.prepare import Prepared
from upstream import load
from upstream.base import SAMPLE_RATE, Upstream
from upstream.common.disk import free_bytes
from upstream.features import speeds
from upstream.features.clips import Clip, overlapping
from upstream.features.extract import Kind, bytes_of, shards
from upstream.features.provide import Where
from upstream.features.store import Store


class Request(NamedTuple):
    """An upstream to score."""

    name: str  # on the command line and in the tables
    spec: str  # what to load: of one that is built here, the folder of its weights
    options: dict[str, Any] = {}  # of its loader

    def load(self) -> Upstream:
        return load(self.spec, **self.options)


@dataclass(frozen=True)
class RunOptions:
    """How cells are computed; on a CPU nothing here changes a byte of a prediction."""

    results: Path
    workers: int
    device: str
    cache_gb: float = 20.0
    batch_seconds: float = 32.0
    features: Where = "auto"  # frames: kept on disk if they fit, or one of the two by force
    executor: str = "local"  # or a cluster, as `cluster.asked` reads it

    @property
    def store(self) -> Store:
        return Store(self.results / "cache")


class Pass(NamedTuple):
    """One shard of utterances through one upstream, for every task that needs them."""

    request: Request
    clips: list[Clip]
    kinds: list[Kind]  # what is kept of them
    part: str = ""  # "2 of 5", where an upstream has several passes
    task: str = ""  # it is of none

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.request.name}: features{self.part and f', part {self.part}'}"


class CellJob(NamedTuple):
    """One missing cell."""

    request: Request
    identity: Identity
    prepared: Path  # what `Prepared.save` wrote
    seed: int
    seen: int  # test utterances that the upstream was fine-tuned on
    task: str
    together: tuple[CellJob, ...] = ()  # all, itself too, that one pass an epoch over audio feeds

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.identity.name}: {self.task} seed {self.seed}"


@dataclass
class Round:
    """Passes and cells of upstreams whose features fit the disk budget together."""

    passes: list[Pass] = field(default_factory=list)
    cells: list[CellJob] = field(default_factory=list)
    entries: set[tuple[str, Kind]] = field(default_factory=set)  # not to be evicted meanwhile
    bytes: int = 0  # that the passes will write


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
    missing: dict[Kind, dict[str, Clip]]  # utterances still to pass by key, for what is kept
    entries: set[tuple[str, Kind]]  # of the store: fingerprint and kind
    bytes: int  # that keeping them takes


def survey(
    requests: Sequence[Request], tasks: Sequence[Prepared], seeds: int | None, options: RunOptions
) -> Work:
    """Load every upstream and find its missing passes and cells."""
    files = [task.save(options.store.root / "prepared") for task in tasks]
    identities: list[Identity] = []
    rounds: list[Round] = []  # of one upstream each
    cnns: list[tuple[str | None, int]] = []  # of each round's upstream: fingerprint, bytes
    sharing: dict[tuple[str, Path], str] = {}  # frames that are recomputed
    kept = 0
    for request in requests:
        upstream = request.load()
        identity = Identity(
            request.name,
            upstream.fingerprint(),
            upstream.source,
            upstream.stride / SAMPLE_RATE,
        )
        identities.append(identity)
        jobs: list[CellJob] = []
        unfinished = []
        for task, file in zip(tasks, files):
            count = task.recipe.seeds(seeds)
            missing = cells.missing(identity, task, count, options.results)
            kept += count - len(missing)
            if missing:
                seen = len(overlapping(upstream.heard, task.tested))
                name = task.recipe.name
                jobs += [CellJob(request, identity, file, seed, seen, name) for seed in missing]
                unfinished.append(task)
        needs = needed(upstream, identity.fingerprint, unfinished, options)
        if upstream.padding_matters and None in needs.kinds.values():
            print(
                f"{request.name}: its frames follow from what they are padded with, and so from "
                "their batch: computed anew they give other scores than kept (--features cache)"
            )
        for task, file in zip(tasks, files):
            if needs.kinds.get(task.revision, task.kind) != task.kind:
                sharing[request.name, file] = task.sharing
        passes = _passes(request, needs.missing)
        rounds.append(Round(passes, jobs, needs.entries, needs.bytes))
        cnn = upstream.cnn_fingerprint()
        seconds = sum(clip.seconds for each in passes for clip in each.clips)
        cnns.append((cnn, bytes_of(upstream, "cnn", seconds) if cnn else 0))
    joined = [part for part in _joined(rounds, cnns, options) if part.cells]
    quick = {file for file, task in zip(files, tasks) if task.kind == "mean"}
    for part in joined:  # the long ones first, so that no process waits for the last
        part.cells.sort(key=lambda job: job.prepared in quick)
        part.cells = _together(part.cells, sharing, options.workers)
    return Work(identities, kept, joined)


def processes_each(workers: int, groups: int) -> int:
    """How many processes share the cells of a group; each makes the passes for its own."""
    return max(1, workers // max(1, groups))


def _together(
    jobs: Sequence[CellJob], sharing: Mapping[tuple[str, Path], str], workers: int
) -> list[CellJob]:
    """Cells that share blocks of audio know each other: as many at a time as leave nobody idle."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, job in enumerate(jobs):
        if key := sharing.get((job.request.name, job.prepared)):
            groups[job.request.name, key].append(place)
    parts = processes_each(workers, len(groups))
    found = list(jobs)
    for group in groups.values():
        for first in range(min(parts, len(group))):
            members = tuple(jobs[place] for place in group[first::parts])
            for place in group[first::parts]:
                found[place] = jobs[place]._replace(together=members)
    return found


def needed(
    upstream: Upstream, fingerprint: str, tasks: Sequence[Prepared], options: RunOptions
) -> Needs:
    """Means are kept; of frames what fits the budget: themselves, else what the CNN put out.

    With a window, those that heads are evaluated on are kept where those of training do not fit.
    """
    space = min(options.cache_gb * 1e9, 0.9 * free_bytes(options.store.root))
    cnn = upstream.cnn_fingerprint()
    needs, total = Needs({}, {}, set(), 0), 0
    for task in tasks:
        forced = task.kind == "mean" or options.features == "cache"
        keep = forced or (options.features == "auto" and _pays(upstream, task, options))
        wanted = [((fingerprint, task.kind), task.clips)] * keep
        if task.recipe.window and keep and not forced:
            wanted.append(((fingerprint, task.kind), task.evaluated))
        if cnn and not forced:
            wanted.append(((cnn, "cnn"), task.clips))
        needs.kinds[task.revision] = None
        for entry, heard in wanted:
            kind, clips = entry[1], needs.missing.get(entry[1], {})
            new = [c for c in options.store.missing(*entry, heard) if c.key not in clips]
            size = bytes_of(upstream, kind, sum(clip.seconds for clip in new))
            if forced or total + size <= space:
                needs.missing[kind] = clips | {clip.key: clip for clip in new}
                needs.entries.add(entry)
                total += size
                if heard is task.clips:
                    needs.kinds[task.revision] = kind
                    break
    return needs._replace(bytes=total)


def _pays(upstream: Upstream, task: Prepared, options: RunOptions) -> bool:
    """Whether frames are read back sooner than computed anew: measured, where it can be close."""
    if options.device == "cpu" or options.executor != LOCAL:
        return True
    train, train_clips = task.recipe.train, [i for s in task.splits.values() for i in s["train"]]
    if not train or not train_clips or task.recipe.window:  # a window has passes of its own
        return True
    heard = len(task.splits) * train.steps * train.accumulate * train.batch / len(train_clips)
    upstream.to(options.device)
    found = speeds.measure(upstream, task.clips, options.store.root, options.batch_seconds)
    rate, times = bytes_of(upstream, task.kind, 3600) / 3600, heard * task.recipe.seeds(None)
    pays = found.pays(rate, times)
    told = f"{task.recipe.name}: frames are {'kept' if pays else 'computed anew'}: "
    print(told + found.told(rate, times), flush=True)
    return pays


def _passes(request: Request, missing: dict[Kind, dict[str, Clip]]) -> list[Pass]:
    """Utterances that need the same kinds, shard by shard: none passes twice."""
    groups: dict[tuple[Kind, ...], list[Clip]] = defaultdict(list)
    for key, clip in {k: clip for clips in missing.values() for k, clip in clips.items()}.items():
        groups[tuple(kind for kind in missing if key in missing[kind])].append(clip)
    passes = [
        Pass(request, shard, list(kinds))
        for kinds, clips in groups.items()
        for shard in shards(clips)
    ]
    if len(passes) == 1:
        return passes
    return [job._replace(part=f"{n} of {len(passes)}") for n, job in enumerate(passes, 1)]


def _joined(
    rounds: Sequence[Round], cnns: Sequence[tuple[str | None, int]], options: RunOptions
) -> list[Round]:
    """Consecutive upstreams together as long as what they write fits the budget.

    Speech-FT never trains the CNN: upstreams with the same one share its outputs, on disk.
    """
    budget = options.cache_gb * 1e9
    users = Counter(cnn for alone, (cnn, _) in zip(rounds, cnns) if alone.passes)
    joined = [Round()]
    for alone, (cnn, size) in zip(rounds, cnns):
        shared = cnn and (users[cnn] > 1 or options.store.folder(cnn, "cnn").is_dir())
        if cnn and shared and alone.bytes + size <= budget:
            alone.passes = [job._replace(kinds=[*job.kinds, "cnn"]) for job in alone.passes]
            alone.entries.add((cnn, "cnn"))
            alone.bytes += size
        if joined[-1].bytes + alone.bytes > budget:
            joined.append(Round())
        joined[-1].passes += alone.passes
        joined[-1].cells += alone.cells
        joined[-1].entries |= alone.entries
        joined[-1].bytes += alone.bytes
    return joined
