"""What a recipe's corpus is, split by split: `benchmark.py check --recipe FILE` prints it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from downstream.base import AND, Item
from downstream.recipe import Recipe
from downstream.run import data_checks
from downstream.run.prepare import Prepared, prepare, without_collection
from upstream.common import user_code
from upstream.features.clips import Clip, Heard

MOST = 20  # labels and symbols that the text names
PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class SplitSheet:
    """One split. Counts are of utterances unless they are named otherwise."""

    utterances: int
    hours: float
    speakers: int  # those that the corpus names; 0: none
    labels: dict[str, int]  # the most frequent first; {} where targets are no single labels
    shortest: tuple[str, float] | None  # id and seconds; None of an empty split
    longest: tuple[str, float] | None
    channels: dict[str, int]  # "2, averaged" or "2, channel 0", by their number
    rates: dict[int, int]  # Hz of the files
    measured: int  # whose loudness was measured: all, or of a large corpus a sample
    near_silent: int  # of those, below -60 dB of full scale
    unknown: dict[str, int]  # symbols outside the vocabulary: how many


@dataclass(frozen=True)
class DataSheet:
    """A recipe's corpus. Splits are called train, dev and test, with a fold's name before them."""

    recipe: str
    splits: dict[str, SplitSheet]
    shared_speakers: dict[str, int]  # "train, test" -> speakers that are in both
    shared_audio: dict[str, int]  # "train, test" -> utterances of the latter that overlap
    code: list[str]  # the user's files that reading the recipe ran
    warnings: list[str]  # as in every score

    def as_json(self) -> str:
        """All fields."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    def as_text(self) -> str:
        """For people: a table with a row for each split, and lines."""
        from downstream.report.layout import text, wrapped

        heads = "split|utterances|hours|speakers|labels|channels|Hz|near silent"
        table = [heads.split("|")]
        lines = []
        for name, split in self.splits.items():
            table.append([
                name, str(split.utterances), f"{split.hours:.2f}", str(split.speakers or "-"),
                str(len(split.labels) or "-"), _counts(split.channels), _counts(split.rates),
                f"{split.near_silent} of {split.measured}",
            ])  # fmt: skip
            if split.shortest and split.longest:
                (short, least), (long, most) = split.shortest, split.longest
                lines.append(f"{name}: from {least:.2f} s ({short}) to {most:.2f} s ({long})")
            if split.labels:
                lines.append(f"{name} labels: {_named(split.labels)}")
            if split.unknown:
                lines.append(f"{name} symbols outside the vocabulary: {_named(split.unknown)}")
        lines += [f"{pair}: {n} speakers in both" for pair, n in self.shared_speakers.items() if n]
        lines += [
            f"{pair}: {n} utterances of the latter are audio of the former"
            for pair, n in self.shared_audio.items()
            if n
        ]
        if not any([*self.shared_speakers.values(), *self.shared_audio.values()]):
            lines.append("no speaker and no audio is in two splits")
        lines += [f"ran {path}" for path in self.code]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return f"{self.recipe}\n{text(table)}\n{wrapped(lines)}"


def data_sheet(recipe: Recipe, results: Path) -> DataSheet:
    """Read the recipe's corpus, whole utterances also where it trains on crops.

    Raises UserError for a corpus that cannot be used.
    """
    with without_collection():
        return _data_sheet(recipe, results)


def _data_sheet(recipe: Recipe, results: Path) -> DataSheet:
    prepared = prepare(recipe, results)
    if recipe.crop:
        prepared = prepare(dataclasses.replace(recipe, crop=None), results)
    levels = data_checks.measure(prepared.clips, results / "cache")
    splits: dict[str, SplitSheet] = {}
    speakers: dict[str, int] = {}
    audio: dict[str, int] = {}
    for fold, split in prepared.splits.items():
        named = {f"{fold} {part}".strip(): split[part] for part in PARTS}
        names = {name: _speakers(prepared, indices) for name, indices in named.items()}
        heard = {name: Heard(prepared.clips[i].key for i in part) for name, part in named.items()}
        for name, indices in named.items():
            splits[name] = _split(prepared, fold, indices, names[name], levels)
        for one, two in itertools.combinations(named, 2):
            speakers[f"{one}, {two}"] = len(names[one] & names[two])
            shared = (heard[one].shares(prepared.clips[i]) for i in named[two])
            audio[f"{one}, {two}"] = sum(shared)
    return DataSheet(recipe.path, splits, speakers, audio, _code(recipe), prepared.warnings)


def _split(
    prepared: Prepared,
    fold: str,
    indices: Sequence[int],
    speakers: set[str],
    levels: dict[str, data_checks.Level],
) -> SplitSheet:
    items: list[Item] = [prepared.items[i] for i in indices]
    clips: list[Clip] = [prepared.clips[i] for i in indices]
    lengths = [(clip.seconds, item.id) for clip, item in zip(clips, items)]
    extremes = (min(lengths), max(lengths)) if lengths else ()
    ends = [(name, round(seconds, 4)) for seconds, name in extremes]
    measured = [levels[clip.key] for clip in clips if clip.key in levels]
    single = prepared.recipe.kind_of_task().features == "mean"
    labels = prepared.labels(fold)
    foreign = () if labels.refusal else items  # where it is refused there are none
    unknown = Counter(symbol for item in foreign for symbol in labels.unknown(item.target))
    return SplitSheet(
        utterances=len(items),
        hours=round(sum(clip.seconds for clip in clips) / 3600, 4),
        speakers=len(speakers),
        labels=dict(Counter(item.target for item in items).most_common()) if single else {},
        shortest=ends[0] if ends else None,
        longest=ends[-1] if ends else None,
        channels=dict(Counter(map(_channels, clips)).most_common()),
        rates=dict(Counter(clip.rate for clip in clips).most_common()),
        measured=len(measured),
        near_silent=sum(level.silent or level.cancelled for level in measured),
        unknown=dict(unknown.most_common()),
    )


def _speakers(prepared: Prepared, indices: Sequence[int]) -> set[str]:
    """Those that are named: an utterance without one counts as a speaker of its own."""
    items = (prepared.items[i] for i in indices)
    named = {item.speaker for item in items if item.speaker != item.id}
    return {name for speaker in named for name in speaker.split(AND)}


def _channels(clip: Clip) -> str:
    if clip.channels == 1:
        return "1"
    which = "averaged" if clip.channel is None else f"channel {clip.channel}"
    return f"{clip.channels}, {which}"


def _code(recipe: Recipe) -> list[str]:
    """The user's files that the recipe names, and what of the user's they import."""
    names = [recipe.task, recipe.corpus.get("name"), recipe.head.get("name"), *recipe.metric]
    files: list[str] = []
    for name in names:
        match = user_code.NAME.fullmatch(name) if isinstance(name, str) else None
        if match:
            path = Path(match[1]).absolute()
            files += [str(path), *(str(m.__file__) for m in user_code.imported(path))]
    return list(dict.fromkeys(files))


def _counts(counts: dict[str, int] | dict[int, int]) -> str:
    """`16000`, or of several `16000 (70), 8000 (2)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _named(counts: dict[str, int]) -> str:
    most = [f"{name} {count}" for name, count in list(counts.items())[:MOST]]
    more = len(counts) - MOST
    return ", ".join(most) + (f" and {more} more" if more > 0 else "")
