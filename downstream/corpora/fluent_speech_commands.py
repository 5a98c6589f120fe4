"""Fluent Speech Commands in its own layout (Lugosch et al., Interspeech 2019)."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from downstream.tasks.ic import SEPARATOR
from upstream.common.errors import UserError

TABLES = {"train": "train_data.csv", "dev": "valid_data.csv", "test": "test_data.csv"}
SIZES = {"train": 23132, "dev": 3118, "test": 3793}
INTENT = ("action", "object", "location")


def read(root: Path, target: Literal["intent"], *, check: bool = True) -> list[Example]:
    """Fluent Speech Commands; `target` is "intent": `activate ; lights ; kitchen`.

    `root` holds data/train_data.csv, valid_data.csv and test_data.csv, and the audio where they say
    (wavs/speakers/<speaker>/<utterance>.wav). `check=False` accepts a partial copy.
    Raises UserError naming what is missing.
    """
    folder = require_folder(require_folder(root, "root") / "data", "root")
    tables = ((folder / name, split) for split, name in TABLES.items())
    examples = [example for file, split in tables for example in _rows(root, file, split)]
    return complete(root, examples, SIZES, check)


def _rows(root: Path, file: Path, split: str) -> Iterator[Example]:
    table = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    needed = ("path", "speakerId", *INTENT)
    if lacking := [name for name in needed if name not in (table.fieldnames or ())]:
        raise UserError(f"{file}: no column {lacking[0]!r}; its first line names the columns")
    try:
        for row in table:
            if empty := [name for name in needed if not row[name]]:
                raise UserError(f"{file}:{table.line_num}: {empty[0]!r} is empty")
            path, speaker, *intent = (row[name] for name in needed)
            name, where = os.path.splitext(os.path.basename(path))[0], os.fspath(root / path)
            yield Example(name, where, None, None, SEPARATOR.join(intent), speaker, split)
    except csv.Error as error:
        where = f"{file}: after line {table.line_num}"
        raise UserError(f"{where}: not valid CSV ({error})") from error
