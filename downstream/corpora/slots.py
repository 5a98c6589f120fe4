"""Slot filling: words and their tags, as corpora have them, to the marked text that the task reads.

`play abba now` with `O B-artist O` or `O artist O` is `PLAY B-artist ABBA E-artist NOW`.
"""

from __future__ import annotations

import re

from upstream.common.errors import UserError

OUTSIDE = "O"
CHUNK = re.compile(r"[BI]-(.+)")
SCHEME = re.compile(r"[BIELSU]-.")  # of chunk tags; the plain tags of SNIPS have no prefix
MARKER = re.compile(r"[BE]-.")


def marked(text: str, tags: str) -> str:
    """Upper-case words with `B-slot` before and `E-slot` after each slot's value.

    tags: one for each word, IOB (`B-x I-x O`; `I-x` without an `x` before it begins one) or plain
    (`x x O`: neighbours of one name are one value). Raises UserError without a place.
    """
    words, names = text.upper().split(), tags.split()
    if len(words) != len(names):
        raise UserError(f"{len(names)} tags for the {len(words)} words of the target")
    for word in words:
        if MARKER.match(word):
            raise UserError(f"the word {word!r} looks like a slot's marker; write it otherwise")
    marked: list[str] = []
    slot = ""
    for word, (begins, name) in zip(words, _slots(names)):
        if slot and (begins or name != slot):
            marked.append(f"E-{slot}")
        if name and (begins or name != slot):
            marked.append(f"B-{name}")
        marked.append(word)
        slot = name
    return " ".join(marked + [f"E-{slot}"] * bool(slot))


def _slots(tags: list[str]) -> list[tuple[bool, str]]:
    """(whether a value begins here for certain, name of the slot or "") of each word."""
    if not any(SCHEME.match(tag) for tag in tags):
        return [(False, "" if tag == OUTSIDE else tag) for tag in tags]
    slots = []
    for tag in tags:
        match = CHUNK.fullmatch(tag)
        if not match and tag != OUTSIDE:
            raise UserError(f"the tag {tag!r} is neither O nor B-slot nor I-slot")
        slots.append((tag.startswith("B-"), match[1]) if match else (False, ""))
    return slots
