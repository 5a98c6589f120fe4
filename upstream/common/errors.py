"""The one exception for a user's mistake: a clear line, never a traceback."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

LONGEST = 2_000  # characters of a line
MOST = 40  # names that are listed


class UserError(ValueError):
    """What is wrong, where, and how to mend it, in one line; `benchmark.py` exits with 2."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """`"; did you mean hubert_base?"`, or the full list if nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    more = f" and {len(known) - MOST} more" if len(known) > MOST else ""
    return f"; there is: {', '.join(known[:MOST])}{more}" if known else ""


def bounded(text: str) -> str:
    """Text on one line; of a very long one the begin and the end."""
    line = " ".join(text.split())
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"


def one_line(error: BaseException, more: str) -> str:
    """One line; of an error that nobody foresaw also where it arose, and `more` to report.

    A package that is missing, or that does not load, is foreseen wherever it is imported.
    """
    from upstream.common import packages  # which needs this module
    from upstream.common.text import escaped

    text = escaped(bounded(str(error)))
    if isinstance(error, UserError):
        return text
    if line := packages.import_failure(error):
        return line
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unforeseen {type(error).__name__} at {Path(place.filename).name}:{place.lineno} "
        f"({text[:300]}); please report it, with {more}"
    )
