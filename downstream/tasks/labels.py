"""Targets as class indices: one label per utterance, or a sequence of CTC tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    def encode(self, target: str) -> list[int]:
        """The class index; UserError for a label that training never saw."""
        if target not in self.names:
            raise UserError(
                f"label {target!r} is in dev or test but not in train"
                f"{near_miss(target, self.names)}; add training utterances or drop the rows"
            )
        return [self.names.index(target)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.names[ids[0]]


@dataclass(frozen=True)
class Tokens:
    """A CTC vocabulary; symbol 0 is the blank. Every target ends with `eos`, as in s3prl."""

    symbols: tuple[str, ...]
    specials: frozenset[str]  # removed from a decoded hypothesis
    eos: str
    split: Callable[[str], list[str]]
    join: Callable[[Sequence[str]], str]
    unknown: str = "<unk>"
    closed: bool = False  # refuse a symbol outside the vocabulary instead of calling it unknown

    @property
    def size(self) -> int:
        return len(self.symbols)

    def encode(self, target: str) -> list[int]:
        """Token indices with the end token; UserError for a foreign symbol if `closed`."""
        index = {symbol: i for i, symbol in enumerate(self.symbols)}
        tokens = [*self.split(target), self.eos]
        for token in tokens:
            if self.closed and token not in index:
                raise UserError(
                    f"symbol {token!r} of {target!r} is not in the vocabulary; "
                    "write tokens: train to take the vocabulary from the training targets"
                )
        return [index.get(token, index[self.unknown]) for token in tokens]

    def decode(self, ids: Sequence[int]) -> str:
        return self.join([self.symbols[i] for i in ids if self.symbols[i] not in self.specials])
