"""How errors are counted in one utterance, and how the counts become a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import editdistance

from downstream.base import Tally
from upstream.common.errors import UserError
from upstream.common.registry import Registry

Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over utterances, in per cent.

    A metric for which higher is better counts errors all the same; only the displayed score is
    turned round, so that one kind of statistics serves every metric.
    """

    name: str
    label: str  # what a table prints
    count: Callable[[str, str], Tally]  # (reference, hypothesis) of one utterance
    better: Direction
    unit: str = "%"

    def improves(self, score: float, best: float) -> bool:
        """Whether `score` is strictly better than `best`, or `best` is NaN: the first one."""
        better = score > best if self.better == "higher" else score < best
        return better or best != best

    @property
    def arrow(self) -> str:
        """`↓` or `↑`: where better is."""
        return "↓" if self.better == "lower" else "↑"


def wer(reference: str, hypothesis: str) -> Tally:
    """Word errors: edit distance between the words (split at any white space)."""
    return _edits(reference.split(), hypothesis.split())


def cer(reference: str, hypothesis: str) -> Tally:
    """Character errors: edit distance between the strings, spaces included."""
    return _edits(reference, hypothesis)


def per(reference: str, hypothesis: str) -> Tally:
    """Phone errors, tokens split at each single space.

    As in s3prl `downstream/ctc/metric.py`, an empty string is therefore one (empty) token, which
    matters for empty references only.
    """
    return _edits(reference.split(" "), hypothesis.split(" "))


def accuracy(reference: str, hypothesis: str) -> Tally:
    """One error where the label differs, out of one."""
    return Tally(float(reference != hypothesis), 1.0)


def score(metric: Metric, errors: float, total: float) -> float:
    """Summed errors and total to a score in per cent. Raises UserError if nothing was counted."""
    if total <= 0:
        raise UserError(
            f"{metric.label} of nothing: all references are empty; check the labels of the test set"
        )
    rate = errors / total
    return 100 * (rate if metric.better == "lower" else 1 - rate)


def _edits(reference: Sequence[str], hypothesis: Sequence[str]) -> Tally:
    return Tally(float(editdistance.eval(reference, hypothesis)), float(len(reference)))


METRICS: Registry[Metric] = Registry("metric")
METRICS.add("wer", Metric("wer", "WER", wer, "lower"), "word error rate")
METRICS.add("cer", Metric("cer", "CER", cer, "lower"), "character error rate")
METRICS.add("per", Metric("per", "PER", per, "lower"), "phone error rate")
METRICS.add("accuracy", Metric("accuracy", "ACC", accuracy, "higher"), "share of right labels")
