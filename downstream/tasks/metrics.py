"""How errors are counted in one utterance, and what records amount to, in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rapidfuzz.distance import Levenshtein

from downstream.base import METRICS, Count, Direction, Metric, Tally, Trial
from upstream.common.errors import UserError
from upstream.common.user_code import NAME

BOUNDED = ("accuracy", "frame_accuracy", "eer", "slot_f1", "slot_edit_f1")  # from 0 to 100
VIEWS = ("macro", "worst", "spread")  # mean of the groups, worst group, best minus worst


def wer(reference: str, hypothesis: str) -> Tally:
    """Word errors: edit distance between the words (split at any white space)."""
    return _edits(reference.split(), hypothesis.split())


def cer(reference: str, hypothesis: str) -> Tally:
    """Character errors: edit distance between the strings, spaces included.

    A character is a code point of NFC: vowel signs of Thai or Arabic count like letters.
    """
    return _edits(reference, hypothesis)


def per(reference: str, hypothesis: str) -> Tally:
    """Phone errors; an empty string is one (empty) token (s3prl downstream/ctc/metric.py)."""
    return _edits(reference.split(" "), hypothesis.split(" "))


def accuracy(reference: str, hypothesis: str) -> Tally:
    """One error where the label differs, out of one."""
    return Tally(float(reference != hypothesis), 1.0)


def error_rate(counts: Sequence[Count]) -> float:
    """Summed errors over summed total. Raises UserError if nothing was counted."""
    return 100 * _rate(counts)


def success_rate(counts: Sequence[Count]) -> float:
    """The rest to 100 per cent."""
    return 100 * (1 - _rate(counts))


def equal_error_rate(trials: Sequence[Trial]) -> float:
    """Where as many impostors are accepted as targets refused, on the ROC curve's straight pieces.

    The root of 1 - x - TPR(x), as s3prl's downstream/sv_voxceleb1 finds it. Raises UserError
    unless there are trials of both labels.
    """
    if len({t.label for t in trials}) < 2:
        raise UserError("EER needs trials of the same and of different speakers; check the labels")
    scores, labels = np.array([(t.score, t.label) for t in trials], dtype=float).T
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are accepted together
    hits, alarms = np.cumsum(labels[order])[last], np.cumsum(1 - labels[order])[last]
    tpr, fpr = np.append(0, hits / hits[-1]), np.append(0, alarms / alarms[-1])
    gap = 1 - fpr - tpr  # falls from 1 to -1 along the curve
    end = int(np.argmax(gap <= 0))
    share = gap[end - 1] / (gap[end - 1] - gap[end])
    return float(100 * (fpr[end - 1] + share * (fpr[end] - fpr[end - 1])))


def parted(name: str) -> tuple[str, str]:
    """`wer/worst` as the metric and the view on its groups; without a view `""`."""
    plain, _, view = name.rpartition("/")
    return (plain, view) if view in VIEWS else (name, "")


def of_result(name: str, better: Direction = "lower") -> Metric:
    """The metric that a result names, or a view on its groups, such as `wer/worst`.

    Reading a result runs no code: a user's metric is a ratio of sums, with `better` as it was.
    """
    plain, view = parted(name)
    if view:
        metric = of_result(plain, better)
        better = "lower" if view == "spread" else metric.better
        return replace(metric, name=name, label=f"{metric.label} {view}", better=better)
    if not NAME.fullmatch(name):
        return METRICS[name]
    label, rate = name.rpartition(":")[2], error_rate if better == "lower" else success_rate
    return Metric(name, label, better, rate)


def scale(name: str, better: Direction) -> tuple[float, float]:
    """From where to where a metric, or a view on its groups, can go, in per cent."""
    plain, view = parted(name)
    if plain in BOUNDED:
        return 0.0, 100.0
    return (0.0, math.inf) if better == "lower" or view == "spread" else (-math.inf, 100.0)


def _rate(counts: Sequence[Count]) -> float:
    total = sum(count.total for count in counts)
    if total <= 0:
        raise UserError("nothing to score: all references are empty; check the labels of the test")
    return sum(count.errors for count in counts) / total


def _edits(reference: Sequence[str], hypothesis: Sequence[str]) -> Tally:
    return Tally(float(Levenshtein.distance(reference, hypothesis)), float(len(reference)))


WER = Metric("wer", "WER", "lower", error_rate, wer)
CER = Metric("cer", "CER", "lower", error_rate, cer)
PER = Metric("per", "PER", "lower", error_rate, per)
ACCURACY = Metric("accuracy", "ACC", "higher", success_rate, accuracy)
EER = Metric("eer", "EER", "lower", equal_error_rate)
