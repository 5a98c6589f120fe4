"""NeMo's manifests: JSON lines, one file for each split.

{"audio_filepath": "wav/a.wav", "duration": 3.4, "text": "hello", "offset": 0.5, "speaker": "x"}
"""

from __future__ import annotations

from pathlib import Path

from downstream.base import Example
from downstream.corpora import tables
from downstream.corpora.utterances import (
    Columns,
    Utterance,
    of_splits,
    require_audio,
    seconds,
    utterances,
)
from upstream.common.errors import UserError

PATH, DURATION, OFFSET, END = "audio_filepath", "duration", "offset", "(end)"


def read(
    root: Path,
    target: str = "text",
    *,
    train: str | None = "train_manifest.json",
    dev: str | None = "dev_manifest.json",
    test: str | None = "test_manifest.json",
    speaker: str | None = None,
    group: str | None = None,
    id: str | None = None,
) -> list[Example]:
    """Manifests of NeMo under `root`; `target`, `speaker`, `group` and `id` are names of fields.

    Relative paths are relative to the manifest's folder. As NeMo does, `duration` seconds are
    heard from `offset` (without it: from the beginning). Without a field `speaker` each utterance
    is a speaker of its own; the usual id is the path without its suffix, and the part. A split
    that is null is left out. Raises UserError, with the line.
    """
    listed: dict[str, list[Utterance]] = {}
    for split, name in (("train", train), ("dev", dev), ("test", test)):
        if name is None:
            continue
        source = root / name
        asked = (PATH, DURATION, OFFSET, target, speaker, group, id, "speaker")
        fields = [field for field in asked if field is not None]
        columns, rows = tables.read(source, ".jsonl", only=fields)
        for needed in (PATH, DURATION):
            tables.require(needed, columns, source)
        who = speaker or ("speaker" if "speaker" in columns else None)
        use = Columns([target], PATH, id, who, None, OFFSET, END, group=group)
        timed = [_timed(row) for row in rows]
        listed[split] = utterances(source, [*columns, OFFSET, END], timed, use, source.parent)
        require_audio(listed[split], "paths are relative to the manifest's folder")
    return [utterance.example for utterance in of_splits(listed)]


def _timed(row: tables.Row) -> tables.Row:
    """The row with the end of its part. Raises UserError."""
    offset = row.cells.get(OFFSET, "")
    start = seconds(offset, f"{row.where}: {OFFSET!r}") if offset else 0.0
    duration = seconds(row.cells[DURATION], f"{row.where}: {DURATION!r}")
    if not duration:
        raise UserError(f"{row.where}: {DURATION!r} is 0; drop the row")
    times = {OFFSET: repr(start) if start else "", END: repr(round(start + duration, 6))}
    return row._replace(cells={**row.cells, **times})
