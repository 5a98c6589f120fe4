"""Files that are tables, CSV, TSV and JSON lines, as rows of named cells that know their line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from downstream.corpora.common import read_text
from upstream.common.errors import UserError, near_miss

HALF = re.compile("[\ud800-\udfff]")  # of an emoji, as a JSON escape can write it alone
MANY = 100  # columns; more are not listed
MISSING = frozenset(("nan", "NaN", "<NA>", "NaT"))  # how pandas writes a missing value


class Row(NamedTuple):
    """One utterance as its table has it: text by the name of the column, "" for nothing."""

    source: str
    line: int  # where an editor shows the row
    cells: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def read(
    source: Path, kind: str | None = None, only: Collection[str] | None = None
) -> tuple[list[str], list[Row]]:
    """Names of the columns, and the rows. Raises UserError.

    kind: a key of FORMATS where the file's suffix does not tell it; only: of JSON lines, the
    columns that are read, so that others may hold anything.
    """
    kind = kind or source.suffix
    if kind not in FORMATS:
        raise UserError(f"{source}: unknown kind of table{near_miss(kind, FORMATS)}")
    text = read_text(source)
    lines = FORMATS[kind](source, text) if only is None else _jsonl(source, text, only)
    rows = dict(lines)
    if not rows:
        raise UserError(f"{source}: holds no rows")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows.values())))
    # a JSON object may leave a column out: the same as an empty cell
    blank, name = dict.fromkeys(columns, ""), str(source)
    return columns, [
        Row(name, line, cells if len(cells) == len(blank) else blank | cells)
        for line, cells in rows.items()
    ]


def text_of(value: Any) -> str:
    """A plain value as a cell: "" for None and NaN."""
    return "" if value is None or value != value else str(value).strip()


def require(name: str, columns: list[str], source: object) -> None:
    """Raises UserError if no column has this name."""
    if name in columns:
        return
    if len(columns) > MANY:
        raise UserError(f"{source}: no column {name!r} among {len(columns)}")
    hint = near_miss(name, columns)
    there = "" if hint.startswith("; there is") else f" (columns: {', '.join(columns)})"
    raise UserError(f"{source}: no column {name!r}{hint}{there}")


def _delimited(source: Path, text: str, **style: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """The first line that is not blank is the header."""
    records = csv.reader(io.StringIO(text, newline=""), strict=True, **style)
    header: list[str] = []
    try:
        for record in records:
            cells = [cell.strip() for cell in record]
            if not any(cells):
                continue
            if not header:
                header = cells
                for name, count in Counter(header).items():
                    if count > 1:
                        fault = f"two columns are named {name!r}"
                        raise UserError(f"{source}:{records.line_num}: {fault}")
            elif len(cells) != len(header):
                fault = f"{len(cells)} fields, but the header has {len(header)} columns"
                raise UserError(f"{source}:{records.line_num}: {fault}")
            else:
                yield records.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{source}:{records.line_num}: not valid CSV ({error})") from error


def _jsonl(
    source: Path, text: str, only: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    for line, record in enumerate(text.split("\n"), 1):  # splitlines would break at U+2028
        if not record.strip():
            continue
        try:
            cells = json.loads(record)
        except json.JSONDecodeError as error:
            raise UserError(f"{source}:{line}: not valid JSON ({error.msg})") from error
        except (RecursionError, ValueError) as error:  # a number of 5,000 digits
            raise UserError(f"{source}:{line}: not valid JSON (too deep or too large)") from error
        if not isinstance(cells, dict):
            raise UserError(f"{source}:{line}: not an object of column names and values")
        if only is not None:
            cells = {name: value for name, value in cells.items() if name in only}
        for name, value in cells.items():
            if HALF.search(name) or (isinstance(value, str) and HALF.search(value)):
                fault = f"{name!a} holds half a character (\\ud800 to \\udfff); mend it"
                raise UserError(f"{source}:{line}: {fault}")
            if isinstance(value, (dict, list)):
                fault = f"{name!r} holds a {type(value).__name__}, not text"
                raise UserError(f"{source}:{line}: {fault}")
        yield line, {name: text_of(value) for name, value in cells.items()}


FORMATS: dict[str, Callable[[Path, str], Iterator[tuple[int, dict[str, str]]]]] = {
    ".csv": _delimited,
    ".tsv": partial(_delimited, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _jsonl,
}
