"""EmoDB (Burkhardt et al., Interspeech 2005): German, acted, ten speakers, in its own layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, require_folder
from upstream.common.errors import UserError

# 03a01Fa.wav: speaker, sentence, the first letter of the German emotion, version
NAME = re.compile(r"(?P<speaker>\d\d)[ab]\d\d(?P<letter>[A-Z])[a-z]\.(wav|flac)")
EMOTIONS = {
    "W": "angry", "L": "bored", "E": "disgusted", "A": "afraid", "F": "happy", "T": "sad",
    "N": "neutral",
}  # fmt: skip
CLASSES = {4: "WFTN", 7: "".join(EMOTIONS)}
# each tests a man and a woman
FOLDS = {"fold1": "03 08", "fold2": "10 09", "fold3": "11 13", "fold4": "12 14", "fold5": "15 16"}
FOLD_OF = {speaker: fold for fold, speakers in FOLDS.items() for speaker in speakers.split()}
SIZES = {4: dict(zip(FOLDS, (81, 51, 71, 63, 73))), 7: dict(zip(FOLDS, (107, 81, 116, 104, 127)))}


def read(
    root: Path,
    target: Literal["emotion"] = "emotion",
    *,
    classes: Literal[4, 7] = 4,
    check: bool = True,
) -> list[Example]:
    """Which emotion an actor plays; the splits are `fold1` ... `fold5`, of two speakers each.

    `root` holds the folder `wav`, or the files themselves, also as FLAC. classes: 4 are angry,
    happy, neutral and sad, as in SUPERB's ER; 7 have afraid, bored and disgusted too.
    `check=False` accepts a partial copy. Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    folder = root / "wav" if (root / "wav").is_dir() else root
    examples = []
    for path in sorted(folder.iterdir()):
        match = NAME.fullmatch(path.name)
        if not match or match["letter"] not in CLASSES[classes]:
            continue
        speaker, emotion = match["speaker"], EMOTIONS[match["letter"]]
        if speaker not in FOLD_OF:
            raise UserError(f"{path}: speaker {speaker} is none of EmoDB's ten")
        fold = FOLD_OF[speaker]
        examples.append(Example(path.stem, str(path), None, None, emotion, speaker, fold))
    return complete(folder, examples, SIZES[classes], check)
