"""LibriSpeech as it unpacks: <part>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from upstream.common.errors import UserError, near_miss

# utterances per part (Panayotov et al., ICASSP 2015; counted on the OpenSLR 12 archives)
SIZES = {
    "train-clean-100": 28539,
    "train-clean-360": 104014,
    "train-other-500": 148688,
    "dev-clean": 2703,
    "dev-other": 2864,
    "test-clean": 2620,
    "test-other": 2939,
}


def read(
    root: Path,
    target: Literal["text", "speaker"],
    *,
    train: str = "train-clean-100",
    dev: str = "dev-clean",
    test: str = "test-clean",
    check: bool = True,
) -> list[Example]:
    """LibriSpeech; `target` is "text" (upper-case words) or "speaker".

    `root` holds the parts (`train-clean-100`, ...); `train`, `dev` and `test` say which part plays
    which role. Only the transcripts and the folder listings are read, no audio. `check=False`
    accepts parts of another size (a partial copy, a part of one's own).
    Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    examples = []
    for split, part in (("train", train), ("dev", dev), ("test", test)):
        if check and part not in SIZES:
            raise UserError(
                f"librispeech has no part {part!r}{near_miss(part, SIZES)}; "
                "set `check: false` to use a part of your own"
            )
        folder = require_folder(root / part, split)
        expected = {split: SIZES[part]} if check else {}
        examples += complete(folder, list(_part(folder, split, target)), expected, check)
    return examples


def _part(folder: Path, split: str, target: str) -> Iterator[Example]:
    for transcripts in sorted(folder.glob("*/*/*.trans.txt")):
        chapter = os.fspath(transcripts.parent)
        for number, line in enumerate(read_text(transcripts).splitlines(), 1):
            name, _, text = line.strip().partition(" ")
            if not text:
                raise UserError(f"{transcripts}:{number}: no words after the utterance id {name!r}")
            speaker = name.partition("-")[0]
            label = text if target == "text" else speaker
            yield Example(name, f"{chapter}/{name}.flac", None, None, label, speaker, split)
