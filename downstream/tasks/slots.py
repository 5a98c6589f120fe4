"""Marked text, `PLAY B-artist ABBA E-artist`: as tokens, and how slot filling is scored.

Sources: s3prl downstream/ctc/text.py (CharacterTextSlotEncoder) and metric.py (slot_type_f1: which
slots were found; slot_value_cer and the others: how well what they hold was heard).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial

from downstream.base import Metric, Tally
from downstream.tasks import asr
from downstream.tasks.metrics import cer, error_rate, success_rate, wer
from upstream.common.errors import UserError, near_miss

MARK = re.compile(r"([BE])-(\S+)")
# as there, without an end of the word: `B-playlist X E-playlist_owner` is a playlist
SLOT = re.compile(r"B-(\S+) (.+?) E-\1")


def normalised(text: str) -> str:
    """Words like ASR's, single spaces, marks as they are."""
    return " ".join(w if MARK.fullmatch(w) else asr.normalised(w) for w in text.split())


def split(text: str, slots: Collection[str] | None = None, where: str = "") -> list[str]:
    """`PLAY B-x IT E-x` -> P L A Y, space, B-x, I T, E-x: no space within the marks.

    Raises UserError for a slot that is not closed, has no words, or is none of `slots`.
    """
    tokens: list[str] = []
    slot = ""  # that is open
    for word in text.split():
        match = MARK.fullmatch(word)
        mark, name = match.groups() if match else ("", "")
        wrong = {"B": slot != "", "E": name != slot or tokens[-1:] == [f"B-{slot}"]}
        if wrong.get(mark):
            rule = "a slot is `B-x WORDS E-x`, and no other word may begin with B- or E-"
            raise UserError(f"{word} is out of place in {text!r}: {rule}")
        if mark == "B" and slots is not None and name not in slots:
            raise UserError(f"slot {name!r} is {where}{near_miss(name, slots)}")
        if mark != "E" and tokens and not tokens[-1].startswith("B-"):
            tokens.append(" ")
        tokens += [word] if mark else word
        slot = {"B": name, "E": ""}.get(mark, slot)
    if slot:
        raise UserError(f"slot {slot!r} is not closed in {text!r}; write E-{slot} behind its words")
    return tokens


def join(tokens: Sequence[str]) -> str:
    """Marked text: spaces within the marks, the others as they were heard."""
    return "".join({"B-": f"{t} ", "E-": f" {t}"}.get(t[:2], t) for t in tokens)


def values(text: str) -> dict[str, list[str]]:
    """Slot -> what its occurrences hold, markers within removed."""
    found: dict[str, list[str]] = {}
    for slot, value in SLOT.findall(" ".join(text.split())):
        value = re.sub(r" E-\S+", "", re.sub(r"B-\S+ ", "", value))
        found.setdefault(slot, []).append(value)
    return found


def slot_f1(reference: str, hypothesis: str) -> Tally:
    """What is missing to an F1 of 1 between the two sets of slots; two empty sets agree."""
    due, got = values(reference).keys(), values(hypothesis).keys()
    f1 = 2 * len(due & got) / (len(due) + len(got)) if due or got else 1.0
    return Tally(1 - f1, 1.0)


def nearest(reference: str, hypothesis: str, count: Callable[[str, str], Tally]) -> Tally:
    """Errors in the values of the reference's slots.

    Each is compared with the nearest of the hypothesis's values of the same slot, or with nothing;
    one may serve twice, and further ones are no error.
    """
    got = values(hypothesis)
    pairs = [(v, got.get(slot, [""])) for slot, each in values(reference).items() for v in each]
    tallies = [min(count(value, other) for other in others) for value, others in pairs]
    return Tally(sum(t.errors for t in tallies), sum(t.total for t in tallies))


def slot_edits(reference: str, hypothesis: str) -> Tally:
    """FN + FP of 2 TP + FN + FP, so that what is right is an F1 over whole values.

    A value that the hypothesis has otherwise is missed and falsely found; one that serves twice is
    right twice; slots that the reference has not are false (s3prl's slot_edit_f1_full).
    """
    due, got = values(reference), values(hypothesis)
    right = sum(v in got.get(slot, []) for slot, each in due.items() for v in each)
    missed = sum(map(len, due.values())) - right
    false = sum(v not in got[s] for s in due.keys() & got.keys() for v in due[s])
    false += sum(len(got[s]) for s in got.keys() - due.keys())
    return Tally(missed + false, 2 * right + missed + false)


SLOT_F1 = Metric("slot_f1", "F1", "higher", success_rate, slot_f1)
SLOT_CER = Metric("slot_cer", "slot CER", "lower", error_rate, partial(nearest, count=cer))
SLOT_WER = Metric("slot_wer", "slot WER", "lower", error_rate, partial(nearest, count=wer))
SLOT_EDIT_F1 = Metric("slot_edit_f1", "edit F1", "higher", success_rate, slot_edits)
