"""Names and texts that a stranger may have written, and paths that are nobody else's business.

A name in a record is checked once, when the record is read. Texts (transcripts, warnings, cards)
are kept as they are, and every renderer shows what cannot be seen by its code point.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from upstream.common import PROJECT

# control characters, marks that turn the direction of text, line separators, half characters
HIDDEN = re.compile(
    "[\0-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
LONGEST = 255  # characters of a name
LONGEST_PATH = 4096


def escaped(text: str, keep: str = "\n\t") -> str:
    """With hidden characters, but those in `keep`, as `\\x1b` or `\\u2028`: for a terminal."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return HIDDEN.sub(escape, text)


def read_name(name: Any, what: str, longest: int = LONGEST) -> str:
    """A name out of a record, hidden characters as their code points, so that it can be shown
    anywhere. Raises ValueError for what is no text or too long."""
    if not isinstance(name, str):
        raise ValueError(f"{what} is {name!r:.40}")
    if len(name) > longest:
        raise ValueError(f"{what} is {len(name)} characters long, at most {longest} are read")
    return escaped(name, keep="")


class Escaped:
    """A stream that shows what cannot be seen: texts of strangers cannot steer the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """As of a stream."""
        self.stream.write(escaped(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# a path from the root on, up to its last part, where one may begin
PARENTS = re.compile(r"(?<![\w./~$}*-])/(?!/)(?:[^/\s:,;'\"<>()\[\]{}|]+/)+")


def portable(value: Any, results: Path | None = None) -> Any:
    """`value`, nested as it may be, without absolute paths of this machine in its texts.

    A path below the results folder, the current folder or the project becomes relative to it; of
    any other absolute path only the last part stays. Two machines have other folders, and a user's
    name stands in many.
    """
    homes = [*([results] if results else []), Path.cwd(), PROJECT, Path(os.path.expanduser("~"))]
    starts = "|".join(re.escape(os.path.abspath(home).rstrip("/") + "/") for home in homes)
    near = re.compile(rf"(?<![\w./~$}}*-])(?:{starts})")

    def shorten(text: str) -> str:
        text = near.sub("", text) if "/" in text else text
        if text.startswith("/"):  # a path, which may hold blanks, and perhaps options
            path, colon, rest = text.partition(":")
            text = os.path.basename(path.rstrip("/")) + colon + rest
        return PARENTS.sub("", text)

    return _mapped(value, shorten)


def _mapped(value: Any, act: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return act(value)
    if isinstance(value, dict):
        return {key: _mapped(item, act) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, act) for item in value]
    return value


@contextmanager
def escaped_output() -> Iterator[None]:
    """Standard output as `Escaped` while the block runs."""
    import sys

    before = sys.stdout
    sys.stdout = cast(TextIO, Escaped(before))
    try:
        yield
    finally:
        sys.stdout = before
