"""Query by example in miniature: strings of spoken digits to search, single ones to search for.

From the Free Spoken Digit Dataset's table (file, digit, speaker). Everybody says documents, in
other recordings than the queries; a speaker's queries are all in dev or all in test.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from downstream.base import Example
from downstream.corpora.common import read_text, require_folder
from downstream.tasks import trials
from upstream import audio
from upstream.base import SAMPLE_RATE
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.schema import Natural, Positive, expand

VERSION = 1  # raise it when the same plan would sound different
PAUSE = 0.1  # seconds between two digits


def read(
    root: Path,
    target: Literal["trials"],
    *,
    source: str,
    documents: Positive = 120,
    digits: Positive = 3,
    queries: Positive = 2,
    seed: Natural = 0,
) -> list[Example]:
    """Documents are written below `root`, once; `source` is the folder of the digits.

    The first half of the speakers say the dev queries, the others the test queries (`queries` of
    each digit); all say the documents of `digits` each, which both splits search.
    """
    folder = require_folder(expand(source, "corpus: source"), "source")
    spoken: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    table = folder / "manifest.tsv"
    for row in csv.DictReader(read_text(table).splitlines(), delimiter="\t"):
        if not {"file", "digit", "speaker"} <= row.keys():
            raise UserError(f"{table}: must have the columns file, digit and speaker")
        spoken[row["speaker"]][row["digit"]].append(row["file"])
    fewest = min((len(files) for each in spoken.values() for files in each.values()), default=0)
    if fewest <= queries:
        fault = f"{fewest} recordings of a digit by a speaker, more than {queries} are needed"
        raise UserError(f"{table}: {fault}; see `queries` in the recipe")
    names = sorted(spoken)
    rng = np.random.default_rng(seed)
    plan = []
    for number in range(documents):
        speaker = names[number % len(names)]
        said = [str(digit) for digit in rng.choice(sorted(spoken[speaker]), digits)]
        files = [str(rng.choice(spoken[speaker][digit][queries:])) for digit in said]
        plan.append((f"{speaker}-{number:03d}", said, files))
    home = root / hashlib.sha256(json.dumps([VERSION, plan]).encode()).hexdigest()[:8]
    examples = []
    for name, _, files in plan:
        path = home / f"{name}.wav"
        _write(path, [folder / file for file in files])
        speaker = name.partition("-")[0]
        example = Example(name, str(path), None, None, trials.write([]), speaker, "dev test")
        examples.append(example)
    for place, speaker in enumerate(names):
        for digit, files in sorted(spoken[speaker].items()):
            pairs = trials.write((1, name) for name, said, _ in plan if digit in said)
            if pairs == trials.write([]):  # would make it a document
                pairs = trials.write([(0, plan[0][0])])
            for file in files[:queries]:
                split = "dev" if place < len(names) / 2 else "test"
                where = (str(folder / file), None, None)
                examples.append(Example(Path(file).stem, *where, pairs, speaker, split))
    return examples


def _write(path: Path, files: list[Path]) -> None:
    """The files' audio one after the other, unless it is there already."""
    if path.exists():
        return
    pause = np.zeros(int(PAUSE * SAMPLE_RATE), np.float32)
    parts = [part for file in files for part in (pause, audio.load(file).numpy())]
    with disk.writing(path), disk.whole(path) as part:
        soundfile.write(part, np.concatenate([*parts, pause]), SAMPLE_RATE)
