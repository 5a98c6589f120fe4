"""ASR as SUPERB does it: characters, two BiLSTM layers, CTC, WER without a language model.

Source: s3prl downstream/asr. 32 classes: four specials (blank `<s>` is 0) and 28 characters in the
order of fairseq's dictionary; words end with `|`, the target ends with `</s>`. `TED` is the task
that Speech-FT fine-tunes on (its asr_ted): no `|` after the last word, no `</s>`, and the best
checkpoint has the lowest *character* error rate on dev.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from downstream.base import Item, Labels, Task, listing

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
CHARACTERS = tuple("|ETAONIHSRDLUMCWFGYPBVK'XJQZ")


def normalised(text: str) -> str:
    """Upper case, single spaces, and one code point for an accented letter however it was typed.

    A script without case stays as it is; ß is SS and the Turkish ı is I, in references as in what
    is recognised. Composed first: upper case tears some letters apart (ᾳ is ΑΙ).
    """
    composed = unicodedata.normalize("NFC", " ".join(text.split()))
    return unicodedata.normalize("NFC", composed.upper())


def split(text: str, ended: bool = True) -> list[str]:
    """`"A CAT"` -> A | C A T |, the last separator only if `ended`."""
    return list("|".join([*text.split(), ""] if ended else text.split()))


def join(tokens: Sequence[str]) -> str:
    """Characters back to words with single spaces."""
    return " ".join("".join(tokens).replace("|", " ").split())


def labels(tokens: str, targets: Sequence[str], ended: bool = True) -> Labels:
    """SUPERB's 32 tokens, or the characters of the training text for another language."""
    known = CHARACTERS if tokens == "superb" else sorted({"|"}.union(*map(split, targets)))
    eos = "</s>" if ended else ""
    return Labels((*SPECIALS, *known), partial(split, ended=ended), join, frozenset(SPECIALS), eos)


class Recognition(Task):
    """Transcripts, in which `|` is what stands between words."""

    def doubts(self, items: Sequence[Item]) -> list[str]:
        barred = [item.id for item in items if "|" in item.target]
        fault = "transcripts hold `|`, which is read as the end of a word"
        return [f"{len(barred)} {fault}: {listing(barred)}"] * bool(barred)


TASK = Recognition("asr", "frames", "recurrent_ctc", ("wer",), labels, normalised)
TED = replace(TASK, name="asr_ted", metrics=("cer",), labels=partial(labels, ended=False))
