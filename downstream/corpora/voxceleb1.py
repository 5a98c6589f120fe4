"""VoxCeleb1 with its official identification split (Nagrani et al., Interspeech 2017)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from upstream.common.errors import UserError

SPLITS = {"1": "train", "2": "dev", "3": "test"}
SIZES = {"train": 138361, "dev": 6904, "test": 8251}
SPEAKERS = 1251
# the same list under its own name and under the one that s3prl gives it
SPLIT_FILES = ("iden_split.txt", "veri_test_class.txt")
# the archives unpack apart; many copies have them merged
WAV_FOLDERS = ("wav", "dev/wav", "test/wav")


def read(
    root: Path, target: Literal["speaker"], *, split_file: str | None = None, check: bool = True
) -> list[Example]:
    """VoxCeleb1 identification; `target` is "speaker" (id10001 ... id11251).

    `root` holds `wav/<speaker>/<video>/<number>.wav`, or `dev/wav` and `test/wav` apart, and
    `iden_split.txt` (or `split_file`, relative to `root`): lines of split (1 train, 2 dev, 3 test)
    and path. `check=False` accepts a partial copy. Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    source = _split_file(root, split_file)
    homes = speaker_folders(root)
    examples = []
    for number, line in enumerate(read_text(source).splitlines(), 1):
        code, _, name = line.strip().partition(" ")
        if code not in SPLITS or name.count("/") != 2:
            due = "`<1, 2 or 3> <speaker>/<video>/<file>.wav`"
            raise UserError(f"{source}:{number}: {line!r} is not {due}")
        speaker = name.partition("/")[0]
        path = f"{homes.get(speaker, os.path.join(root, WAV_FOLDERS[0]))}/{name}"
        utterance = name.removesuffix(".wav")
        examples.append(Example(utterance, path, None, None, speaker, speaker, SPLITS[code]))
    examples = complete(root, examples, SIZES, check)
    speakers = len({example.speaker for example in examples})
    if check and speakers != SPEAKERS:
        raise UserError(f"{source}: {speakers} speakers, {SPEAKERS} expected; fetch the list again")
    return examples


def _split_file(root: Path, given: str | None) -> Path:
    for name in (given,) if given else SPLIT_FILES:
        if given or (root / name).exists():
            return root / name
    cure = "copy the official identification split into it or name it with `split_file`"
    raise UserError(f"{root}: neither {' nor '.join(SPLIT_FILES)} is there; {cure}")


def speaker_folders(root: Path) -> dict[str, str]:
    """Speaker -> the wav folder that holds that speaker. Raises UserError if there is none."""
    homes = {}
    for folder in (root / name for name in WAV_FOLDERS):
        if folder.is_dir():
            homes.update({speaker: os.fspath(folder) for speaker in os.listdir(folder)})
    if not homes:
        raise UserError(f"{root}: holds none of the folders {', '.join(WAV_FOLDERS)}")
    return homes
