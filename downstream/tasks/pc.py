"""PC, phone classification: which phone every frame belongs to, by segments in seconds.

Source: s3prl downstream/timit_phone_linear (39 phones, labels every 10 ms); Speech-FT fine-tunes
on it. Here a frame is the upstream's own and has the label of its middle. Targets are written like
those of diarization (segments.py): `[["aa", 0.0, 0.12], ...]`, in a column of a manifest or with
its `rttm` (then name a column of speakers too). Any labels in time will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from downstream.base import Count, Item, Labels, Metric, Record
from downstream.tasks.frame_labels import UNLABELLED
from downstream.tasks.metrics import success_rate
from downstream.tasks.segments import RATE, Segment, Timed, read, write
from upstream.common.errors import UserError

FOREIGN = -1  # a label that training did not have: never right
FRAME_ACCURACY = Metric("frame_accuracy", "FRAME ACC", "higher", success_rate)


class Phones(Labels):
    """Between labelled segments in seconds and classes of frames."""

    def unknown(self, target: str) -> list[str]:
        """Labels that training did not have. Raises UserError for two at the same time."""
        segments = sorted(read(target), key=lambda segment: segment.start)
        for one, two in itertools.pairwise(segments):
            if two.start < one.end:
                both = f"{one.speaker!r} and {two.speaker!r} at {two.start:g} s"
                raise UserError(f"{both}: a frame has one label; mend the segments")
        return [label for label, _, _ in segments if label not in self.index]

    def encode(self, target: str) -> list[Any]:
        """(class, first frame, frame after the last) of each segment, by way of samples."""
        hop = round(RATE * self.frame, 6)
        return [
            (self.index.get(label, FOREIGN), round(a * RATE / hop), round(b * RATE / hop))
            for label, a, b in read(target)
        ]

    def decode(self, ids: Any) -> str:
        """A target from the class of each frame."""
        changes = np.flatnonzero(np.diff(ids, prepend=FOREIGN, append=FOREIGN)).tolist()
        runs = itertools.pairwise(changes)
        return write((self.symbols[ids[a]], a * self.frame, b * self.frame) for a, b in runs)


class Frames(Timed):
    """Outputs are the class of each frame."""

    def admits(self, metric: Metric) -> bool:
        return metric is FRAME_ACCURACY

    def records(
        self, items: Sequence[Item], outputs: Sequence[Any], labels: Labels
    ) -> list[Record]:
        """Wrong frames out of the labelled ones. Where the audio goes on after the last frame, so
        does its class: an utterance has as many frames however an upstream ends."""
        counts = list[Record]()
        for item, ids in zip(items, outputs):
            size = int(round(item.seconds / labels.frame, 6)) or len(ids)
            heard: Any = np.pad(ids, (0, max(0, size - len(ids))), "edge")[:size]
            right = _rows(labels.encode(item.target), size)
            labelled = right != UNLABELLED
            tally = (float((heard != right)[labelled].sum()), float(labelled.sum()))
            said = (item.id, item.speaker, item.target, labels.decode(heard))
            counts.append(Count(*said, *tally, group=item.group))
        return counts


def _rows(segments: Sequence[tuple[int, int, int]], size: int) -> NDArray[np.int64]:
    right = np.full(size, UNLABELLED)
    for number, first, end in segments:
        right[first:end] = number
    return right


def labels(_tokens: str, targets: Sequence[str]) -> Labels:
    """The labels of the training segments."""
    said: list[Segment] = [segment for target in targets for segment in read(target)]
    return Phones(tuple(sorted({segment.speaker for segment in said})))


TASK = Frames("pc", "frames", "frame_labels", ("frame_accuracy",), labels)
