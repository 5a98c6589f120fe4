"""Libri2Mix for diarization, as folders of Kaldi's files (s3prl's fork of LibriMix writes them)."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np

from downstream.base import AND, Example
from downstream.corpora.common import complete, read_text, require_folder
from downstream.tasks.segments import Segment, cut, write
from downstream.tasks.segments import read as segments_of
from upstream.common.errors import UserError
from upstream.common.schema import Amount

SIZES = {"train": 13900, "dev": 3000, "test": 3000}  # recordings, with train-clean-100
SHORTEST = 0.1  # seconds of a part at the end


def read(
    root: Path,
    target: Literal["speakers"] = "speakers",
    *,
    train: str = "train",
    dev: str = "dev",
    test: str = "test",
    part: Amount = 40.0,
    check: bool = True,
) -> list[Example]:
    """Mixtures with who speaks when as target; the speaker is both, `61 + 70`.

    `root` holds the folders `train`, `dev` and `test`, each with wav.scp, segments, utt2spk and
    reco2dur. Longer recordings of train and dev are taken in parts of `part` seconds (s3prl's 2000
    frames); those of test are whole. `check=False` accepts other numbers of recordings.
    Raises UserError, with the line of the file.
    """
    require_folder(root, "root")
    examples = []
    for split, folder in (("train", train), ("dev", dev), ("test", test)):
        where = require_folder(root / folder, split)
        seconds = {name: _number(*found) for name, found in _table(where / "reco2dur").items()}
        recordings = complete(
            where, _recordings(where, split, seconds), {split: SIZES[split]}, check
        )
        for example in recordings:
            whole = split == "test" or seconds[example.id] <= part
            examples += [example] if whole else _parts(example, seconds[example.id], part)
    return examples


def _recordings(folder: Path, split: str, seconds: dict[str, float]) -> list[Example]:
    speakers = _table(folder / "utt2spk")
    spoken: dict[str, list[Segment]] = defaultdict(list)
    for utterance, (text, where) in _table(folder / "segments").items():
        recording, *times = text.split()
        if len(times) != 2:
            raise UserError(f"{where}: not `<utterance> <recording> <start> <end>`")
        if utterance not in speakers:
            raise UserError(f"{where}: utterance {utterance!r} has no speaker in utt2spk")
        start, end = (_number(time, where) for time in times)
        spoken[recording].append(Segment(speakers[utterance][0], start, end))
    examples = []
    for name, (path, where) in _table(folder / "wav.scp").items():
        if path.endswith("|"):
            raise UserError(f"{where}: is a command; write its audio to a file and name that")
        if name not in seconds or name not in spoken:
            table = "segments" if name in seconds else "reco2dur"
            raise UserError(f"{where}: recording {name!r} is not in {table}")
        who = AND.join(sorted({segment.speaker for segment in spoken[name]}))
        path = os.path.join(folder, path)
        examples.append(Example(name, path, None, None, write(spoken[name]), who, split))
    return examples


def _parts(example: Example, seconds: float, part: float) -> list[Example]:
    said, parts = segments_of(example.target), []
    for start in np.arange(0, max(part, seconds - SHORTEST), part).tolist():
        end = min(start + part, seconds)
        name = f"{example.id}:{start:g}-{end:g}"
        target = write(cut(said, start, end))
        parts.append(example._replace(id=name, start=start, end=end, target=target))
    return parts


def _table(source: Path) -> dict[str, tuple[str, str]]:
    """First word of a line -> the rest and the place. Raises UserError."""
    table: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(read_text(source).splitlines(), 1):
        key, *rest = line.strip().split(None, 1)
        where = f"{source}:{number}"
        if not rest:
            raise UserError(f"{where}: {line!r:.60} is not a name and what belongs to it")
        if key in table:
            raise UserError(f"{where}: {key!r} is already on line {table[key][1].split(':')[-1]}")
        table[key] = (rest[0].strip(), where)
    return table


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not a time in seconds") from None
