"""The words of the evaluation: Example, Count, Task, and the registries of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

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


class Labels(Protocol):
    """Between a target as text and the class indices a head is trained on."""

    @property
    def size(self) -> int: ...
    def encode(self, target: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Task:
    """What a task is, apart from its data: head, metric, and how targets become classes."""

    name: str
    head: str  # a name in HEADS
    metric: str  # a name in METRICS
    reduce: Literal["mean", "frames"]  # all the head needs: time means (exact), or every frame
    labels: Callable[[str, Sequence[str]], Labels]  # (`superb` or `train`, training targets)


# A corpus turns a folder into Examples: read(root, target, **options). `target` says which of its
# annotations the task wants (text, phones, speaker, emotion, or a manifest column).
Reader = Callable[..., list[Example]]
CORPORA: Registry[Reader] = Registry("corpus")

TASKS: Registry[Task] = Registry("task")
TASKS.add("asr", "downstream.asr:TASK", "speech recognition: characters, CTC, WER")
TASKS.add("pr", "downstream.pr:TASK", "phoneme recognition: phones, CTC, PER")
TASKS.add("sid", "downstream.sid:TASK", "speaker identification: one label, accuracy")
TASKS.add("er", "downstream.er:TASK", "emotion recognition: one label, accuracy, folds")
TASKS.add("classify", "downstream.sid:CLASSIFY", "any one label per utterance, accuracy")
