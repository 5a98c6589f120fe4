"""RTTM: who speaks when, for diarisation (NIST's Rich Transcription Time Marked files)."""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from downstream.base import AND, Example
from downstream.corpora.common import read_text
from downstream.corpora.utterances import Utterance, seconds
from downstream.tasks.segments import BEYOND, require_inside, write
from upstream import audio
from upstream.common.errors import UserError, near_miss

# the kinds of line that say something else, or nothing about turns
OTHERS = frozenset(
    "SEGMENT NOSCORE NO_RT_METADATA LEXEME NON-LEX NON-SPEECH FILLER EDIT SU IP CB A/P "
    "SPKR-INFO".split()
)
LEAST = 0.0001  # seconds; targets are rounded to this
NUMBER = re.compile(r"<NA>|[0-9]*\.?[0-9]+(e-?[0-9]+)?", re.IGNORECASE)  # confidence, look-ahead
Turn = tuple[str, float, float]  # speaker, start, end in seconds
Spans = dict[str, tuple[list[float], list[float]]]  # speaker -> starts and ends, apart, in order


def with_turns(listed: Sequence[Utterance], source: Path) -> list[Example]:
    """The examples with `[["speaker", start, end], ...]` as targets, seconds from their beginning.

    source: an RTTM file, or a folder of *.rttm; times count from the beginning of the recording,
    which is named by an utterance's id, or by its path or file name without suffix. Turns of one
    speaker that touch are one; an utterance without turns is silence. Where the table names no
    speaker, those of the turns are the example's, for its score rests on them. Raises UserError.
    """
    if os.path.isdir(source):
        files = sorted(source.glob("*.rttm"))
        if not files:
            raise UserError(f"{source}: holds no *.rttm")
    else:
        files = [source]
    recordings = {name: merged(turns) for name, turns in _recordings(files).items()}
    wanted = [_called(utterance, recordings) for utterance in listed]
    _require_matched(listed, wanted, recordings, source)
    examples = []
    measured: set[str] = set()  # files that are heard in parts
    for (example, _, _), name in zip(listed, wanted):
        spans = recordings.get(name, {})
        if example.end is not None and spans and example.path not in measured:
            measured.add(example.path)
            length = audio.seconds(example.path)
            if example.end <= length + BEYOND:  # or it is no part of the file, which is told later
                last = max(ends[-1] for _, ends in spans.values())
                require_inside(f"{source}: {name}", last, length)
        turns = within(spans, example.start, example.end)
        if turns and example.speaker == example.id:
            example = example._replace(speaker=AND.join(sorted({who for who, _, _ in turns})))
        examples.append(example._replace(target=write(turns)))
    return examples


def merged(turns: Iterable[Turn]) -> Spans:
    """Each speaker's turns apart, those that touch joined."""
    spans: Spans = {}
    for speaker, start, end in sorted(turns, key=lambda turn: turn[1]):
        starts, ends = spans.setdefault(speaker, ([], []))
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return spans


def within(spans: Spans, start: float | None, end: float | None) -> list[Turn]:
    """The turns of a part of a recording, in seconds from the part's beginning."""
    first, last = start or 0.0, float("inf") if end is None else end
    found = []
    for speaker, (starts, ends) in spans.items():
        for i in range(bisect_right(ends, first), bisect_left(starts, last)):
            times = (max(starts[i], first) - first, min(ends[i], last) - first)
            if times[1] - times[0] > LEAST:
                found.append((speaker, *times))
    return sorted(found, key=lambda turn: (turn[1], turn[2], turn[0]))


def _recordings(files: Sequence[Path]) -> dict[str, list[Turn]]:
    recordings: dict[str, list[Turn]] = {}
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            fields = line.split()
            if not fields or fields[0].startswith(";;") or fields[0] in OTHERS:
                continue
            blank = len(fields) > 10 and fields[5:7] == ["<NA>", "<NA>"]  # told below
            if fields[0] != "SPEAKER" or not (8 <= len(fields) <= 10 or blank):
                due = "`SPEAKER recording 1 start duration <NA> <NA> speaker <NA> <NA>`"
                raise UserError(f"{file}:{number}: {line.strip()!r:.200} is not {due}")
            if not all(map(NUMBER.fullmatch, fields[8:])):
                name = " ".join(fields[7:]).removesuffix(" <NA> <NA>").removesuffix(" <NA>")
                fault = f"the speaker {name!r:.100} has a blank in its name; write it with `_`"
                raise UserError(f"{file}:{number}: {fault}")
            try:
                start, duration = float(fields[3]), float(fields[4])
            except ValueError:
                start = duration = -1.0
            if not (0 <= start < 1e9 and 0 <= duration < 1e9):
                where = f"{file}:{number}:"
                start = seconds(fields[3], f"{where} the start")
                duration = seconds(fields[4], f"{where} the duration")
                raise UserError(f"{where} no recording is that long ({start + duration:g} s)")
            if duration:
                turn = (fields[7], start, start + duration)
                recordings.setdefault(fields[1], []).append(turn)
    if not recordings:
        raise UserError(f"{files[0]}: holds no turns (lines that begin with SPEAKER)")
    return recordings


def _called(utterance: Utterance, recordings: dict[str, Spans]) -> str:
    """What the RTTM calls the utterance's recording; its file name if nothing."""
    path = os.path.splitext(utterance.called)[0]
    names = (utterance.example.id, utterance.called, path, os.path.basename(path))
    return next((name for name in names if name in recordings), names[-1])


def _require_matched(
    listed: Sequence[Utterance],
    wanted: Sequence[str],
    recordings: dict[str, Spans],
    source: Path,
) -> None:
    """Two files of one name, or a misspelt name, which would pass for silence, are a UserError."""
    paths: dict[str, Utterance] = {}
    for utterance, name in zip(listed, wanted):
        first = paths.setdefault(name, utterance)
        if name in recordings and first.example.path != utterance.example.path:
            fault = f"the recording {name!r} of {source} is also the audio of {first.where}"
            raise UserError(f"{utterance.where}: {fault}; name recordings by their paths or ids")
    strange = recordings.keys() - set(wanted)
    silent = [i for i, name in enumerate(wanted) if name not in recordings]
    if silent and strange:
        raise UserError(
            f"{listed[silent[0]].where}: no turns of the recording {wanted[silent[0]]!r} in "
            f"{source}, which has turns of {len(strange)} recordings that are not in the table"
            f"{near_miss(wanted[silent[0]], sorted(strange)[:5])}; correct the name or drop the "
            "others' lines"
        )
