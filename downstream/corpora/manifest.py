"""Any corpus as a table of audio files: CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from downstream.base import Example
from downstream.corpora.common import absent, read_text
from downstream.corpora.splits import Part, Several, split_by_rule
from upstream.common.errors import UserError, near_miss

SPEAKER, SPLIT = "speaker", "split"  # the columns that may be absent as long as none is asked for
SPLIT_NAMES = {"train": "train", "test": "test", "dev": "dev", "valid": "dev", "validation": "dev"}


# by the line of the file where an editor shows the row
Rows = dict[int, dict[str, str]]


def read(
    root: Path,
    target: str,
    *,
    file: str = "manifest.tsv",
    path: str = "path",
    id: str | None = None,
    speaker: str = SPEAKER,
    split: str | None = SPLIT,
    start: str | None = None,
    end: str | None = None,
    dev: Part | None = None,
    test: Part | None = None,
    split_by: Literal["row", "speaker"] = "row",
    folds: Several | None = None,
) -> list[Example]:
    """A table with one row per utterance; `target` is the column that the task learns.

    `file` lies in `root` or is an absolute path: `.csv`, `.tsv` (no quoting, so that a JSON cell
    stays as it is) or `.jsonl` (one object of plain values per line). `path`, `id`, `speaker`,
    `split`, `start` and `end` are names of columns: paths relative to the table's folder, times in
    seconds. The usual id is the path without its suffix (and the part). Without a column "speaker"
    each utterance is a speaker of its own.

    The split column holds train, dev (or valid, validation), test, or fold1, fold2, ... When there
    is none, or with `split: null`, a rule makes the splits (see `splits.py`): `dev` and `test` are
    shares (0.1 = a tenth) of the rows or, with `split_by: speaker`, of the speakers; `folds: 5`
    with `split_by: speaker` gives fold1 ... fold5. Raises UserError, with the line of the table.
    """
    source = root / file
    columns, rows = _table(source)
    if split == SPLIT and SPLIT not in columns:
        split = None
    if split is not None and (dev, test, split_by, folds) != (None, None, "row", None):
        raise UserError(
            f"{source}: its column {split!r} gives the splits, and the recipe asks for a rule too; "
            "drop dev, test, split_by and folds, or set `split: null` to leave the column out"
        )
    anonymous = speaker == SPEAKER and SPEAKER not in columns
    if anonymous and split_by == "speaker":
        raise UserError(
            f"{source}: `split_by: speaker` needs a column of speakers; name it with `speaker` "
            f"(columns: {', '.join(columns)})"
        )
    filled = [name for name in (path, target, id, split, None if anonymous else speaker) if name]
    for name in (*filled, start, end):
        if name and name not in columns:
            hint = near_miss(name, columns)
            there = "" if hint.startswith("; there is") else f" (columns: {', '.join(columns)})"
            raise UserError(f"{source}: no column {name!r}{hint}{there}")

    examples: dict[str, Example] = {}
    for line, cells in rows.items():
        where = f"{source}:{line}"
        for name in filled:
            if not cells[name]:
                raise UserError(f"{where}: {name!r} is empty; fill it in or drop the row")
        first, last = (_time(cells[name], name, where) if name else None for name in (start, end))
        if last is not None and last <= (first or 0.0):
            raise UserError(f"{where}: the part ends at {last:g} s, before it begins")
        name = cells[id] if id else os.path.splitext(cells[path])[0] + _part(first, last)
        if name in examples:
            before = list(rows)[list(examples).index(name)]
            cure = "make it unique" if id else "name a column of unique ids with `id`"
            raise UserError(f"{where}: id {name!r} is already on line {before}; {cure}")
        examples[name] = Example(
            id=name,
            path=str(source.parent / cells[path]),
            start=first,
            end=last,
            target=cells[target],
            speaker=name if anonymous else cells[speaker],
            split=_split_name(cells[split], where) if split else "",
        )
    listed = list(examples.values())
    gone = absent([example.path for example in listed])
    if gone:
        raise UserError(
            f"{source}:{list(rows)[gone[0]]}: no audio file {listed[gone[0]].path} "
            f"({len(gone)} of {len(rows)} are missing); paths are relative to the table's folder"
        )
    if len({example.split.startswith("fold") for example in listed}) == 2:
        raise UserError(f"{source}: the splits are partly folds and partly train, dev and test")
    if split is not None:
        return listed
    try:
        return split_by_rule(listed, dev=dev, test=test, split_by=split_by, folds=folds)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _split_name(value: str, where: str) -> str:
    if re.fullmatch(r"fold\w+", value):
        return value
    if value not in SPLIT_NAMES:
        hint = near_miss(value, [*SPLIT_NAMES, "fold1"])
        raise UserError(f"{where}: unknown split {value!r}{hint}")
    return SPLIT_NAMES[value]


def _part(first: float | None, last: float | None) -> str:
    """What tells the utterances of one long recording apart."""
    if first is None and last is None:
        return ""
    return f":{first or 0.0}-{'end' if last is None else last}"


def _time(value: str, name: str, where: str) -> float | None:
    """Seconds; an empty cell means from the beginning, or to the end."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{where}: {name!r} is {value!r}, not a time in seconds")
    return seconds


def _table(source: Path) -> tuple[list[str], Rows]:
    """Names of the columns, and the rows. Raises UserError."""
    if source.suffix not in FORMATS:
        raise UserError(f"{source}: unknown kind of table{near_miss(source.suffix, FORMATS)}")
    rows = dict(FORMATS[source.suffix](source, read_text(source)))
    if not rows:
        raise UserError(f"{source}: holds no rows")
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    # a JSON object may leave a column out: the same as an empty cell
    return columns, {line: dict.fromkeys(columns, "") | cells for line, cells in rows.items()}


def _delimited(source: Path, text: str, **style: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """The first line that is not blank is the header."""
    records = csv.reader(io.StringIO(text, newline=""), strict=True, **style)
    header: list[str] = []
    try:
        for record in records:
            cells, where = [cell.strip() for cell in record], f"{source}:{records.line_num}"
            if not any(cells):
                continue
            if not header:
                header = cells
                for name in header:
                    if header.count(name) > 1:
                        raise UserError(f"{where}: two columns are named {name!r}")
            elif len(cells) != len(header):
                fault = f"{len(cells)} fields, but the header has {len(header)} columns"
                raise UserError(f"{where}: {fault}")
            else:
                yield records.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{source}:{records.line_num}: not valid CSV ({error})") from error


def _jsonl(source: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, record in enumerate(text.split("\n"), 1):  # splitlines would break at U+2028
        if not record.strip():
            continue
        try:
            cells = json.loads(record)
        except json.JSONDecodeError as error:
            raise UserError(f"{source}:{line}: not valid JSON ({error.msg})") from error
        if not isinstance(cells, dict):
            raise UserError(f"{source}:{line}: not an object of column names and values")
        for name, value in cells.items():
            if isinstance(value, (dict, list)):
                fault = f"{name!r} holds a {type(value).__name__}, not text"
                raise UserError(f"{source}:{line}: {fault}")
        yield line, {k: "" if v is None else str(v).strip() for k, v in cells.items()}


FORMATS: dict[str, Callable[[Path, str], Iterator[tuple[int, dict[str, str]]]]] = {
    ".csv": _delimited,
    ".tsv": partial(_delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _jsonl,
}
