"""TIMIT as it unpacks: TRAIN/DR1/FCJF0/SX37.WAV with SX37.PHN beside it, in either case."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from downstream.tasks.segments import RATE, write
from upstream.common.errors import UserError

SIZES = {"train": 3696, "dev": 1152, "test": 192}  # without the sentences SA1 and SA2
# The core test set of the corpus' own documentation: two men and a woman of each dialect region.
CORE = frozenset(
    "mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0 "
    "mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0".split()
)
# Lee and Hon (IEEE TASSP 1989): 61 symbols become 39; the glottal stop q is left out.
FOLDED = {
    phone: target
    for target, phones in {
        "aa": "ao", "ah": "ax ax-h", "er": "axr", "hh": "hv", "ih": "ix", "l": "el", "m": "em",
        "n": "en nx", "ng": "eng", "sh": "zh", "uw": "ux",
        "sil": "pcl tcl kcl bcl dcl gcl h# pau epi",
    }.items()
    for phone in phones.split()
}  # fmt: skip
OMITTED = "q"
# the files of some copies were converted: SX37.WAV.wav
SENTENCE = re.compile(r"(S[AIX]\d+)(\.WAV)?\.(WAV|FLAC)", re.IGNORECASE)


def read(
    root: Path,
    target: Literal["phones"] = "phones",
    *,
    phones: Literal[39, 61] = 39,
    check: bool = True,
) -> list[Example]:
    """Who says which phone when, for task `pc`: `[["sh", 0.15, 0.23], ...]`.

    `root` holds TRAIN and TEST. The sentences SA1 and SA2, which everybody reads, are left out.
    test: the 24 speakers of the core test set; dev: the others of TEST; train: those of TRAIN (as
    in s3prl downstream/timit_phone_linear). phones: 39 folds the 61 symbols as usual, and frames of
    `q` then count for nothing. `check=False` accepts a partial copy. Raises UserError, with the
    line of a .PHN file.
    """
    require_folder(root, "root")
    examples = [
        example
        for part in ("train", "test")
        for example in _part(_folder(root, part), part, phones == 39)
    ]
    return complete(root, examples, SIZES, check)


def _folder(root: Path, part: str) -> Path:
    found = [path for path in (root / part.upper(), root / part) if path.is_dir()]
    return found[0] if found else require_folder(root / part.upper(), "root")


def _part(folder: Path, part: str, fold: bool) -> Iterator[Example]:
    for place, _, names in sorted(os.walk(folder)):
        speaker = os.path.basename(place).lower()
        split = "train" if part == "train" else "test" if speaker in CORE else "dev"
        phones = {name.upper(): name for name in names if name.upper().endswith(".PHN")}
        for name in sorted(names):
            match = SENTENCE.fullmatch(name)
            sentence = match[1].upper() if match else "SA"
            if sentence.startswith("SA"):
                continue
            path = os.path.join(place, name)
            if f"{sentence}.PHN" not in phones:
                raise UserError(f"{path}: has no {sentence}.PHN beside it; complete the copy")
            said = write(_segments(Path(place, phones[f"{sentence}.PHN"]), fold))
            name = f"{speaker}-{sentence.lower()}"
            yield Example(name, path, None, None, said, speaker, split)


def _segments(source: Path, fold: bool) -> Iterator[tuple[str, float, float]]:
    for number, line in enumerate(read_text(source).splitlines(), 1):
        fields = line.split()
        if len(fields) != 3 or not (fields[0] + fields[1]).isdecimal():
            due = "`<first sample> <last sample> <phone>`"
            raise UserError(f"{source}:{number}: {line!r:.60} is not {due}")
        first, last = (int(field) / RATE for field in fields[:2])
        phone = FOLDED.get(fields[2], fields[2]) if fold else fields[2]
        if first < last and not (fold and phone == OMITTED):
            yield phone, first, last
