"""Speech Commands v0.01 for keyword spotting (Warden, 2018): twelve classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, require_folder
from downstream.tasks.ks import CLASSES, SILENCE, UNKNOWN
from upstream.audio import seconds
from upstream.common.errors import UserError

NOISE = "_background_noise_"
NOISES = 6  # files of about a minute
SIZES = {"train": 51088, "dev": 6798}  # words, without silence
TESTED = {"test": 3081}
MOST = 2**27 - 1  # files of a class, by TensorFlow's rule


def read(
    root: Path,
    target: Literal["word"],
    *,
    train: str = "speech_commands_v0.01",
    test: str = "speech_commands_test_set_v0.01",
    check: bool = True,
) -> list[Example]:
    """Speech Commands; `target` is "word": one of ten, `_unknown_` or `_silence_`.

    `root` holds the two archives as they unpack, each in a folder of its own, `train` and `test`.
    Train and dev are parted by TensorFlow's rule (`subset`); the words that it would test on are
    left out, because the test archive is the test set. Silence is every whole second of the noise
    files, the last tenth of each file for dev; s3prl draws a second anywhere in them each time, for
    train and dev from the same files. `check=False` accepts a partial copy. Raises UserError naming
    what is missing.

    s3prl lowers all audio by 3 dB (sox gain), here it stays as it is. What that moves: hidden
    states of hubert_demo by 0.04 to 0.3 % (EmoDB) and 1 to 7 % (quiet 8-kHz digits of FSDD), for
    its group norm cancels a gain up to its epsilon; log-mel features by a constant, to their floor.
    """
    require_folder(root, "root")
    archive, tested = require_folder(root / train, "train"), require_folder(root / test, "test")
    if strange := sorted({f.name for f in _folders(tested)} - {*CLASSES}):
        fault = f"holds {strange[0]!r}, which is no class: is this the archive of the test set?"
        raise UserError(f"{tested}: {fault}; see `test` in the recipe")
    words = [e for folder in _folders(archive) for e in _words(folder) if e.split != "test"]
    spoken = [
        e._replace(split="test", target=folder.name)
        for folder in _folders(tested)
        for e in _words(folder)
    ]
    return [
        *complete(archive, words, SIZES, check),
        *_silence(archive / NOISE, check),
        *complete(tested, spoken, TESTED, check),
    ]


def subset(file: str) -> str:
    """train, dev or test of a file by its name: a speaker's recordings of a word stay together."""
    digest = hashlib.sha1(file.partition("_nohash_")[0].encode()).hexdigest()
    share = int(digest, 16) % (MOST + 1) * (100 / MOST)
    return "dev" if share < 10 else "test" if share < 20 else "train"


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and f.name != NOISE)


def _words(folder: Path) -> Iterator[Example]:
    label = folder.name if folder.name in CLASSES else UNKNOWN
    for file in sorted(name for name in os.listdir(folder) if name.endswith(".wav")):
        name, path = f"{folder.name}/{file.removesuffix('.wav')}", os.path.join(folder, file)
        yield Example(name, path, None, None, label, _speaker(name), subset(file))


def _speaker(name: str) -> str:
    """`_unknown_/bed_0a7c2a8d_nohash_0` is by 0a7c2a8d; what names nobody is its own speaker."""
    before, nohash, _ = os.path.basename(name).partition("_nohash_")
    return before.rpartition("_")[2] if nohash else name


def _silence(folder: Path, check: bool) -> Iterator[Example]:
    """Pieces of a second. Raises UserError unless all noise files are there."""
    files = sorted(require_folder(folder, "train").glob("*.wav"))
    if (check and len(files) != NOISES) or not files:
        cure = "unpack the archive again, or set `check: false` to use the part that is there"
        raise UserError(f"{folder}: {len(files)} noise files, {NOISES} expected; {cure}")
    for file in files:
        whole = int(seconds(file))
        for start in range(whole):
            split = "dev" if start >= whole - max(1, whole // 10) else "train"
            name, times = f"{NOISE}/{file.stem}:{start}", (float(start), float(start + 1))
            yield Example(name, str(file), *times, SILENCE, f"{NOISE}/{file.stem}", split)
