"""What the readers share: clear lines for what is missing from a copy of a corpus."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from downstream.base import Example
from upstream.common.errors import UserError, near_miss


def read_text(path: Path) -> str:
    """The file as UTF-8, a byte order mark removed. Raises UserError if it cannot be."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        # at most a hint: the full list of a folder of audio files would bury the line
        hint = near_miss(path.name, names) if len(names) < 20 else ""
        raise UserError(f"{path}: no such file{hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def require_folder(path: Path, option: str) -> Path:
    """`path` if it is a folder, else UserError that names the option to change."""
    if not path.is_dir():
        names = [entry.name for entry in path.parent.glob("*/")] if path.parent.is_dir() else []
        hint = near_miss(path.name, names) if len(names) < 20 else ""
        raise UserError(f"{path}: no such folder{hint}; see `{option}` in the recipe")
    return path


def absent(paths: Sequence[str]) -> list[int]:
    """Indices of the paths that are not there.

    One listing per folder instead of one look-up per file: on a network disk that is what makes
    150 000 files a matter of seconds.
    """
    listing: dict[str, set[str]] = {}
    gone = []
    for index, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in listing:
            try:
                listing[folder] = set(os.listdir(folder or "."))
            except OSError:
                listing[folder] = set()
        if name not in listing[folder]:
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
                raise UserError(
                    f"{where}: {counts[split]} utterances in {split}, {number} expected; {cure}"
                )
        if gone:
            raise UserError(
                f"{where}: {len(gone)} of {len(examples)} audio files are missing, "
                f"first {examples[gone[0]].path}; {cure}"
            )
    lost = set(gone)
    kept = [example for index, example in enumerate(examples) if index not in lost]
    if not kept:
        raise UserError(
            f"{where}: none of the {len(examples)} listed audio files is there"
            if examples
            else f"{where}: no utterances found; is this the corpus folder in its original layout?"
        )
    return kept
