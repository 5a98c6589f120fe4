"""TED-LIUM 3 in its own layout: the corpus that Speech-FT fine-tunes on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from downstream.base import Example
from downstream.corpora.common import complete, known_target, read_text, require_folder

PARTS = {"train": "train", "dev": "dev", "test": "test"}
SHORTEST, LONGEST = 1.0, 60.0  # seconds, as in the release's asr_ted


def read(
    root: Path, target: str, *, hours: float | None = 10.0, check: bool = True
) -> list[Example]:
    """Segments of `legacy/{train,dev,test}`: `stm/*.stm` with times and text, `sph/*.sph`.

    Training takes the first segments in file order until `hours` are full (None: all of them); the
    paper takes them in the order of its data loader, which is not published. Left out, as there:
    training segments with `<unk>` and those outside 1 to 60 s, and segments that are no speech
    (`ignore_time_segment_in_scoring`). `check=False` accepts a partial copy.
    Raises UserError naming what is missing.
    """
    known_target("tedlium", target, ("text", "speaker"))
    folder = require_folder(root / "legacy" if (root / "legacy").is_dir() else root, "root")
    examples = []
    for split, part in PARTS.items():
        seconds = 0.0
        for stm in sorted(require_folder(folder / part / "stm", "root").glob("*.stm")):
            audio = os.fspath(folder / part / "sph" / f"{stm.stem}.sph")
            for number, line in enumerate(read_text(stm).splitlines()):
                fields = line.split(maxsplit=6)
                if len(fields) < 7 or fields[6] == "ignore_time_segment_in_scoring":
                    continue
                speaker, start, end, text = fields[2], float(fields[3]), float(fields[4]), fields[6]
                length = end - start
                if split == "train" and ("<unk>" in text or not SHORTEST <= length <= LONGEST):
                    continue
                if split == "train" and hours is not None and seconds + length > hours * 3600:
                    break
                seconds += length
                label = normalised(text) if target == "text" else speaker
                name = f"{stm.stem}-{number:04d}"
                examples.append(Example(name, audio, start, end, label, speaker, split))
    return complete(folder, [e for e in examples if e.target], {}, check)


def normalised(text: str) -> str:
    """Upper case, " '" joined to its word, hyphens as spaces, only A-Z, apostrophe and space."""
    text = text.replace("<unk>", " ").upper().replace(" '", "'").replace("-", " ")
    return " ".join(re.sub(r"[^A-Z' ]", "", text).split())
