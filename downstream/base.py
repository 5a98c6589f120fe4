"""The words of the evaluation: Example, Count, Task, and the registries of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from upstream.registry import Registry


class Example(NamedTuple):
    """One labelled utterance. `split` is train, dev or test, or a fold's name."""

    id: str
    path: str
    start: float | None  # seconds; None = from the beginning
    end: float | None  # seconds; None = to the end
    target: str  # a transcript, phones separated by spaces, or a label
    speaker: str
    split: str


class Count(NamedTuple):
    """What a metric counts in one utterance: a score is sum(errors) / sum(total)."""

    errors: float
    total: float


# A corpus turns a folder into Examples: read(root, target, **options). `target` says which of its
# annotations the task wants (text, phones, speaker, emotion, or a manifest column).
Reader = Callable[..., list[Example]]
CORPORA: Registry[Reader] = Registry("corpus")
