"""SF as SUPERB does it: characters and the borders of slots, ASR's head, CTC; slot F1 and CER.

Source: s3prl downstream/ctc with snips.yaml. 109 classes: `<pad>` (the blank, 0), `<eos>`, `<unk>`,
28 characters, then `B-x` and `E-x` for each of the 39 slots of SNIPS. A target is marked text,
`PLAY B-artist ABBA E-artist`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from downstream.base import Labels, Task
from downstream.tasks import pr
from downstream.tasks.slots import MARK, join, normalised, split

CHARACTERS = tuple(" ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
SLOTS = """album artist best_rating city condition_description condition_temperature country cuisine
    current_location entity_name facility genre geographic_poi location_name movie_name movie_type
    music_item object_location_type object_name object_part_of_series_type object_select object_type
    party_size_description party_size_number playlist playlist_owner poi rating_unit rating_value
    restaurant_name restaurant_type served_dish service sort spatial_relation state timeRange track
    year""".split()


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
