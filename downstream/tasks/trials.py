"""Trials as an utterance's target: what it is to be compared with, and what is true of each pair.

Verification and query by example compare utterances. Each trial stands in the target of its first
utterance (the enrolment, the query); one that is only compared with has a target without trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

OPENING = '{"trials":'


def write(trials: Iterable[tuple[int, str]]) -> str:
    """A target from (1 if the two belong together else 0, the id of the other utterance)."""
    return f"{OPENING} {json.dumps([*trials], ensure_ascii=False)}}}"


def read(target: str) -> list[tuple[int, str]] | None:
    """The trials of a target; None if it is something else, such as a label to train on."""
    if not target.startswith(OPENING):
        return None
    return [(int(label), str(other)) for label, other in json.loads(target)["trials"]]
