"""ASR as SUPERB does it: characters, two BiLSTM layers, CTC, WER without a language model.

Source: s3prl downstream/asr. 32 classes: four specials (blank `<s>` is 0) and 28 characters in the
order of fairseq's dictionary; words end with `|`, the target ends with `</s>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from downstream.base import Labels, Task
from downstream.tasks.labels import Tokens

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
CHARACTERS = tuple("|ETAONIHSRDLUMCWFGYPBVK'XJQZ")


def split(text: str) -> list[str]:
    """`"A CAT"` -> A | C A T | (upper case, a separator after every word)."""
    return [c for word in text.upper().split() for c in (*word, "|")]


def join(tokens: Sequence[str]) -> str:
    """Characters back to words with single spaces."""
    return " ".join("".join(tokens).replace("|", " ").split())


def labels(tokens: str, targets: Sequence[str]) -> Labels:
    """SUPERB's 32 tokens, or the characters of the training text for another language."""
    found = CHARACTERS if tokens == "superb" else sorted({c for t in targets for c in split(t)})
    specials = frozenset({"<s>", "<pad>", "</s>"})
    return Tokens((*SPECIALS, *found), specials, "</s>", split, join)


TASK = Task(name="asr", head="recurrent_ctc", metric="wer", reduce="frames", labels=labels)
