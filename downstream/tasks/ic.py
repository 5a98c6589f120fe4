"""IC as SUPERB does it: several questions about an utterance, right if every answer is. Accuracy.

Source: s3prl downstream/fluent_commands. The head of SID with the values of all questions side by
side, 6 + 14 + 4 for Fluent Speech Commands; the loss is the sum of their cross-entropies. A target
is `activate ; lights ; kitchen`, and so is what is predicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from downstream.base import Labels
from downstream.tasks import sid
from upstream.common.errors import UserError

SEPARATOR = " ; "


def split(target: str, questions: int) -> list[str]:
    """`"up ; none"` -> `1: up`, `2: none`: two questions may know the same word."""
    values = target.split(SEPARATOR)
    if len(values) != questions:
        fault = f"{target!r} has {len(values)} answers, the training set mostly {questions}"
        raise UserError(f"{fault}; they are joined by {SEPARATOR!r}")
    return [f"{number}: {value}" for number, value in enumerate(values, 1)]


def join(tokens: Sequence[str]) -> str:
    """What `split` took apart."""
    return SEPARATOR.join(token.partition(": ")[2] for token in tokens)


def labels(_tokens: str, targets: Sequence[str]) -> Labels:
    """The training set's values of each question, in the order they first appear in."""
    counts = Counter(target.count(SEPARATOR) + 1 for target in targets)
    questions = max(counts, key=lambda number: counts[number], default=0)
    rows = [split(t, questions) for t in targets if t.count(SEPARATOR) + 1 == questions]
    values = [list(dict.fromkeys(column)) for column in zip(*rows)]
    refusal = "answer {!r} is in dev or test but not in train: add utterances or drop the rows"
    return Labels(
        symbols=tuple(value for each in values for value in each),
        split=partial(split, questions=questions),
        join=join,
        refusal=refusal,
        sizes=tuple(map(len, values)),
    )


TASK = replace(sid.TASK, name="ic", labels=labels)
