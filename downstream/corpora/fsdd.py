"""The Free Spoken Digit Dataset: six speakers, ten digits, 50 takes of each, 8 kHz."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, require_folder

NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[a-z]+)_\d+\.(wav|flac)")
SIZES = dict.fromkeys("george jackson lucas nicolas theo yweweler".split(), 500)


def read(root: Path, target: Literal["digit"] = "digit", *, check: bool = True) -> list[Example]:
    """Which digit is said; the split is the speaker's name: each is the test set of a fold once.

    `root` holds the folder `recordings`, or its files themselves: 7_theo_12.wav is take 12 of the
    digit 7 by theo. `check=False` accepts a partial copy. Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    examples = []
    for path in sorted(folder.iterdir()):
        if match := NAME.fullmatch(path.name):
            digit, speaker = match.group("digit", "speaker")
            examples.append(Example(path.stem, str(path), None, None, digit, speaker, speaker))
    return complete(folder, examples, SIZES, check)
