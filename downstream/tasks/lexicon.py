"""Words to phones, for phoneme recognition: CMUdict and LibriSpeech lexicon files."""

from __future__ import annotations

import functools
import re
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

from downstream.base import Example
from downstream.corpora.common import read_text
from upstream.common.errors import UserError, near_miss

CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
# the 71 symbols of SUPERB's phoneme recognition: silence, spoken noise, vowels with their stress
PHONES = ("SIL", "SPN", *CONSONANTS, *(f"{vowel}{stress}" for vowel in VOWELS for stress in "012"))
KNOWN = frozenset(PHONES)

_VARIANT = re.compile(r"\(\d+\)$")


class Lexicon:
    """Pronunciations from `files`, read in order: the first one of a word wins.

    A line is a word and its phones, separated by blanks or a tab. `word(2)` is a further
    pronunciation and is not used; `#` begins a comment, and so does `;;;`, as in older CMUdicts.
    Raises UserError for a line without phones and for a phone outside `PHONES`.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.phones = ChainMap(*map(_entries, files))

    def __call__(self, word: str) -> str | None:
        """Phones of `word` (in any case), separated by spaces; None if no file has it."""
        return self.phones.get(word.upper())


@functools.lru_cache(maxsize=8)
def _entries(file: Path) -> dict[str, str]:
    """Upper-case word -> phones. Kept, because every split of a corpus asks for it again."""
    entries: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        word, *sounds = line.partition("#")[0].split() or [""]
        if not word or word.startswith(";;;") or _VARIANT.search(word):
            continue
        if not sounds:
            raise UserError(f"{file}:{number}: {word!r} has no phones after it")
        for odd in set(sounds) - KNOWN:
            hint = near_miss(odd, PHONES)
            raise UserError(f"{file}:{number}: {word!r} has an unknown phone {odd!r}{hint}")
        entries.setdefault(word.upper(), " ".join(sounds))
    return entries


def to_phones(examples: Sequence[Example], lexicons: Sequence[Path]) -> list[Example]:
    """The examples with their transcripts replaced by phones, separated by spaces.

    Word boundaries are not kept. Raises one UserError for all the words that no lexicon has: how
    many, and the first five.
    """
    lexicon = Lexicon(lexicons)
    missing: dict[str, str] = {}  # word -> the first utterance that has it
    transcribed = []
    for example in examples:
        phones = {word: lexicon(word) for word in example.target.split()}
        missing |= {w: example.id for w, p in phones.items() if p is None and w not in missing}
        target = " ".join(phones[word] or "" for word in example.target.split())
        transcribed.append(example._replace(target=target))
    if missing:
        first = ", ".join(f"{word} ({utterance})" for word, utterance in list(missing.items())[:5])
        raise UserError(
            f"{len(missing)} words are in none of the lexicons ({', '.join(map(str, lexicons))}), "
            f"first {first}; list a file with lines like `HELLO HH AH0 L OW1` as one more lexicon"
        )
    return transcribed
