"""Trials as an utterance's target: what it is to be compared with, and what is true of each pair.

Verification and query by example compare utterances. Each trial stands in the target of its first
utterance (the enrolment, the query); one that is only compared with has a target without trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from downstream.base import Item
from upstream.common.errors import UserError, near_miss

OPENING = '{"trials":'


def write(trials: Iterable[tuple[int, str]]) -> str:
    """A target from (1 if the two belong together else 0, the id of the other utterance)."""
    return f"{OPENING} {json.dumps([*trials], ensure_ascii=False)}}}"


def read(target: str) -> list[tuple[int, str]] | None:
    """The trials of a target; None if it is something else, such as a label to train on."""
    if not target.startswith(OPENING):
        return None
    return [(int(label), str(other)) for label, other in json.loads(target)["trials"]]


def require(items: Sequence[Item], documents: bool = False) -> None:
    """Whether a split can be scored: every target is trials, with others of the split.

    documents: these others must be utterances without trials of their own; else labels of both
    kinds must be there. Raises UserError, the fault and its cure.
    """
    asked = {item.id: read(item.target) for item in items}
    others = {name for name, pairs in asked.items() if pairs == [] or not documents}
    for name, pairs in asked.items():
        if pairs is None:
            raise UserError(
                f"{name}: its target is no list of trials; without any it is {write([])}"
            )
        for _, other in pairs:
            if other not in others:
                what = "no document of its split" if documents else "not in the split"
                fault = f"{name}: is compared with {other!r}, which is {what}"
                raise UserError(f"{fault}{near_miss(other, others)}")
    labels = {label for pairs in asked.values() for label, _ in pairs or ()}
    if 1 not in labels:
        raise UserError("there is nothing to find: no trial is labelled 1 (they belong together)")
    if 0 not in labels and not documents:
        raise UserError("no trial is labelled 0 (they do not belong together): add some")
