"""What is doubtful about a corpus: audio that train and test share, silence, odd targets.

A doubt is a line that goes with every score of the recipe (score.json, the page); it changes none.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from downstream.base import HEADS, Example, Labels, Task, listing
from downstream.tasks.segments import require_inside
from upstream import audio
from upstream.common import disk
from upstream.features.clips import Clip, Heard

if TYPE_CHECKING:
    from downstream.run.prepare import Prepared, Split

LEVELS = "levels.json"  # beside the index of audio files: what was measured, by the clip's key
MEASURED = 1_000  # clips at most, those of several channels apart, and
MINUTES = 60  # of audio, of each clip
LONGEST = 60.0  # seconds at most
SILENT = 1e-3  # RMS of full scale, -60 dB: no speech is as quiet
CANCELLED = 0.1  # of the loudest channel's RMS: what averaging leaves of opposite phases
NOTHING = frozenset("nan none null na n/a <na> nat".split())  # how tools write a missing value


class Level(NamedTuple):
    """How loud a clip is: RMS, of full scale."""

    heard: float  # of the average of the channels, or of the one that was chosen
    loudest: float  # of the loudest channel that is heard
    differ: float  # of the difference between the two first channels

    @property
    def cancelled(self) -> bool:
        """Whether averaging the channels leaves next to nothing of them."""
        return self.loudest > SILENT and self.heard < max(SILENT, CANCELLED * self.loudest)

    @property
    def silent(self) -> bool:
        """Whether there was nothing to hear in the first place."""
        return self.loudest <= SILENT


def require_times_inside(task: Task, example: Example, seconds: float) -> None:
    """Raises UserError for a target that says what is heard behind the end of its audio."""
    require_inside(example.id, task.last_second(example.target), seconds)


def shared_audio(
    corpus: Sequence[Example], clips: Sequence[Clip], splits: Mapping[str, Split]
) -> list[str]:
    """Doubts: test or dev utterances whose audio train has too, by content and time.

    And audio that stands in train with two different targets.
    """
    shared: dict[str, dict[int, int]] = {"test": {}, "dev": {}}
    for split in splits.values():
        train = Heard(clips[i].key for i in split["train"])
        for part, pairs in shared.items():
            for i in split[part]:
                if i not in pairs and train.shares(clips[i]):
                    pairs[i] = -1
                    if len(pairs) <= 3:
                        pairs[i] = _partner(clips, i, split["train"])
    doubts = []
    for part, pairs in shared.items():
        if pairs:
            total = len({i for split in splits.values() for i in split[part]})
            names = [
                corpus[i].id if corpus[i].id == corpus[j].id else f"{corpus[i].id} = {corpus[j].id}"
                for i, j in pairs.items()
            ]
            doubts.append(
                f"{len(pairs)} of {total} {part} utterances are the same audio as some of train: "
                f"{listing(names)}; drop them, or the score is not of unheard speech"
            )
    training = sorted({i for split in splits.values() for i in split["train"]})
    first: dict[str, int] = {}
    odd = []
    for i in training:
        other = first.setdefault(clips[i].key, i)
        if corpus[other].target != corpus[i].target:
            odd.append(f"{corpus[other].id} = {corpus[i].id}")
    if odd:
        doubts.append(
            f"{len(odd)} training utterances are the same audio as others with another target: "
            f"{listing(odd)}"
        )
    return doubts


def _partner(clips: Sequence[Clip], clip: int, train: Iterable[int]) -> int:
    """The first of train that shares audio with the clip."""
    heard = Heard([clips[clip].key])
    return next(
        j for j in train if clips[j].digest == clips[clip].digest and heard.shares(clips[j])
    )


def channels_and_silence(
    corpus: Sequence[Example], clips: Sequence[Clip], cache: Path
) -> list[str]:
    """Doubts: several channels that are averaged, and utterances in which nothing is heard."""
    levels = measure(clips, cache)
    several = [i for i, clip in enumerate(clips) if clip.channels > 1 and clip.channel is None]
    measured = [i for i in several if clips[i].key in levels]
    differ = [i for i in measured if levels[clips[i].key].differ > SILENT]
    doubts = []
    cancelled = [corpus[i].id for i in measured if levels[clips[i].key].cancelled]
    if cancelled:
        doubts.append(
            f"{len(cancelled)} of {len(measured)} measured utterances are near silent after "
            f"averaging their channels (opposite phases?): {listing(cancelled)}; take one of them "
            "with `channel`"
        )
    if differ or len(measured) < len(several):
        doubts.append(
            f"{len(several)} of {len(clips)} utterances have several channels, which are averaged; "
            f"in {len(differ)} of {len(measured)} measured they differ: `channel` takes one of them"
        )
    silent = [e.id for e, c in zip(corpus, clips) if c.key in levels and levels[c.key].silent]
    if silent:
        total = sum(clip.key in levels for clip in clips)
        doubts.append(
            f"{len(silent)} of {total} measured utterances are near silent (below -60 dB of full "
            f"scale): {listing(silent)}"
        )
    return doubts


def measure(clips: Sequence[Clip], cache: Path) -> dict[str, Level]:
    """Levels by key, of all clips of a small corpus and of a fixed sample of a large one.

    They are remembered in `cache`. Raises UserError for audio that cannot be read.
    """
    stored = disk.read_checked(cache / LEVELS)
    rows = stored.items() if isinstance(stored, dict) else ()
    remembered = {key: Level(*row) for key, row in rows if _is_level(row)}
    chosen = _sample(clips)
    fresh = {key: _level(clip) for key, clip in chosen.items() if key not in remembered}
    if fresh:
        disk.write_checked(cache / LEVELS, remembered | fresh)
    return {key: fresh.get(key) or remembered[key] for key in chosen}


def _is_level(row: Any) -> bool:
    numbers = isinstance(row, list) and len(row) == len(Level._fields)
    return numbers and all(isinstance(value, float) for value in row)


def _sample(clips: Sequence[Clip]) -> dict[str, Clip]:
    """By key, in an order that means nothing; those whose channels are averaged apart."""
    chosen: dict[str, Clip] = {}
    averaged = {clip.key: clip for clip in clips if clip.channels > 1 and clip.channel is None}
    for members in (averaged, {clip.key: clip for clip in clips}):
        seconds = 0.0
        for key in heapq.nsmallest(MEASURED, members):
            if seconds > 60 * MINUTES:
                break
            chosen[key] = members[key]
            seconds += min(LONGEST, members[key].seconds)
    return chosen


def _level(clip: Clip) -> Level:
    start = clip.start or 0.0
    end = clip.end
    if clip.seconds > LONGEST:
        end = start + LONGEST
    samples, _ = audio.read(clip.path, clip.start, end)
    if clip.channel is not None:
        samples = samples[:, clip.channel : clip.channel + 1]
    rms = samples.double().square().mean(0).sqrt()
    heard = float(samples.double().mean(1).square().mean().sqrt())
    differ = samples[:, :2].double().diff(dim=1).square().mean().sqrt() if len(rms) > 1 else 0.0
    return Level(heard, float(rms.max()), float(differ))


def doubtful_targets(prepared: Prepared) -> list[str]:
    """Doubts of the task's, missing values taken for labels, texts too long for CTC."""
    task, items = prepared.recipe.kind_of_task(), prepared.items
    doubts: list[str] = []
    for split, part in itertools.product(prepared.splits.values(), ("train", "dev", "test")):
        doubts += task.doubts([items[i] for i in split[part]])
    labels = prepared.labels(next(iter(prepared.splits)))
    nothing = {
        target
        for target in set(prepared.targets)
        if target.lower() in NOTHING and labels.split(target) == [target]
    }
    missing = [item for item in items if item.target in nothing]
    if missing:
        counts = Counter(item.target for item in missing)
        found = ", ".join(f"{target!r} ({count})" for target, count in counts.items())
        doubts.append(
            f"{len(missing)} targets look like a missing value and are a class: {found}; "
            f"{listing([item.id for item in missing])}"
        )
    return list(dict.fromkeys(doubts)) + _too_long(prepared, labels)


def _too_long(prepared: Prepared, labels: Labels) -> list[str]:
    """Targets that have more symbols than their audio has frames, if CTC is to align them."""
    recipe = prepared.recipe
    if recipe.kind_of_task().features == "mean":
        return []
    from downstream.tasks.heads import CTC

    name = recipe.head.get("name", recipe.kind_of_task().head)
    head: Callable[..., object] | None = HEADS.named(name) if name else None
    if not (isinstance(head, type) and issubclass(head, CTC)):
        return []
    long = []
    for i in sorted({i for split in prepared.splits.values() for p in split.values() for i in p}):
        target, clip = prepared.targets[i], prepared.clips[i]
        frames = int(clip.seconds / labels.frame)
        if 2 * len(target) + 2 > frames:  # or there are enough, whatever the symbols are
            tokens = [*labels.split(target), *[labels.eos] * bool(labels.eos)]
            # a blank must stand between two symbols that are the same
            need = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
            if need > frames:
                long.append(f"{prepared.items[i].id} ({need} for {frames})")
    if not long:
        return []
    milliseconds = 1000 * labels.frame
    return [
        f"{len(long)} targets have more symbols than their audio has frames of {milliseconds:g} ms,"
        f" so that CTC cannot align them: {listing(long)}"
    ]
