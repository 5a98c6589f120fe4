"""One generic, typed registry for upstreams, tasks, corpora, heads and merging methods."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

from upstream.common import user_code
from upstream.common.errors import UserError, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things. A lazy entry (`"module:attribute"`) is imported when it is asked for.

    >>> CORPORA: Registry[Reader] = Registry("corpus")
    >>> @CORPORA.register("manifest", about="any CSV/TSV/JSONL")
    ... def read(root, target): ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}
        self._about: dict[str, str] = {}

    def add(self, name: str, entry: T | str, about: str = "") -> None:
        """Register `entry`, or the place to import it from. Raises ValueError on a duplicate."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry
        self._about[name] = about

    def register(self, name: str, about: str = "") -> Callable[[T], T]:
        """Decorator form of `add`; without `about`, the first docstring line is used."""

        def decorate(entry: T) -> T:
            doc = (entry.__doc__ or "").strip().splitlines()
            self.add(name, entry, about or (doc[0] if doc else ""))
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        """The entry; UserError with the near match if there is none."""
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}{near_miss(name, self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(T, getattr(importlib.import_module(module), attribute))
            self._entries[name] = entry
        return entry

    def named(self, name: Any) -> T:
        """The same for a name that the user wrote: it may be one of a user's file, which is run.

        What is read from a result, a checkpoint or its config never comes here. UserError.
        """
        if not isinstance(name, str):
            raise UserError(f"a {self.kind} is named by text, not {name!r:.60}")
        return cast(T, user_code.thing(name)) if user_code.NAME.fullmatch(name) else self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def is_unloaded(self, name: str) -> bool:
        """Whether this is a lazy entry that nobody has asked for."""
        return isinstance(self._entries.get(name), str)

    def about(self, name: str) -> str:
        """One line on what the entry is."""
        return self._about[name]
