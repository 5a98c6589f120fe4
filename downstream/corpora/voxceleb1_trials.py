"""VoxCeleb1 verification (Nagrani et al.): trials of 40 speakers, 1211 others to train on."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import absent, complete, read_text, require_folder
from downstream.corpora.pairs import paired
from downstream.corpora.splits import hashed
from downstream.corpora.voxceleb1 import speaker_folders
from downstream.tasks.trials import write
from upstream.common.errors import UserError
from upstream.common.schema import Amount, Natural

TRIALS, SPEAKERS, UTTERANCES = 37720, 1211, 148642  # the last two to train on
DEV_UTTERANCES, DEV_TRIALS = 20, 4  # of a speaker; of an utterance, with each kind of speaker


def read(
    root: Path,
    target: Literal["speaker"] = "speaker",
    *,
    trials: str = "voxceleb1_test_v2.txt",
    dev_speakers: Natural = 40,
    longer_than: Amount = 2.0,
    check: bool = True,
) -> list[Example]:
    """VoxCeleb1 for verification: training targets are speakers, those of dev and test trials.

    `root` holds `dev/wav` and `test/wav`, or both merged into `wav`, and the list `trials` (lines
    `1 <path> <path>`). Whoever is in it is not trained on. `dev_speakers` of the others, by hash,
    are held out: 20 utterances of each, by hash, compared with 4 of the same and 4 of other
    speakers (pairs.py). With 0 all are trained on and the *test* trials select, as in s3prl.

    Training utterances must last `longer_than` seconds, taken from the size of the file (16-bit
    mono at 16 kHz). Silence is not trimmed, which s3prl does with sox before it measures: a few
    utterances more are kept. `check=False` accepts a partial copy, with the trials that it allows.
    Raises UserError naming what is missing.
    """
    require_folder(root, "root")
    homes = speaker_folders(root)
    asked = list(_trials(root / trials))
    names = sorted({name for _, *pair in asked for name in pair})
    tested = {name.partition("/")[0] for name in names}
    known = sorted(homes.keys() - tested)
    files = {name: f"{homes.get(name.partition('/')[0], root)}/{name}" for name in names}
    spoken = {who: sorted(glob.glob(f"{homes[who]}/{who}/*/*.wav")) for who in known}
    if check:
        cure = "complete the copy, or set `check: false` to use the part that is there"
        sizes = (("trials", len(asked), TRIALS), ("training speakers", len(known), SPEAKERS))
        total = sum(map(len, spoken.values()))
        for what, number, due in (*sizes, ("training utterances", total, UTTERANCES)):
            if number != due:
                raise UserError(f"{root}: {number} {what}, {due} expected; {cure}")
    else:
        gone = {names[i] for i in absent([files[name] for name in names])}
        asked = [trial for trial in asked if not gone & {*trial[1:]}]

    compared: dict[str, list[tuple[int, str]]] = {
        name: [] for name in sorted({name for _, *pair in asked for name in pair})
    }
    for label, first, second in asked:
        compared[first].append((label, second.removesuffix(".wav")))
    split = "test" if dev_speakers else "dev test"
    examples = [
        _example(files[name], name, write(pairs), split) for name, pairs in compared.items()
    ]
    held = sorted(known, key=hashed)[:dev_speakers]
    least = 44 + longer_than * 2 * 16000
    dev = []
    for who, paths in spoken.items():
        kept = [path for path in paths if os.path.getsize(path) > least]
        mine = [_example(path, path[len(homes[who]) + 1 :], who, "train") for path in kept]
        if who in held:
            dev += sorted(mine, key=lambda e: hashed(e.id))[:DEV_UTTERANCES]
        else:
            examples += mine
    if held:
        examples += paired([example._replace(split="dev") for example in dev], DEV_TRIALS)
    return complete(root, examples, {}, check)


def _example(path: str, name: str, target: str, split: str) -> Example:
    who = name.partition("/")[0]
    return Example(name.removesuffix(".wav"), path, None, None, target, who, split)


def _trials(source: Path) -> Iterator[tuple[int, str, str]]:
    """Label and the two paths of every line."""
    for number, line in enumerate(read_text(source).splitlines(), 1):
        label, *names = line.split() or [""]
        if label not in ("0", "1") or len(names) != 2 or any(n.count("/") != 2 for n in names):
            due = "`<0 or 1> <speaker>/<video>/<file>.wav <speaker>/<video>/<file>.wav`"
            raise UserError(f"{source}:{number}: {line!r:.100} is not {due}")
        yield int(label), names[0], names[1]
