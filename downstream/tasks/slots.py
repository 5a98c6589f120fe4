"""How slot filling is scored: which slots were found, and how well what they hold was heard.

Source: s3prl downstream/ctc/metric.py (slot_type_f1, slot_value_cer).
"""

from __future__ import annotations

import re

from downstream.base import Metric, Tally
from downstream.tasks.metrics import cer, error_rate, success_rate

# as there, without an end of the word: `B-playlist X E-playlist_owner` is a playlist
SLOT = re.compile(r"B-(\S+) (.+?) E-\1")


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


def slot_cer(reference: str, hypothesis: str) -> Tally:
    """Character errors in the values of the reference's slots.

    Each is compared with the nearest of the hypothesis's values of the same slot, or with nothing;
    one may serve twice, and further ones are no error.
    """
    got = values(hypothesis)
    pairs = [(v, got.get(slot, [""])) for slot, each in values(reference).items() for v in each]
    nearest = [min(cer(value, other) for other in others) for value, others in pairs]
    return Tally(sum(n.errors for n in nearest), sum(n.total for n in nearest))


SLOT_F1 = Metric("slot_f1", "F1", "higher", success_rate, slot_f1)
SLOT_CER = Metric("slot_cer", "slot CER", "lower", error_rate, slot_cer)
