"""The words of the evaluation: Example, Item, Record, Metric, Task, and the registries of parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from upstream.common.errors import UserError, near_miss
from upstream.common.registry import Registry

if TYPE_CHECKING:
    from downstream.tasks.heads import Head

Direction = Literal["lower", "higher"]
AND = " + "  # between the names of several speakers of one recording, or of one comparison


class Example(NamedTuple):
    """One labelled utterance. `split` is train, dev or test (or several of them, with spaces
    between: audio that is searched or compared with), or a fold's name."""

    id: str
    path: str
    start: float | None  # seconds; None = from the beginning
    end: float | None  # seconds; None = to the end
    target: str  # what the task makes of it: a transcript, a label, trials, who speaks when
    speaker: str  # several, if more than one speaks: `a + b`
    split: str
    group: str = ""  # language, accent, microphone, ...: scores are also given group by group
    channel: int | None = None  # the one that is heard, counted from 0; None: the average of all


class Item(NamedTuple):
    """An utterance as a task sees it: an Example without its audio and split."""

    id: str
    speaker: str
    target: str  # as the task normalises it
    seconds: float = 0.0
    group: str = ""


class Tally(NamedTuple):
    """What a metric counts in one utterance: a score is sum(errors) / sum(total)."""

    errors: float
    total: float


def listing(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and that there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _clusters(fold: str, speaker: str) -> tuple[str, ...]:
    """The fold, whose utterances share their heads, or where there are none the speakers."""
    return (fold,) if fold else tuple(speaker.split(AND))


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
    group: str = ""

    @property
    def clusters(self) -> tuple[str, ...]:
        """The units that intervals are taken over."""
        return _clusters(self.fold, self.speaker)


class Trial(NamedTuple):
    """A record of a task that compares two utterances: verification, query by example."""

    id: str
    enrolment: str
    test: str
    score: float  # higher: more alike
    label: int  # 1: they belong together
    speaker: str  # of both, if they differ: `a + b`
    fold: str = ""
    metric: str = ""
    group: str = ""

    @property
    def clusters(self) -> tuple[str, ...]:
        """As of a Count."""
        return _clusters(self.fold, self.speaker)


Record = Count | Trial


def record(fields: Mapping[str, Any]) -> Record:
    """A line of predictions.jsonl as the record it was. Raises TypeError or ValueError for other
    fields, values of other types and half a character."""
    line = Trial(**fields) if "enrolment" in fields else Count(**fields)
    value: Any
    for name, value in zip(line._fields, line):
        if name not in NUMBERS:
            str.encode(value)
        elif type(value) not in (int, float) or not math.isfinite(value):
            raise TypeError(f"{name} is {value!r:.40}")
    return line


NUMBERS = {"errors", "total", "score", "label"}  # fields of records


@dataclass(frozen=True)
class Metric:
    """What records amount to. Where higher is better, errors are counted all the same."""

    name: str
    label: str  # what a table prints
    better: Direction
    score: Callable[[Sequence[Any]], float]  # records of one fold -> per cent
    count: Callable[[str, str], Tally] | None = None  # (reference, hypothesis) of one utterance
    # records -> the score of those that a mask keeps, to score often without some of them
    kept: Callable[[Sequence[Any]], Callable[[Any], float]] | None = None

    def improves(self, score: float, best: float) -> bool:
        """Whether `score` is strictly better than `best`, or `best` is NaN: the first one."""
        better = score > best if self.better == "higher" else score < best
        return better or best != best

    @property
    def arrow(self) -> str:
        """`↓` or `↑`: where better is."""
        return "↓" if self.better == "lower" else "↑"


@dataclass(frozen=True)
class Labels:
    """Between a target as text and the class indices a head is trained on."""

    symbols: tuple[str, ...]  # by class index; symbol 0 is the blank of CTC
    split: Callable[[str], list[str]] = lambda target: [target]
    join: Callable[[Sequence[str]], str] = "".join
    specials: frozenset[str] = frozenset()  # removed from what is decoded
    eos: str = ""  # ends every target, as in s3prl; "": nothing does
    refusal: str = ""  # says that a symbol ({!r}) is outside; "": it counts as <unk>
    sizes: tuple[int, ...] = ()  # of several questions, how many classes answer each; (): one
    frame: float = 0.02  # seconds of a frame, for targets that say when

    @property
    def size(self) -> int:
        return len(self.symbols)

    @cached_property
    def index(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    def encode(self, target: str) -> list[Any]:
        """Class indices with the end symbol. Raises UserError like `unknown`."""
        self.unknown(target)
        tokens = self.split(target) + [self.eos] * bool(self.eos)
        return [self.index[token if token in self.index else "<unk>"] for token in tokens]

    def decode(self, ids: Sequence[int]) -> str:
        return self.join([self.symbols[i] for i in ids if self.symbols[i] not in self.specials])

    def unknown(self, target: str) -> list[str]:
        """Symbols that have no class of their own; UserError for the first if they are refused."""
        foreign = [token for token in self.split(target) if token not in self.index]
        if foreign and self.refusal:
            hint = near_miss(foreign[0], self.symbols)
            raise UserError(f"{self.refusal.format(foreign[0])}{hint}")
        return foreign


class Part(NamedTuple):
    """A split with what the head predicts of it, or without a head its features.

    outputs: read when they are asked for, item by item: [L, D] means or [L, T, D] frames.
    """

    items: list[Item]
    outputs: Sequence[Any]


class Calibration(NamedTuple):
    """What is settled after training, without a look at the test set.

    use: makes of a Part's items and outputs the outputs that `Task.records` takes.
    """

    chosen: dict[str, Any] = {}  # for score.json: plain values
    use: Callable[[Sequence[Item], Sequence[Any]], Sequence[Any]] = lambda items, outputs: outputs


@dataclass(frozen=True)
class Task:
    """What a task is, apart from its data: features, head, labels, records and scores.

    A task that compares utterances overrides `records`; nothing else knows how many records an
    utterance makes. One with something to settle on dev (a threshold, a layer), or that learns
    without a head, overrides `calibrate`.
    """

    name: str
    features: Literal["mean", "frames"]  # all the head needs: time means (exact), or every frame
    head: str | None  # a name in HEADS; None: nothing is trained, outputs are the features
    metrics: tuple[str, ...]  # names in METRICS; the first selects on dev
    labels: Callable[[str, Sequence[str]], Labels]  # (`superb` or `train`, training targets)
    normalised: Callable[[str], str] = str  # a target as it is trained on and compared with
    needs: tuple[str, ...] = ("train", "dev", "test")  # splits that must not be empty

    @property
    def metric(self) -> Metric:
        """The metric that selects on dev and that tables show."""
        return METRICS.named(self.metrics[0])

    def excerpt(self, target: str, start: float, end: float) -> str:
        """The target of a crop, `start` to `end` in seconds: usually that of the whole."""
        return target

    def last_second(self, target: str) -> float:
        """Until when a target speaks of its audio, in seconds; 0 for one without times."""
        return 0.0

    def doubts(self, items: Sequence[Item]) -> list[str]:
        """What is odd about a split, train too, that can be used all the same: a line each."""
        return []

    def admits(self, metric: Metric) -> bool:
        """Whether a metric that a recipe names can score the records: here it compares texts."""
        return metric.count is not None

    def check(self, items: Sequence[Item]) -> None:
        """Before any training: whether `records` can be made of a whole split, dev or test.

        Raises UserError, the fault and its cure, for one that cannot be scored.
        """

    def calibrate(self, part: Callable[[str], Part], labels: Labels) -> Calibration:
        """What the trained head, or the bare features, need beside; part: of "train" and "dev"."""
        return Calibration()

    def records(
        self, items: Sequence[Item], outputs: Sequence[Any], labels: Labels
    ) -> list[Record]:
        """One Count per utterance and metric; `outputs` are what the head predicts of each item
        (class indices), after training as calibrated.
        """
        several, counts = len(self.metrics) > 1, list[Record]()
        for item, output in zip(items, outputs):
            hypothesis = labels.decode(output)
            for name in self.metrics:
                count = METRICS.named(name).count
                assert count is not None, f"{name} does not compare texts"
                tally = count(item.target, hypothesis)
                metric = name if several else ""
                said = (item.id, item.speaker, item.target, hypothesis)
                counts.append(Count(*said, *tally, metric=metric, group=item.group))
        return counts

    def say(self, output: Any, labels: Labels, chosen: Mapping[str, Any]) -> str:
        """What a head predicts of audio without a reference, for people; chosen: on dev."""
        return labels.decode(output)

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Metric -> per cent; with folds the unweighted mean over them."""
        scores = {}
        for name in self.metrics:
            folds: dict[str, list[Record]] = {}
            for line in records:
                if line.metric in ("", name):
                    folds.setdefault(line.fold, []).append(line)
            each = [METRICS.named(name).score(fold) for fold in folds.values()]
            scores[name] = sum(each) / len(each)
        return scores


# A corpus turns a folder into Examples: read(root, target, **options). `target` says which of its
# annotations the task wants (text, phones, speaker, emotion, or a manifest column). One with a
# parameter `results` is given the results folder, for files that it has to write.
Reader = Callable[..., Iterable[Example]]
CORPORA: Registry[Reader] = Registry("corpus")

HEADS: Registry[Callable[..., Head]] = Registry("head")
HEADS.add("utterance", "downstream.tasks.heads:Utterance", "linear, mean, linear (SID, ER, KS, IC)")
HEADS.add("frame_ctc", "downstream.tasks.heads:FrameCTC", "two linear layers on every frame (PR)")
HEADS.add("recurrent_ctc", "downstream.tasks.heads:RecurrentCTC", "linear, BiLSTMs (ASR, SF)")
HEADS.add("xvector", "downstream.tasks.xvector:XVector", "TDNN, statistics, AM-softmax (ASV)")
HEADS.add("frame_labels", "downstream.tasks.frame_labels:FrameLabels", "linear, every frame (PC)")
HEADS.add("recurrent_pit", "downstream.tasks.pit:RecurrentPIT", "an LSTM for two speakers (SD)")

METRICS: Registry[Metric] = Registry("metric")
METRICS.add("wer", "downstream.tasks.metrics:WER", "word error rate")
METRICS.add("cer", "downstream.tasks.metrics:CER", "character error rate")
METRICS.add("per", "downstream.tasks.metrics:PER", "phone error rate")
METRICS.add("accuracy", "downstream.tasks.metrics:ACCURACY", "share of right labels")
METRICS.add(
    "frame_accuracy", "downstream.tasks.pc:FRAME_ACCURACY", "share of frames that are right"
)
METRICS.add("slot_f1", "downstream.tasks.slots:SLOT_F1", "mean F1 of the slots in an utterance")
METRICS.add("slot_cer", "downstream.tasks.slots:SLOT_CER", "character error rate within slots")
METRICS.add("slot_wer", "downstream.tasks.slots:SLOT_WER", "word error rate within slots")
METRICS.add("slot_edit_f1", "downstream.tasks.slots:SLOT_EDIT_F1", "F1 of slots with their values")
METRICS.add("eer", "downstream.tasks.metrics:EER", "equal error rate of trials")
METRICS.add("der", "downstream.tasks.segments:DER", "diarization error rate")
METRICS.add("mtwv", "downstream.tasks.twv:MTWV", "maximum term-weighted value of trials")
METRICS.add("mtwv_superb", "downstream.tasks.twv:SUPERB", "the same on all of QUESST 2014")

TASKS: Registry[Task] = Registry("task")
TASKS.add("asr", "downstream.tasks.asr:TASK", "speech recognition: characters, CTC, WER")
TASKS.add("asr_ted", "downstream.tasks.asr:TED", "the same as Speech-FT fine-tunes it: CER")
TASKS.add("pr", "downstream.tasks.pr:TASK", "phoneme recognition: phones, CTC, PER")
TASKS.add("sid", "downstream.tasks.sid:TASK", "speaker identification: one label, accuracy")
TASKS.add("ks", "downstream.tasks.ks:TASK", "keyword spotting: 12 classes, accuracy")
TASKS.add("ic", "downstream.tasks.ic:TASK", "intents: several answers, all right or none, accuracy")
TASKS.add("sf", "downstream.tasks.sf:TASK", "slot filling: characters and slots, CTC, F1 and CER")
TASKS.add("er", "downstream.tasks.er:TASK", "emotion recognition: one label, accuracy, folds")
TASKS.add("classify", "downstream.tasks.sid:CLASSIFY", "any one label per utterance, accuracy")
TASKS.add("asv", "downstream.tasks.asv:TASK", "speaker verification: x-vectors, trials, EER")
TASKS.add("sd", "downstream.tasks.sd:TASK", "diarization of two speakers: LSTM, DER")
TASKS.add(
    "pc", "downstream.tasks.pc:TASK", "phone classification: segments, linear, frame accuracy"
)
TASKS.add("qbe", "downstream.tasks.qbe:TASK", "query by example: DTW, nothing trained, MTWV")
TASKS.add("probe", "downstream.tasks.probe:TASK", "any one label, a closed-form linear classifier")
TASKS.add("knn", "downstream.tasks.probe:KNN", "any one label, that of the nearest neighbours")
