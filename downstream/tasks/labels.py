"""Targets as class indices: one label per utterance, or a sequence of CTC tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from upstream.common.errors import UserError, near_miss


@dataclass(frozen=True)
class Classes:
    """One label per utterance; classes are the training labels in sorted order."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, _tokens: str, targets: Sequence[str]) -> Classes:
        return cls(tuple(sorted(set(targets))))

    @property
    def size(self) -> int:
        return len(self.names)

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def encode(self, target: str) -> list[int]:
        """The class index; UserError for a label that training never saw."""
        self.unknown(target)
        return [self.index[target]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.names[ids[0]]

    def unknown(self, target: str) -> list[str]:
        """None; UserError for a label that training never saw."""
        if target not in self.index:
            raise UserError(
                f"label {target!r} is in dev or test but not in train"
                f"{near_miss(target, self.names)}; add training utterances or drop the rows"
            )
        return []


@dataclass(frozen=True)
class Tokens:
    """A CTC vocabulary; symbol 0 is the blank. Every target ends with `eos`, as in s3prl."""

    symbols: tuple[str, ...]
    specials: frozenset[str]  # removed from a decoded hypothesis
    split: Callable[[str], list[str]]
    join: Callable[[Sequence[str]], str]
    eos: str = ""  # "": targets have no end token
    closed: bool = False  # refuse a symbol outside the vocabulary instead of calling it <unk>

    @property
    def size(self) -> int:
        return len(self.symbols)

    @cached_property
    def index(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    def encode(self, target: str) -> list[int]:
        """Token indices with the end token; UserError for a foreign symbol if `closed`."""
        self.unknown(target)
        tokens = self.split(target) + [self.eos] * bool(self.eos)
        return [self.index.get(token, self.index["<unk>"]) for token in tokens]

    def decode(self, ids: Sequence[int]) -> str:
        return self.join([self.symbols[i] for i in ids if self.symbols[i] not in self.specials])

    def unknown(self, target: str) -> list[str]:
        """Symbols outside the vocabulary; UserError for the first of them if `closed`."""
        foreign = [token for token in self.split(target) if token not in self.index]
        if foreign and self.closed:
            raise UserError(
                f"symbol {foreign[0]!r} of {target!r} is not in the vocabulary; "
                "write tokens: train to take the vocabulary from the training targets"
            )
        return foreign
