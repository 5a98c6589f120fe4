"""How much work something is, in a number that no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def calls(act: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are called while `act` runs in this thread."""
    count = 0

    def see(frame: Any, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count
