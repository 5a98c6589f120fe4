"""speechocean762 (OpenSLR 101): 250 Mandarin speakers who read English, in its own layout."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from downstream.corpora.pairs import paired
from downstream.corpora.splits import hashed
from upstream.common.errors import UserError
from upstream.common.schema import Positive

PARTS = ("train", "test")  # made for the scoring of pronunciation; 125 speakers each
SPEAKERS, UTTERANCES = 250, 5000
TEST, DEV = 0.35, 0.15  # of the speakers
ROW_TEST, ROW_DEV = 0.25, 0.15  # of the utterances of each speaker

STRESS_AND_PLACE = re.compile(r"\d?(_[BIES])?$")  # in the word: beginning, inside, end, single


def read(
    root: Path,
    target: Literal["text", "phones", "speaker", "trials"],
    *,
    split_by: Literal["speaker", "row", "both"],
    trials: Positive = 4,
    check: bool = True,
) -> list[Example]:
    """What was read aloud, by whom, or trials for verification.

    `root` holds WAVE, resource, and the folders `train` and `test` with Kaldi's files. Both are
    read, and the splits are made here, from ids alone: an utterance has the same one in every
    partial copy.

    - speaker: the first 8 hex digits of the SHA-256 of a speaker's id, as a share of 16**8, are
      below 0.35 for test, below 0.5 for dev, and above for train;
    - row: of each speaker's 20 utterances, ordered by the SHA-256 of their ids, the first 5 are
      test, the next 3 dev, the other 12 train (a quarter and 15 % of any other number);
    - both: the speakers of train alone, by row. Neither rule tests on its train and dev, so that
      fine-tuning and pre-training may hear these.

    phones: those that the corpus chose from its lexicon for each word, without stress: 39.
    trials: each utterance of dev and test is compared with so many of its speaker and as many of
    others (`pairs.py`). `check=False` accepts a partial copy. Raises UserError, with the line of a
    file.
    """
    require_folder(root, "root")
    rows = [row for part in _parts(root, check) for row in _part(root, part)]
    by_row = _split_rows(rows)
    examples = []
    for row in rows:
        of_speaker, of_row = _split_speaker(row.speaker), by_row[row.id]
        if split_by == "both" and of_speaker != "train":
            continue
        label = row.speaker if target in ("speaker", "trials") else row.target
        split = of_speaker if split_by == "speaker" else of_row
        examples.append(row._replace(target=label, split=split))
    if check:
        _require_whole(root, rows)
    examples = complete(root, examples, {}, check)
    if target == "phones":
        phones = _phones(root / "resource" / "text-phone", {row.id for row in rows})
        examples = [example._replace(target=phones[example.id]) for example in examples]
    return _with_trials(root, examples, trials) if target == "trials" else examples


def _parts(root: Path, check: bool) -> list[Path]:
    present = [root / part for part in PARTS if (root / part).is_dir()]
    if check or not present:
        return [require_folder(root / part, "root") for part in PARTS]
    return present


def _part(root: Path, part: Path) -> list[Example]:
    """The rows of one folder of Kaldi's files, with the words as target and no split."""
    paths, texts = _table(part / "wav.scp"), _table(part / "text")
    speakers = _table(part / "utt2spk")
    for source, names in (("text", texts), ("utt2spk", speakers)):
        if absent := sorted(paths.keys() - names.keys()):
            raise UserError(f"{part / source}: has no line for {absent[0]}; complete the copy")
    return [
        Example(name, os.fspath(root / path), None, None, texts[name], speakers[name], "")
        for name, path in paths.items()
    ]


def _table(source: Path) -> dict[str, str]:
    """Lines of an id and what belongs to it. Raises UserError with the line."""
    rows: dict[str, str] = {}
    for number, line in enumerate(read_text(source).splitlines(), 1):
        name, *content = line.split(maxsplit=1)
        if not content:
            raise UserError(f"{source}:{number}: nothing after the id {name!r}")
        if name in rows:
            raise UserError(f"{source}:{number}: {name!r} comes a second time")
        rows[name] = content[0].strip()
    return rows


def _phones(source: Path, names: set[str]) -> dict[str, str]:
    """Phones of utterances, `B EH T ER`, from a line a word: `000010011.2 B_B EH1_I T_I ER0_E`."""
    words: dict[str, list[str]] = defaultdict(list)
    for word, phones in _table(source).items():
        words[word.partition(".")[0]] += [STRESS_AND_PLACE.sub("", x) for x in phones.split()]
    if absent := sorted(names - words.keys()):
        raise UserError(f"{source}: has no line for {absent[0]}; complete the copy")
    return {name: " ".join(phones) for name, phones in words.items()}


def _split_speaker(speaker: str) -> str:
    place = int(hashed(speaker)[:8], 16) / 16**8
    return "test" if place < TEST else "dev" if place < TEST + DEV else "train"


def _split_rows(rows: Iterable[Example]) -> dict[str, str]:
    """The split of each id within its speaker's utterances."""
    by_speaker: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_speaker[row.speaker].append(row.id)
    split_of = {}
    for names in by_speaker.values():
        test, dev = (round(share * len(names)) for share in (ROW_TEST, ROW_DEV))
        for place, name in enumerate(sorted(names, key=hashed)):
            split_of[name] = "test" if place < test else "dev" if place < test + dev else "train"
    return split_of


def _require_whole(root: Path, rows: list[Example]) -> None:
    """Raises UserError where speakers or utterances are missing from the tables."""
    speakers = len({row.speaker for row in rows})
    if (speakers, len(rows)) != (SPEAKERS, UTTERANCES):
        fault = f"{len(rows)} utterances of {speakers} speakers"
        due = f"{UTTERANCES} of {SPEAKERS} expected"
        cure = "complete the copy, or set `check: false` to use the part that is there"
        raise UserError(f"{root}: {fault}, {due}; {cure}")


def _with_trials(root: Path, examples: list[Example], trials: int) -> list[Example]:
    """Train with its speakers as targets, dev and test with trials."""
    parts = {part: [e for e in examples if e.split == part] for part in ("train", "dev", "test")}
    try:
        return parts["train"] + paired(parts["dev"], trials) + paired(parts["test"], trials)
    except UserError as error:
        raise UserError(f"{root}: {error}") from error
