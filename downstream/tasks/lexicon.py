"""Words to phones, for phoneme recognition: CMUdict and LibriSpeech lexicon files."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from downstream.base import Example
from downstream.corpora.common import read_text
from upstream.common.errors import UserError, near_miss

CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
# the 71 symbols of SUPERB's phoneme recognition: silence, spoken noise, vowels with their stress
PHONES = ("SIL", "SPN", *CONSONANTS, *(f"{vowel}{stress}" for vowel in VOWELS for stress in "012"))

_VARIANT = re.compile(r"\(\d+\)$")


class Lexicon:
    """Pronunciations from `files`, read in order: the first one of a word wins.

    A line is a word and its phones, separated by blanks or a tab. `word(2)` is a further
    pronunciation and is not used; `#` begins a comment, and so does `;;;`, as in older CMUdicts.
    Raises UserError for a line without phones and for a phone outside `PHONES`.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._phones: dict[str, str] = {}
        for file in files:
            for word, phones in _entries(file).items():
                self._phones.setdefault(word, phones)

    def __call__(self, word: str) -> str | None:
        """Phones of `word` (in any case), separated by spaces; None if no file has it."""
        return self._phones.get(word.upper())


@functools.lru_cache(maxsize=8)
def _entries(file: Path) -> dict[str, str]:
    """Upper-case word -> phones. Kept, because every split of a corpus asks for it again."""
    known = set(PHONES)
    entries: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        word, *sounds = line.partition("#")[0].split() or [""]
        if not word or word.startswith(";;;") or _VARIANT.search(word):
            continue
        if not sounds:
            raise UserError(f"{file}:{number}: {word!r} has no phones after it")
        if not known.issuperset(sounds):
            odd = next(sound for sound in sounds if sound not in known)
            hint = near_miss(odd, PHONES)
            raise UserError(f"{file}:{number}: {word!r} has an unknown phone {odd!r}{hint}")
        entries.setdefault(word.upper(), " ".join(sounds))
    return entries


def phones(text: str, lexicons: Sequence[Path]) -> str:
    """`text` as phones separated by spaces, without word boundaries. Raises UserError."""
    return _transcribe([("the text", text)], lexicons)[0]


def to_phones(examples: Sequence[Example], lexicons: Sequence[Path]) -> list[Example]:
    """The examples with their transcripts replaced by phones.

    Raises one UserError for all the words that no lexicon has: how many, and the first five.
    """
    targets = _transcribe([(example.id, example.target) for example in examples], lexicons)
    return [example._replace(target=target) for example, target in zip(examples, targets)]


def _transcribe(texts: Sequence[tuple[str, str]], lexicons: Sequence[Path]) -> list[str]:
    """Phones for each (utterance id, text)."""
    lexicon = Lexicon(lexicons)
    missing: dict[str, str] = {}  # word -> the first utterance that has it
    transcripts = []
    for utterance, text in texts:
        words = {word: lexicon(word) for word in text.split()}
        missing.update({w: utterance for w, p in words.items() if p is None and w not in missing})
        transcripts.append(" ".join(words[word] or "" for word in text.split()))
    if missing:
        first = ", ".join(f"{word} ({utterance})" for word, utterance in list(missing.items())[:5])
        raise UserError(
            f"{len(missing)} words are in none of the lexicons ({', '.join(map(str, lexicons))}), "
            f"first {first}; list a file with lines like `HELLO HH AH0 L OW1` as one more lexicon"
        )
    return transcripts
