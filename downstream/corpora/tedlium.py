"""TED-LIUM 3 in its own layout: the corpus that Speech-FT fine-tunes on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from upstream.common.schema import Amount

SPLITS = ("train", "dev", "test")
SHORTEST, LONGEST = 1.0, 60.0  # seconds, as in the release's asr_ted


def read(
    root: Path,
    target: Literal["text", "speaker"],
    *,
    hours: Amount | None = 10.0,
    check: bool = True,
) -> list[Example]:
    """Segments of `legacy/{train,dev,test}`: `stm/*.stm` with times and text, `sph/*.sph`.

    Training takes the first segments in file order and stops at the first that does not fit into
    `hours` (None: takes all); dev and test are whole. The paper's order is that of its data loader,
    which is not published. Left out everywhere, as in the release: segments with `<unk>`, those
    outside 1 to 60 s, and what is no speech (`ignore_time_segment_in_scoring`). `check=False`
    accepts a partial copy. Raises UserError naming what is missing.
    """
    folder = require_folder(root / "legacy" if (root / "legacy").is_dir() else root, "root")
    examples: list[Example] = []
    for split in SPLITS:
        segments = list(_segments(folder / split, split, target))
        if split == "train" and hours is not None:
            ends = accumulate(e.end - e.start for e in segments if e.start is not None and e.end)
            segments = [e for e, end in zip(segments, ends) if end <= hours * 3600]
        examples += segments
    return complete(folder, examples, {}, check)


def _segments(folder: Path, split: str, target: str) -> Iterator[Example]:
    for stm in sorted(require_folder(folder / "stm", "root").glob("*.stm")):
        audio = os.fspath(folder / "sph" / f"{stm.stem}.sph")
        for number, line in enumerate(read_text(stm).splitlines()):
            fields = line.split(maxsplit=6)
            if len(fields) < 7 or fields[6] == "ignore_time_segment_in_scoring":
                continue
            speaker, start, end, text = fields[2], float(fields[3]), float(fields[4]), fields[6]
            label = normalised(text) if target == "text" else speaker
            if label and "<unk>" not in text and SHORTEST <= end - start <= LONGEST:
                yield Example(f"{stm.stem}-{number:04d}", audio, start, end, label, speaker, split)


def normalised(text: str) -> str:
    """Upper case, " '" joined to its word, hyphens as spaces, only A-Z, apostrophe and space."""
    text = text.upper().replace(" '", "'").replace("-", " ")
    return " ".join(re.sub(r"[^A-Z' ]", "", text).split())
