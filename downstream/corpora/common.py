"""What the readers share: clear lines for what is missing from a copy of a corpus."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from downstream.base import Example
from upstream.common import disk
from upstream.common.errors import UserError, near_miss


def read_text(path: Path) -> str:
    """The file as UTF-8, a byte order mark removed. Raises UserError if it cannot be."""
    try:
        return disk.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise UserError(f"{path}: {fault}") from error
    except UserError as error:
        raise UserError(f"{error}{_beside(path)}") from error


def require_folder(path: Path, option: str) -> Path:
    """`path` if it is a folder, else UserError that names the option to change."""
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"{path}: no such folder{_beside(path)}; see `{option}` in the recipe")
    return path


def require_texts(examples: Sequence[Example]) -> None:
    """`require_text` of what the examples say."""
    texts = [f"{e.id}{e.speaker}{e.target}{e.group}" for e in examples]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        for text, example in zip(texts, examples):
            require_text(text, example.path)


def require_text(text: str, path: str) -> None:
    """Raises UserError for text that cannot be written as UTF-8, as the bytes of a file's name."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = f"{text!a:.200} is not UTF-8; rename the file or write the table again"
        raise UserError(f"{path!a:.300}: {fault}") from error


def _beside(path: Path) -> str:
    """What may have been meant by a path that is not there; nothing among many audio files."""
    there = os.path.isdir(path.parent) and not os.path.exists(path)
    names = os.listdir(path.parent) if there else []
    return near_miss(path.name, names) if len(names) < 20 else ""


def absent(paths: Sequence[str]) -> list[int]:
    """Indices of the paths that are not there.

    One listing per folder instead of one look-up per file: on a network disk that is what makes
    150 000 files a matter of seconds.
    """

    @functools.cache
    def names(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder or "."))
        except (OSError, ValueError):  # no such folder, or no name of one
            return frozenset()

    gone = []
    for index, path in enumerate(paths):
        folder, slash, name = path.rpartition("/")
        if name not in names(folder + slash):
            gone.append(index)
    return gone


def complete(
    where: Path, examples: list[Example], expected: Mapping[str, int], check: bool
) -> list[Example]:
    """The examples whose audio is there: all, or with `check=False` what a partial copy has.

    Raises UserError when the number in a split is not the published one or a file is missing, and
    always when nothing is left.
    """
    gone = absent([example.path for example in examples])
    if check:
        cure = "complete the copy, or set `check: false` to use the part that is there"
        counts = Counter(example.split for example in examples)
        for split, number in expected.items():
            if counts[split] != number:
                fault = f"{counts[split]} utterances in {split}, {number} expected"
                raise UserError(f"{where}: {fault}; {cure}")
        if gone:
            fault = f"{len(gone)} of {len(examples)} audio files are missing"
            raise UserError(f"{where}: {fault}, first {examples[gone[0]].path}; {cure}")
    if not examples:
        raise UserError(f"{where}: no utterances; is this the corpus in its original layout?")
    if len(gone) == len(examples):
        raise UserError(f"{where}: none of the {len(examples)} listed audio files is there")
    lost = set(gone)
    return [example for index, example in enumerate(examples) if index not in lost]
