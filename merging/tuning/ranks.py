"""Several processes that train one upstream, and who does what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Share(NamedTuple):
    """One of `parts` equal shares of any sequence: every so manieth, from `first` on."""

    first: int = 0
    parts: int = 1

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """What is in the share."""
        return items[self.first :: self.parts]


ALL = Share()
