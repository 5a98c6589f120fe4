"""Lhotse's cuts: JSON lines, read as they are (the library is not needed)."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from downstream.base import AND, Example
from downstream.corpora import rttm
from downstream.corpora.tables import text_of
from downstream.corpora.utterances import Utterance, of_splits, require_audio
from downstream.tasks.segments import require_inside, write
from upstream.common import disk
from upstream.common.errors import UserError

LONGEST = 1 << 24  # bytes of a line: a cut of an hour has about a megabyte
ROUNDED = 0.01  # seconds that a supervision may go beyond its cut: times are rounded
FIELDS = ("text", "speaker", "language", "gender")


def read(
    root: Path,
    target: str,
    *,
    train: str | None = "cuts_train.jsonl.gz",
    dev: str | None = "cuts_dev.jsonl.gz",
    test: str | None = "cuts_test.jsonl.gz",
    group: str | None = None,
) -> list[Example]:
    """Cuts of Lhotse, one .jsonl or .jsonl.gz for each split, under `root`.

    `target` is a field of a cut's one supervision: text, speaker, language, gender or one of its
    `custom` fields, and so is `group`; or `turns`: who speaks when, of all supervisions (SD). The
    speaker is the supervisions' or, where they name none, the recording. Audio must be whole files
    without transforms, of which a cut has one channel (MonoCuts in Lhotse's words); relative paths
    are relative to `root`. A split that is null is left out. Raises UserError, with the line.
    """
    parts = {"train": train, "dev": dev, "test": test}
    listed = {
        split: [_utterance(root, cut, where, split, target, group) for cut, where in _cuts(path)]
        for split, path in ((s, root / name) for s, name in parts.items() if name is not None)
    }
    for of_part in listed.values():
        require_audio(of_part, "relative paths are relative to `root`")
    return [utterance.example for utterance in of_splits(listed)]


def _cuts(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    disk.require_file(path)
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LONGEST):
                number += 1
                where = f"{path}:{number}"
                if len(line) == LONGEST:
                    raise UserError(f"{where}: longer than {LONGEST} bytes, which is no cut")
                if line.strip():
                    cut = json.loads(line)
                    if not isinstance(cut, dict):
                        raise UserError(f"{where}: not an object")
                    yield cut, where
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}:{number}: not a line of JSON ({error!s:.100})") from error
    if not number:
        raise UserError(f"{path}: holds no cuts")


def _utterance(
    root: Path, cut: dict[str, Any], where: str, split: str, target: str, group: str | None
) -> Utterance:
    try:
        kind = cut["type"]
        if kind != "MonoCut":
            cure = "save its audio with CutSet.save_audios, whose cuts are plain"
            raise UserError(f"{where}: a {kind!s:.40} is not one piece of one file; {cure}")
        recording = cut["recording"]
        name, path = str(recording["id"]), _file(recording, where)
        start, end = float(cut["start"]), float(cut["start"]) + float(cut["duration"])
        if not 0 <= start < end < math.inf:
            raise UserError(f"{where}: the cut lasts from {start:g} to {end:g} s")
        whole = start == 0 and end >= float(recording["duration"])
        supervisions = list(cut["supervisions"])
        speakers = sorted({str(s["speaker"]) for s in supervisions if s.get("speaker")})
        example = Example(
            id=str(cut["id"]),
            path=str(root / path),
            start=None if whole else start,
            end=None if whole else round(end, 8),
            target=(
                _turns(supervisions, start, end, float(recording["duration"]), where)
                if target == "turns"
                else _field(supervisions, target, end - start, where)
            ),
            speaker=AND.join(speakers) or name,
            split=split,
            group=_field(supervisions, group, end - start, where) if group else "",
            channel=_channel(cut, recording, where),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: not a cut of Lhotse ({error!r:.100})") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not a cut of Lhotse ({error!s:.100})") from error
    return Utterance(example, where, name)


def _file(recording: dict[str, Any], where: str) -> str:
    """The one file of a recording; what would be another sound than the cut's is a UserError."""
    sources = recording["sources"]
    if recording.get("transforms"):
        fault = f"has transforms ({recording['transforms'][0]['name']!s:.40})"
    elif len(sources) != 1:
        fault = "is several files"
    elif sources[0]["type"] != "file":
        fault = f"is a {sources[0]['type']!s:.20}, not a file"
    else:
        return str(sources[0]["source"])
    raise UserError(f"{where}: its audio {fault}; save it with CutSet.save_audios and use its cuts")


def _channel(cut: dict[str, Any], recording: dict[str, Any], where: str) -> int | None:
    """The cut's channel; None where the file has no other."""
    channels = list(recording["sources"][0]["channels"])
    channel = cut.get("channel", 0)
    if channel not in channels:
        fault = f"its channel {channel!s:.40} is none of the file's ({channels!s:.40})"
        raise UserError(f"{where}: {fault}")
    return int(channel) if len(channels) > 1 else None


def _field(supervisions: list[dict[str, Any]], name: str, length: float, where: str) -> str:
    """What the one supervision of a cut says."""
    if len(supervisions) != 1:
        cure = "make one cut of each with CutSet.trim_to_supervisions"
        raise UserError(f"{where}: {len(supervisions)} supervisions, one is needed; {cure}")
    said = supervisions[0]
    begin, end = float(said["start"]), float(said["start"]) + float(said["duration"])
    if name == "text" and not -ROUNDED <= begin <= end <= length + ROUNDED:
        fault = "its supervision goes beyond the cut, so that words may be cut off"
        raise UserError(f"{where}: {fault}; drop it, or trim cuts to supervisions")
    values = {k: said.get(k) for k in FIELDS} | (said.get("custom") or {})
    value = values.get(name)
    if isinstance(value, (dict, list)) or not text_of(value):
        known = ", ".join(key for key, v in values.items() if v is not None)
        raise UserError(f"{where}: its supervision has no {name!r} (it has: {known:.200})")
    return str(value).strip()


def _turns(
    supervisions: list[dict[str, Any]], begin: float, end: float, whole: float, where: str
) -> str:
    """Who speaks when in a cut from `begin` to `end` of a recording of `whole` seconds."""
    turns = []
    for said in supervisions:
        start, duration = float(said["start"]), float(said["duration"])
        if not (abs(start) < 1e9 and 0 <= duration < 1e9) or not said.get("speaker"):
            raise UserError(f"{where}: a supervision without speaker, start or duration")
        require_inside(f"{where}: a supervision", begin + start + duration, whole)
        # those of a cut may begin before it
        turns.append((str(said["speaker"]), start, start + duration))
    return write(rttm.within(rttm.merged(turns), 0.0, end - begin))
