"""The words of the evaluation: Example, Count, Task, and the registries of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from upstream.common.registry import Registry


class Example(NamedTuple):
    """One labelled utterance. `split` is train, dev or test, or a fold's name."""

    id: str
    path: str
    start: float | None  # seconds; None = from the beginning
    end: float | None  # seconds; None = to the end
    target: str  # a transcript, phones separated by spaces, or a label
    speaker: str
    split: str


class Tally(NamedTuple):
    """What a metric counts in one utterance: a score is sum(errors) / sum(total)."""

    errors: float
    total: float


class Count(NamedTuple):
    """A record, one line of predictions.jsonl: what a metric counted in one test utterance."""

    id: str
    speaker: str
    reference: str
    hypothesis: str
    errors: float
    total: float
    fold: str = ""  # "" for a task without folds
    metric: str = ""  # "" for the only metric of its task

    @property
    def cluster(self) -> str:
        """The unit that intervals are taken over: utterances of one fold share their heads."""
        return self.fold or self.speaker


class Trial(NamedTuple):
    """A record of a task that compares two utterances: verification, query by example."""

    id: str
    enrolment: str
    test: str
    score: float  # higher: more alike
    label: int  # 1: they belong together
    speaker: str
    fold: str = ""
    metric: str = ""

    @property
    def cluster(self) -> str:
        """As of Count; the speaker of the enrolment."""
        return self.fold or self.speaker


Record = Count | Trial


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
TASKS.add("asr", "downstream.tasks.asr:TASK", "speech recognition: characters, CTC, WER")
TASKS.add("pr", "downstream.tasks.pr:TASK", "phoneme recognition: phones, CTC, PER")
TASKS.add("sid", "downstream.tasks.sid:TASK", "speaker identification: one label, accuracy")
TASKS.add("er", "downstream.tasks.er:TASK", "emotion recognition: one label, accuracy, folds")
TASKS.add("classify", "downstream.tasks.sid:CLASSIFY", "any one label per utterance, accuracy")
