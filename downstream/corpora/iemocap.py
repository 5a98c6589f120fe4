"""IEMOCAP's four usual emotions (Busso et al., 2008), with one split per session."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder

CLASSES = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}
SIZES = {"session1": 1085, "session2": 1023, "session3": 1151, "session4": 1031, "session5": 1241}
# [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
LABEL = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(?P<name>\S+)\t(?P<emotion>\S+)\t\[", re.MULTILINE)


def read(root: Path, target: Literal["emotion"], *, check: bool = True) -> list[Example]:
    """IEMOCAP, improvised and scripted; `target` is "emotion": neu, hap (with exc), ang or sad.

    `root` holds Session1 ... Session5 as they unpack; the split of an utterance is "session1" ...
    "session5". The speaker is the one who talks, not the one who wears the motion-capture markers
    and names the dialogue: Ses01F_impro01_M003 is spoken by Ses01M. Other labels (frustrated,
    undecided, ...) are no part of the task. `check=False` accepts a partial copy.
    Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    examples = []
    for split in SIZES:
        session = root / split.capitalize()
        # by this pattern, because the archive also holds macOS's ._Ses*.txt
        for labels in sorted(session.glob("dialog/EmoEvaluation/Ses*.txt")):
            for match in LABEL.finditer(read_text(labels)):
                name, emotion = match["name"], match["emotion"]
                if emotion not in CLASSES:
                    continue
                dialogue, _, turn = name.rpartition("_")
                path = os.fspath(session / "sentences" / "wav" / dialogue / f"{name}.wav")
                speaker = dialogue[:5] + turn[0]
                examples.append(Example(name, path, None, None, CLASSES[emotion], speaker, split))
    return complete(root, examples, SIZES, check)
