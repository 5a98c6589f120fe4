"""Two-speaker mixtures made here from any manifest with speakers, for trying diarization out."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from downstream.base import AND, Example
from downstream.corpora import manifest
from downstream.corpora.splits import Part
from downstream.tasks.segments import write
from upstream import audio
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.schema import Amount, Natural, Positive, expand

VERSION, RATE = 1, 16000


def read(
    root: Path,
    *,
    source: str,
    file: str = "manifest.tsv",
    path: str = "path",
    speaker: str = "speaker",
    dev: Part,
    test: Part,
    train_mixtures: Positive = 60,
    test_mixtures: Positive = 24,
    seconds: Amount = 5.0,
    seed: Natural = 0,
) -> list[Example]:
    """Mixtures of two utterances, written below `root` on first use, with who speaks when.

    `source` is the folder of a manifest (`file`, `path`, `speaker` are as there); `dev` and `test`
    are shares of its speakers. A mixture takes 60 to 100 % of `seconds` from each utterance; the
    second begins while the first lasts, and they differ in level by up to 5 dB. As in LibriMix an
    utterance is speech throughout, pauses too. Dev has half as many as test. Raises UserError.
    """
    folder = expand(source, "corpus: source")
    spoken = manifest.of_speakers(folder, file=file, path=path, speaker=speaker, dev=dev, test=test)
    facts: list[Any] = [VERSION, seconds, seed, train_mixtures, test_mixtures]
    facts += [(e.id, e.split, os.path.getsize(e.path)) for e in spoken]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    home = root.absolute() / f"mixtures-{digest}"
    with disk.lease(home, wait=True):
        made = disk.read_checked(home / "made")  # last, when all are there
        if not _is_table(made):
            made = []
            sizes = {"train": train_mixtures, "dev": -(-test_mixtures // 2), "test": test_mixtures}
            for split, number in sizes.items():
                mine = [e for e in spoken if e.split == split]
                made += _mixtures(home, split, mine, number, seconds, seed)
            disk.write_checked(home / "made", made)
    return [Example(n, str(home / f"{n}.flac"), None, None, *said) for n, *said in made]


def _is_table(rows: Any) -> bool:
    """Whether it can be what `_mixtures` made: texts, the first of each a file's name."""
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == 4
        and all(isinstance(text, str) for text in row)
        and Path(row[0]).name == row[0]
        for row in rows
    )


def _mixtures(
    home: Path, split: str, spoken: Sequence[Example], number: int, seconds: float, seed: int
) -> list[list[str]]:
    """Name, target, speakers and split of each; all pairs of speakers take turns."""
    pairs = list(itertools.combinations(sorted({e.speaker for e in spoken}), 2))
    if not pairs:
        raise UserError(f"{home}: split {split} has one speaker and none to mix; raise its share")
    rows = []
    for k in range(number):
        rng = np.random.default_rng([seed, *split.encode(), k])
        names = rng.permutation(pairs[k % len(pairs)]).tolist()
        chosen = [rng.choice([e.path for e in spoken if e.speaker == who]) for who in names]
        name = f"{split}-{k:04d}"
        times = _mix(home / f"{name}.flac", chosen, seconds, rng)
        target = write((who, *time) for who, time in zip(names, times))
        rows.append([name, target, AND.join(sorted(names)), split])
    return rows


def _mix(
    place: Path, chosen: Sequence[str], seconds: float, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Write one mixture and return when each utterance begins and ends in it."""
    waves, starts = [], [0]
    for path, level in zip(chosen, rng.uniform(-2.5, 2.5, 2)):
        wave = audio.load(path).numpy()
        length = min(len(wave), round(RATE * seconds * rng.uniform(0.6, 1)))
        first = rng.integers(len(wave) - length + 1)
        wave = wave[first : first + length]
        waves.append(wave * (0.05 * 10 ** (level / 20) / max(1e-6, float(np.std(wave)))))
        starts.append(int(rng.integers(len(wave))))  # where the next may begin
    ends = [start + len(wave) for start, wave in zip(starts, waves)]
    mixture = np.zeros(max(ends))
    for start, end, wave in zip(starts, ends, waves):
        mixture[start:end] += wave
    with disk.writing(place), disk.whole(place) as part:
        soundfile.write(part, mixture.clip(-1, 1), RATE, subtype="PCM_16")
    return [(start / RATE, end / RATE) for start, end in zip(starts, ends)]
