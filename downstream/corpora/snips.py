"""Audio SNIPS: the SNIPS slot-filling sentences, read by 16 synthetic voices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from upstream.common.errors import UserError

TEXTS = "all.iob.snips.txt"
FOLDERS = {"train": "train", "dev": "valid", "test": "test"}
SPEAKERS = {
    "train": "Ivy Joanna Joey Justin Kendra Kimberly Matthew Salli".split(),
    "dev": "Aditi Amy Geraint Nicole".split(),
    "test": "Brian Emma Raveena Russell".split(),
}
SIZES = {"train": 8 * 13084, "dev": 4 * 700, "test": 4 * 700}
PUNCTUATION = "?!.,;-"


def read(root: Path, target: Literal["slots"], *, check: bool = True) -> list[Example]:
    """Audio SNIPS; `target` is "slots": `PLAY B-artist ABBA E-artist`.

    `root` holds the folders train, valid and test with wav files (at any depth), and
    all.iob.snips.txt: lines of utterance, words and after a tab their slots,
    `Ivy-snips-train-0 BOS PLAY ABBA EOS<tab>O O artist PlayMusic`. Which voices serve which split
    is SUPERB's choice. `check=False` accepts a partial copy.
    Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    split_of = {speaker: split for split, each in SPEAKERS.items() for speaker in each}
    paths = {split: _wavs(require_folder(root / name, "root")) for split, name in FOLDERS.items()}
    examples = []
    for name, text in _targets(root / TEXTS):
        speaker, _, rest = name.partition("-")
        split = split_of.get(speaker, "")
        if split and f"-{FOLDERS[split]}-" in f"-{rest}":
            path = paths[split].get(name, str(root / FOLDERS[split] / f"{name}.wav"))
            examples.append(Example(name, path, None, None, text, speaker, split))
    return complete(root, examples, SIZES, check)


def marked(words: Sequence[str], tags: Sequence[str]) -> str:
    """Words and the slot of each ("O": none) as marked text, without punctuation.

    Two slots of one kind in a row are one, as the tags say no more. Punctuation is what s3prl
    (downstream/ctc/text.py) takes for it; next to the border of a slot it loses a mark there, and
    at the end of a sentence `<eos>`: not so here.
    """
    parts: list[str] = []
    for tag, run in groupby(zip(words, tags), key=lambda pair: pair[1]):
        spoken = ["AND" if word == "&" else word for word, _ in run if word not in PUNCTUATION]
        parts += spoken if tag == "O" or not spoken else [f"B-{tag}", *spoken, f"E-{tag}"]
    return " ".join(parts)


def _targets(file: Path) -> Iterator[tuple[str, str]]:
    """Utterance and marked text. The first and last of words and tags are no part of either."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name, _, rest = line.strip().partition(" ")
        words, _, tags = (part.strip().split(" ") for part in rest.partition("\t"))
        if len(words) != len(tags) or len(words) < 3:
            fault = f"{len(words)} words and {len(tags)} tags"
            due = "`<utterance> BOS <words> EOS<tab>O <tags> <intent>` with a tag for each word"
            raise UserError(f"{file}:{number}: {fault}, not {due}")
        yield name, marked(words[1:-1], tags[1:-1])


def _wavs(folder: Path) -> dict[str, str]:
    """Utterance -> its file."""
    walk = (os.path.join(place, file) for place, _, files in os.walk(folder) for file in files)
    return {Path(path).stem: path for path in sorted(walk) if path.endswith(".wav")}
