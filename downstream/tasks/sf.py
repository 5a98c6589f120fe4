"""SF as SUPERB does it: characters and the borders of slots, ASR's head, CTC; slot F1 and CER.

Source: s3prl downstream/ctc with snips.yaml. 109 classes: `<pad>` (the blank, 0), `<eos>`, `<unk>`,
28 characters, then `B-x` and `E-x` for each of the 39 slots of SNIPS. A target is marked text,
`PLAY B-artist ABBA E-artist`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import partial

from downstream.base import Labels, Task
from downstream.tasks import asr, pr
from upstream.common.errors import UserError, near_miss

CHARACTERS = tuple(" ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
SLOTS = """album artist best_rating city condition_description condition_temperature country cuisine
    current_location entity_name facility genre geographic_poi location_name movie_name movie_type
    music_item object_location_type object_name object_part_of_series_type object_select object_type
    party_size_description party_size_number playlist playlist_owner poi rating_unit rating_value
    restaurant_name restaurant_type served_dish service sort spatial_relation state timeRange track
    year""".split()
MARK = re.compile(r"([BE])-(\S+)")


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


def labels(tokens: str, targets: Sequence[str]) -> Labels:
    """SUPERB's 109 tokens, or the characters and slots of the training targets."""
    if tokens == "superb":
        characters, slots, where = CHARACTERS, SLOTS, "none of SNIPS's 39; write `tokens: train`"
    else:
        words = {word for target in targets for word in target.split()}
        characters = tuple(sorted({" "}.union(*(w for w in words if not MARK.fullmatch(w)))))
        slots = sorted(word[2:] for word in words if MARK.fullmatch(word) and word[0] == "B")
        where = "in dev or test but not in train: add utterances or drop the rows"
    marks = (f"{mark}-{slot}" for slot in slots for mark in "BE")
    specials = frozenset(pr.SPECIALS)
    checked = partial(split, slots=slots, where=where)
    return Labels((*pr.SPECIALS, *characters, *marks), checked, join, specials, "<eos>")


TASK = Task("sf", "frames", "recurrent_ctc", ("slot_f1", "slot_cer"), labels, normalised)
