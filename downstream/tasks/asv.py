"""ASV as SUPERB does it: do two utterances have one speaker? x-vectors, cosine, equal error rate.

Source: s3prl downstream/sv_voxceleb1. Targets to train on are speakers; those of dev and test are
trials (trials.py), and the EER on dev selects. s3prl takes the lowest EER on *test* of ten
checkpoints, which the reader's option `dev_speakers: 0` repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from downstream.base import AND, Item, Labels, Metric, Record, Task, Trial, listing
from downstream.tasks import trials
from upstream.common.errors import UserError


class Verification(Task):
    def admits(self, metric: Metric) -> bool:
        return metric.count is None

    def check(self, items: Sequence[Item]) -> None:
        trials.require(items)

    def doubts(self, items: Sequence[Item]) -> list[str]:
        """Trials that contradict the speakers which the corpus names."""
        named = {item.id: item.speaker for item in items if item.speaker != item.id}
        odd = []
        for item in items:
            for label, other in trials.read(item.target) or ():
                both = item.id in named and other in named
                if both and label != (named[item.id] == named[other]):
                    odd.append(f"{item.id} {other}")
        fault = "trials contradict the speakers that the corpus names (1: the same speaker)"
        return [f"{len(odd)} {fault}: {listing(odd)}"] * bool(odd)

    def say(self, output: Any, labels: Labels, chosen: Mapping[str, Any]) -> str:
        raise UserError("verification compares two utterances: there is nothing to say of one")

    def records(
        self, items: Sequence[Item], outputs: Sequence[Any], labels: Labels
    ) -> list[Record]:
        """One Trial per pair. A pair that is listed twice counts twice, as in s3prl."""
        place = {item.id: index for index, item in enumerate(items)}
        seen, records = Counter[str](), list[Record]()
        for item, vector in zip(items, outputs):
            for label, other in trials.read(item.target) or []:
                pair = f"{item.id} {other}"
                seen[pair] += 1
                name = pair if seen[pair] == 1 else f"{pair} {seen[pair]}"
                score = float(vector @ outputs[place[other]])
                who = AND.join(sorted({item.speaker, items[place[other]].speaker}))
                records.append(Trial(name, item.id, other, score, label, who, group=item.group))
        return records


def split(target: str) -> list[str]:
    """The speaker to learn; trials have none."""
    return [target] if trials.read(target) is None else []


def labels(_tokens: str, targets: Sequence[str]) -> Labels:
    """One class for each speaker of the training set, in sorted order."""
    if not all(map(split, targets)):
        raise UserError("train holds trials: its targets must be speakers; see the recipe's corpus")
    refusal = "speaker {!r} is a target in dev or test: those need trials"
    return Labels(tuple(sorted(set(targets))), split, refusal=refusal)


TASK = Verification("asv", "frames", "xvector", ("eer",), labels)
