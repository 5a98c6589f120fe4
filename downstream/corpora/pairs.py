"""Trials by rule, for corpora that come without: the same on every machine, from hashes of ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from downstream.base import Example
from downstream.corpora import manifest
from downstream.corpora.splits import Part, hashed
from downstream.tasks.trials import write
from upstream.common.errors import UserError
from upstream.common.schema import Positive


def read(
    root: Path,
    *,
    file: str = "manifest.tsv",
    path: str = "path",
    speaker: str = "speaker",
    dev: Part,
    test: Part,
    trials: Positive = 4,
) -> list[Example]:
    """A manifest of speakers for verification: `dev` and `test` are shares of the speakers.

    `file`, `path` and `speaker` are as of the manifest. Each utterance of dev and test is compared
    with `trials` others of its speaker and as many of other speakers. Raises UserError.
    """
    examples = manifest.of_speakers(root, file=file, path=path, speaker=speaker, dev=dev, test=test)
    parts = {part: [e for e in examples if e.split == part] for part in ("train", "dev", "test")}
    try:
        return parts["train"] + paired(parts["dev"], trials) + paired(parts["test"], trials)
    except UserError as error:
        raise UserError(f"{root / file}: {error}") from error


def paired(examples: Sequence[Example], each: int) -> list[Example]:
    """The utterances of one split with trials as targets.

    Each is compared with the `each` that follow it among its speaker's utterances and with as many
    of the other speakers, who take turns. Raises UserError where there are not two speakers, or
    none with two utterances.
    """
    by_speaker: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda e: hashed(e.id)):
        by_speaker[example.speaker].append(example)
    speakers = sorted(by_speaker, key=hashed)
    if len(speakers) < 2 or max(map(len, by_speaker.values())) < 2:
        fault = f"{len(examples)} utterances of {len(speakers)} speakers make no trials"
        raise UserError(f"{fault}: two speakers are needed, and two utterances of one")
    done = []
    for number, speaker in enumerate(speakers):
        mine, others = by_speaker[speaker], speakers[number + 1 :] + speakers[:number]
        for place, example in enumerate(mine):
            trials = [(1, other.id) for other in (mine[place + 1 :] + mine[:place])[:each]]
            for turn in range(place * each, (place + 1) * each):
                theirs = by_speaker[others[turn % len(others)]]
                trials.append((0, theirs[turn // len(others) % len(theirs)].id))
            done.append(example._replace(target=write(dict.fromkeys(trials))))
    return done
