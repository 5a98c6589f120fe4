"""Words to phones, for phoneme recognition: files of CMUdict, LibriSpeech, MFA and Kaldi."""

from __future__ import annotations

import functools
import re
import unicodedata
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
_COMMENT = re.compile(r"(^|(?<=\s))#.*")
_PROBABILITY = re.compile(r"\d*\.\d+([eE]-?\d+)?")


class Lexicon:
    """Pronunciations from `files`, read in order: the first file that has a word wins.

    A line is a word and its phones, separated by blanks or a tab, as in CMUdict, LibriSpeech's and
    MFA's dictionaries and Kaldi's lexicon.txt and lexiconp.txt: numbers with a point between the
    two are probabilities. Of several pronunciations the most probable is taken, without
    probabilities the first. `word(2)` is a further pronunciation and is not used; ` #` begins a
    comment, and so does `;;;`, as in older CMUdicts. phones: those that are known (SUPERB's), or
    None for any. Raises UserError for a line without phones and for an unknown phone.
    """

    def __init__(self, files: Sequence[Path], phones: frozenset[str] | None = KNOWN) -> None:
        self.phones = ChainMap(*(_entries(file, phones) for file in files))

    def __call__(self, word: str) -> str | None:
        """Phones of `word` (in any case), separated by spaces; None if no file has it."""
        return self.phones.get(_key(word))


def _key(word: str) -> str:
    return unicodedata.normalize("NFC", word.upper())


@functools.lru_cache(maxsize=8)
def _entries(file: Path, phones: frozenset[str] | None) -> dict[str, str]:
    """Upper-case word -> phones. Remembered, for every split of a corpus asks for it again."""
    entries: dict[str, str] = {}
    best: dict[str, float] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        word, *sounds = _COMMENT.sub("", line).split() or [""]
        if not word or word.startswith(";;;") or _VARIANT.search(word):
            continue
        probability = 1.0
        if sounds and _PROBABILITY.fullmatch(sounds[0]):
            probability = float(sounds[0])
        while sounds and _PROBABILITY.fullmatch(sounds[0]):  # MFA has more, of silences
            del sounds[0]
        if not sounds:
            raise UserError(f"{file}:{number}: {word!r} has no phones after it")
        for odd in set(sounds) - phones if phones is not None else ():
            hint = near_miss(odd, PHONES)
            others = "; `tokens: train` takes any phones"
            raise UserError(f"{file}:{number}: {word!r} has an unknown phone {odd!r}{hint}{others}")
        key = _key(word)
        if key not in entries or probability > best[key]:
            entries[key] = unicodedata.normalize("NFC", " ".join(sounds))
            best[key] = probability
    return entries


def to_phones(
    examples: Sequence[Example],
    lexicons: Sequence[Path],
    phones: frozenset[str] | None = KNOWN,
) -> list[Example]:
    """The examples with their transcripts replaced by phones, separated by spaces.

    Word boundaries are not kept; `phones` as in `Lexicon`. Raises one UserError for all the words
    that no lexicon has: how many, and the first five.
    """
    lexicon = Lexicon(lexicons, phones)
    missing: dict[str, str] = {}  # word -> the first utterance that has it
    transcribed = []
    for example in examples:
        spoken = {word: lexicon(word) for word in example.target.split()}
        missing |= {w: example.id for w, p in spoken.items() if p is None and w not in missing}
        target = " ".join(spoken[word] or "" for word in example.target.split())
        transcribed.append(example._replace(target=target))
    if missing:
        first = ", ".join(f"{word} ({utterance})" for word, utterance in list(missing.items())[:5])
        raise UserError(
            f"{len(missing)} words are in none of the lexicons ({', '.join(map(str, lexicons))}), "
            f"first {first}; list a file with lines like `HELLO HH AH0 L OW1` as one more lexicon"
        )
    return transcribed
