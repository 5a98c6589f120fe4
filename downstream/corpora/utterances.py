"""Rows of a table to Examples: what the readers of tables and of Hugging Face folders share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from downstream.base import Example
from downstream.corpora.common import absent
from downstream.corpora.slots import marked
from downstream.corpora.tables import MISSING, Row, require
from downstream.tasks.ic import SEPARATOR
from upstream.common.errors import UserError, near_miss

LONG_PATH = 300  # characters; of a longer path the beginning is shown
SPLIT_NAMES = {"train": "train", "test": "test", "dev": "dev", "valid": "dev", "validation": "dev"}


@dataclass(frozen=True)
class Columns:
    """Which column says what; None where none does."""

    target: Sequence[str]  # several: the answers to several questions
    path: str
    id: str | None = None
    speaker: str | None = None
    split: str | None = None
    start: str | None = None
    end: str | None = None
    channel: str | None = None  # counted from 0
    group: str | None = None
    tags: str | None = None
    labelled: bool = True  # every target cell must be filled

    @property
    def filled(self) -> list[str]:
        """The columns without which a row says nothing."""
        target = self.target if self.labelled else ()
        names = (self.path, *target, self.id, self.split, self.speaker, self.group, self.tags)
        return [name for name in dict.fromkeys(names) if name is not None]


class Utterance(NamedTuple):
    """An Example with its origin: where it stands, and its audio's path as it is written there."""

    example: Example
    where: str
    called: str


def utterances(
    source: object, columns: list[str], rows: Sequence[Row], use: Columns, folder: Path
) -> list[Utterance]:
    """One utterance per row; paths are relative to `folder`. Raises UserError, with its line."""
    for name in (*use.filled, *use.target, use.start, use.end, use.channel):
        if name is not None:
            require(name, columns, source)
    listed: list[Utterance] = []
    ids: dict[str, Row] = {}
    splits: dict[str, str] = {}  # as cells say it -> its own name
    filled, home = use.filled, f"{folder}/" if folder.parts else ""
    only = use.target[0] if len(use.target) == 1 and not use.tags else None
    for row in rows:  # of which there may be a million: no call that most rows do not need
        cells, where = row.cells, row.where
        for name in filled:
            cell = cells[name]
            if not cell or cell in MISSING:
                _require_filled(row, name)
        first = _time(row, use.start) if use.start else None
        last = _time(row, use.end) if use.end else None
        if last is not None and last <= (first or 0.0):
            raise UserError(f"{where}: the part ends at {last:g} s, before it begins")
        channel = _channel(cells[use.channel], f"{where}: {use.channel!r}") if use.channel else None
        path = cells[use.path]
        if use.id:
            name = cells[use.id]
        else:
            part = _part(first, last) + ("" if channel is None else f"@{channel}")
            name = os.path.splitext(path)[0] + part
        if name in ids:
            before = ids[name]
            place = f"on line {before.line}" if before.source == row.source else before.where
            cure = "make it unique" if use.id else "name a column of unique ids with `id`"
            raise UserError(f"{where}: id {name!r} is already {place}; {cure}")
        ids[name] = row
        example = Example(
            id=name,
            path=home + path if home and _is_plain(path) else str(folder / path),
            start=first,
            end=last,
            target=cells[only] if only else _target(row, use),
            speaker=cells[use.speaker] if use.speaker else name,
            split=_split(cells[use.split], where, splits) if use.split else "",
            group=cells[use.group] if use.group else "",
            channel=channel,
        )
        listed.append(Utterance(example, where, path))
    if len({split.startswith("fold") for split in splits.values()}) == 2:
        raise UserError(f"{source}: the splits are partly folds and partly train, dev and test")
    return listed


def _require_filled(row: Row, name: str) -> None:
    """Raises UserError for a cell that says nothing."""
    cell = row.cells[name]
    if not cell:
        raise UserError(f"{row.where}: {name!r} is empty; fill it in or drop the row")
    if cell in MISSING:
        fault = f"{name!r} is {cell!r}, which pandas writes for nothing"
        raise UserError(
            f"{row.where}: {fault}; fill it in or drop the row (or write NAN if it is a word)"
        )


def _is_plain(path: str) -> bool:
    """Whether pathlib would join it to a folder as it is written."""
    return path[0] != "/" and path[-1] not in "/." and "./" not in path and "//" not in path


def of_splits(listed: Mapping[str, Sequence[Utterance]]) -> list[Utterance]:
    """The utterances of all splits in one list; what is the same in dev and test is of both.

    Raises UserError for an id that stands for two things, or is of train and another split.
    """
    found: dict[str, Utterance] = {}
    for split, utterances in listed.items():
        for utterance in utterances:
            example = utterance.example._replace(split=split)
            before = found.get(example.id)
            if before:
                both = f"{before.example.split} {split}"
                alike = before.example._replace(split=split) == example
                if not alike or both not in ("dev test", "test dev"):
                    where = f"{utterance.where}: id {example.id!r} is already at {before.where}"
                    raise UserError(f"{where}; make it unique, or use other audio in {split}")
                example = example._replace(split=both)
            found[example.id] = utterance._replace(example=example)
    return list(found.values())


def require_audio(listed: Sequence[Utterance], hint: str) -> None:
    """Raises UserError for the first audio file that is not there; hint: what paths are to be."""
    gone = absent([example.path for example, _, _ in listed])
    if gone:
        example, where, _ = listed[gone[0]]
        path = example.path if example.path.isprintable() else repr(example.path)
        if len(path) > LONG_PATH:
            path = f"{path[:LONG_PATH]}... ({len(path)} characters)"
        raise UserError(
            f"{where}: no audio file {path} ({len(gone)} of {len(listed)} are missing); {hint}"
        )


def _split(value: str, where: str, before: dict[str, str]) -> str:
    """`split_name`, looked up in what was asked before."""
    if value not in before:
        before[value] = split_name(value, where)
    return before[value]


def split_name(value: str, where: str) -> str:
    """A split or fold under its own name; several stay several. Raises UserError."""
    names = value.split() or [value]
    for name in names:
        if name not in SPLIT_NAMES and not re.fullmatch(r"fold\w+", name):
            raise UserError(
                f"{where}: unknown split {name!r}{near_miss(name, [*SPLIT_NAMES, 'fold1'])}"
            )
    splits = list(dict.fromkeys(SPLIT_NAMES.get(name, name) for name in names))
    if len(splits) > 1 and set(splits) != {"dev", "test"}:
        fault = "only dev and test may share audio, for trials and documents"
        raise UserError(f"{where}: split {value!r}: {fault}")
    return " ".join(sorted(splits))


def _target(row: Row, use: Columns) -> str:
    """The target column, its words marked with slots, or the answers of several columns."""
    answers = [row.cells[name] for name in use.target]
    try:
        if use.tags:
            return marked(answers[0], row.cells[use.tags])
    except UserError as error:
        raise UserError(f"{row.where}: {use.tags!r}: {error}") from error
    target = SEPARATOR.join(answers)
    if len(answers) > 1 and target.split(SEPARATOR) != answers:
        name = next(name for name in use.target if ";" in row.cells[name])
        raise UserError(
            f"{row.where}: {name!r} holds {row.cells[name]!r}; a semicolon stands between the "
            "answers of several target columns: write it otherwise"
        )
    return target


def _part(first: float | None, last: float | None) -> str:
    """What tells the utterances of one long recording apart."""
    if first is None and last is None:
        return ""
    return f":{first or 0.0}-{'end' if last is None else last}"


def _channel(value: str, where: str) -> int | None:
    """An empty cell means the average of all."""
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,4}(\.0)?", value):
        raise UserError(f"{where} is {value!r}, not the number of a channel, counted from 0")
    return int(value.partition(".")[0])


def _time(row: Row, name: str) -> float | None:
    """Seconds; an empty cell means from the beginning, or to the end."""
    value = row.cells[name]
    return seconds(value, f"{row.where}: {name!r}") if value else None


def seconds(value: str, where: str) -> float:
    """A time as a number. Raises UserError."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where} is {value!r}, not a time in seconds")
    return number
