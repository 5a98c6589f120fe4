"""Kaldi data directories: wav.scp, segments, text, utt2spk and what lies beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from downstream.base import Example
from downstream.corpora.common import read_text, require_folder
from downstream.corpora.rttm import with_turns
from downstream.corpora.trials import with_trials
from downstream.corpora.utterances import Utterance, of_splits, require_audio, seconds
from upstream.common.errors import UserError, near_miss

Entries = dict[str, tuple[int, str]]  # first word of a line -> its number and the rest
CHANNELS = {"A": 0, "B": 1, "1": 0, "2": 1}  # as reco2file_and_channel names them


class Segment(NamedTuple):
    """An utterance's part of a recording, in seconds, and the place that says so."""

    recording: str
    start: float | None
    end: float | None
    where: str


def read(
    root: Path,
    target: str,
    *,
    train: str | None = "train",
    dev: str | None = "dev",
    test: str | None = "test",
    group: str | None = None,
    audio: str = ".",
    documents: bool = False,
) -> list[Example]:
    """Kaldi data directories under `root`, one for each split; nothing of Kaldi is needed.

    `target` is the file of a directory that says what the task learns: `text`, any file of a word
    per utterance or speaker (`utt2spk`, `utt2lang`, `spk2gender`), `rttm` (SD) or `trials` (ASV,
    QbE; training then learns `utt2spk`; `documents` as in the manifest). `group` is such a file of
    words too. `wav.scp` may name files only: a line with a pipe is a command, which is never run.
    Where `reco2file_and_channel` gives channels (A and B, or 1 and 2) to recordings of one file,
    each is heard alone; recordings of files with one channel keep it.
    Relative paths are relative to `audio`, a folder under `root`. Without `utt2spk` each utterance
    is a speaker of its own; a split that is null is left out. Raises UserError, with the line.
    """
    require_folder(root, "root")
    parts = {"train": train, "dev": dev, "test": test}
    folders = {s: require_folder(root / name, s) for s, name in parts.items() if name is not None}
    listed: dict[str, list[Utterance]] = {}
    for split, folder in folders.items():
        own = target
        if target in ("rttm", "trials"):
            own = "utt2spk" if (target, split) == ("trials", "train") else ""
        of_part = list(_utterances(folder, root / audio, split, own, group))
        require_audio(of_part, "`audio` says what paths in wav.scp are relative to")
        if target == "rttm":
            examples = with_turns(of_part, folder / "rttm")
            of_part = [u._replace(example=example) for u, example in zip(of_part, examples)]
        listed[split] = of_part
    utterances = of_splits(listed)
    if target != "trials":
        return [utterance.example for utterance in utterances]
    files = [folder / "trials" for split, folder in folders.items() if split != "train"]
    return with_trials(utterances, files, documents)


def _utterances(
    folder: Path, audio: Path, split: str, target: str, group: str | None
) -> Iterator[Utterance]:
    recordings = _entries(folder / "wav.scp")
    for name, (line, path) in recordings.items():
        if "|" in path:
            fault = "is a command, which is not run; write its output to a file and name that"
            raise UserError(f"{folder}/wav.scp:{line}: the audio of {name!r} {fault}")
    source = folder / "segments"
    if source.exists():
        lines = _entries(source).items()
        listing = {name: _segment(line, f"{source}:{number}") for name, (number, line) in lines}
    else:
        source = folder / "wav.scp"
        listing = {n: Segment(n, None, None, f"{source}:{k}") for n, (k, _) in recordings.items()}
    speakers = _entries(folder / "utt2spk") if (folder / "utt2spk").exists() else None
    targets = _words(folder, target, listing, speakers, source) if target else {}
    groups = _words(folder, group, listing, speakers, source) if group else {}
    channels = _channels(folder, recordings)
    for name, (recording, start, end, where) in listing.items():
        if recording not in recordings:
            hint = near_miss(recording, recordings) if len(recordings) < 5_000 else ""
            raise UserError(f"{where}: wav.scp has no recording {recording!r}{hint}")
        path = str(audio / recordings[recording][1])
        speaker = _of(name, speakers, folder / "utt2spk", where) if speakers else name
        said = (targets.get(name, ""), speaker, split, groups.get(name, ""))
        channel = channels.get(recording)
        yield Utterance(Example(name, path, start, end, *said, channel), where, recording)


def _channels(folder: Path, recordings: Entries) -> dict[str, int]:
    """Recording -> its channel, of files that are several recordings. Raises UserError.

    Kaldi's file says `A` of every recording of one channel as well, which then says nothing.
    """
    path = folder / "reco2file_and_channel"
    if not path.exists():
        return {}
    channels: dict[str, int] = {}
    shared = Counter(audio for _, audio in recordings.values())
    for recording, (line, rest) in _entries(path).items():
        *_, channel = rest.split() or [""]
        if channel not in CHANNELS:
            fault = f"{channel!r} is no channel; A and B (or 1 and 2) are known"
            raise UserError(f"{path}:{line}: {fault}")
        audio = recordings.get(recording, (0, ""))[1]
        if shared[audio] > 1 or CHANNELS[channel]:
            channels[recording] = CHANNELS[channel]
    return channels


def _segment(line: str, where: str) -> Segment:
    """`recording start end`; an end of -1 is that of the recording."""
    fields = line.split()
    if len(fields) != 3:
        raise UserError(f"{where}: is not `utterance recording start end`")
    start = seconds(fields[1], f"{where}: the start")
    end = None if _is(fields[2], -1) else seconds(fields[2], f"{where}: the end")
    if end is not None and end <= start:
        raise UserError(f"{where}: the part ends at {end:g} s, before it begins")
    return Segment(fields[0], start, end, where)


def _is(text: str, value: float) -> bool:
    """Whether the text is this number, however it is written."""
    try:
        return float(text) == value
    except ValueError:
        return False


def _words(
    folder: Path, file: str, listing: Mapping[str, object], speakers: Entries | None, source: Path
) -> dict[str, str]:
    """Utterance -> what `file` says of it, or of its speaker. Raises UserError."""
    path = folder / file
    entries = _entries(path)
    if not file.startswith("spk2"):
        for name, (line, _) in entries.items():
            if name not in listing:
                fault = f"{source.name} has no {name!r}; run utils/fix_data_dir.sh on {folder}"
                raise UserError(f"{path}:{line}: {fault}")
        return {name: _of(name, entries, path, str(source)) for name in listing}
    if speakers is None:
        raise UserError(f"{path}: speaks of speakers, but there is no utt2spk beside it")
    of = {name: _of(name, speakers, folder / "utt2spk", str(source)) for name in listing}
    return {name: _of(speaker, entries, path, str(source)) for name, speaker in of.items()}


def _of(name: str, entries: Entries, path: Path, where: str) -> str:
    line, value = entries.get(name, (0, ""))
    if not value:
        place = f"{path}:{line}" if line else str(path)
        raise UserError(f"{place}: says nothing of {name!r}, which {where} lists; add it")
    return value


def _entries(path: Path) -> Entries:
    """The lines of a file by their first word. Raises UserError."""
    entries: Entries = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        name, *rest = line.split(maxsplit=1) or [""]
        if name in entries:
            raise UserError(f"{path}:{number}: {name!r} is already on line {entries[name][0]}")
        if name:
            entries[name] = number, rest[0].strip() if rest else ""
    if not entries:
        raise UserError(f"{path}: holds no lines")
    return entries
