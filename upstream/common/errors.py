"""The one exception for a user's mistake: a clear line, never a traceback."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

LONGEST = 2000  # characters of a line


class UserError(ValueError):
    """What is wrong, where, and how to mend it, in one line; `benchmark.py` exits with 2."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """`"; did you mean hubert_base?"`, or the full list if nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there is: {', '.join(known)}" if known else ""


def one_line(error: BaseException, more: str) -> str:
    """One line; of an error that nobody foresaw also where it arose, and `more` to report.

    A package that is missing, or that does not load, is foreseen wherever it is imported.
    """
    from upstream.common import packages  # which needs this module
    from upstream.common.text import escaped

    text = escaped(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    if line := packages.import_failure(error):
        return line
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unforeseen {type(error).__name__} at {Path(place.filename).name}:{place.lineno} "
        f"({text[:300]}); please report it, with {more}"
    )
