"""SD as SUPERB does it: who of two speakers speaks when, also both at once; LSTM, PIT, DER.

Source: s3prl downstream/diarization, with dscore (collar 0, overlap scored). Here the DER on dev
chooses threshold and median filter (there the lowest on test), step and rate (frame accuracy).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from downstream.base import Calibration, Item, Labels, Part, Record
from downstream.tasks.segments import Speakers, Timed, decided

THRESHOLDS, MEDIANS = (0.5, 0.4, 0.6, 0.3, 0.7), (1, 11)  # frames; of equals the first is chosen


class Diarization(Timed):
    """Outputs are posteriors [T, speakers], once calibrated decisions of 0 and 1."""

    def records(
        self, items: Sequence[Item], outputs: Sequence[Any], labels: Labels
    ) -> list[Record]:
        """What is decided for the last frame holds to the end of the audio, as s3prl repeats it."""
        sizes = (int(round(item.seconds / labels.frame, 6)) for item in items)
        missing = (max(0, size - len(x)) for size, x in zip(sizes, outputs))
        whole = [np.pad(x, ((0, more), (0, 0)), "edge") for x, more in zip(outputs, missing)]
        return super().records(items, whole, labels)

    def calibrate(self, part: Callable[[str], Part], labels: Labels) -> Calibration:
        """The threshold and the width of the median filter with the lowest DER on dev."""
        items, outputs = part("dev")
        tried: list[dict[str, Any]] = []
        for median, threshold in itertools.product(MEDIANS, THRESHOLDS):
            chosen: dict[str, Any] = {"threshold": threshold, "median": median}
            records = self.records(items, [decided(x, **chosen) for x in outputs], labels)
            tried.append({**chosen, "dev": self.score(records)[self.metrics[0]]})
        best = min(tried, key=lambda each: each["dev"])
        return Calibration(best, lambda items, outputs: [decided(x, **best) for x in outputs])

    def say(self, output: Any, labels: Labels, chosen: Mapping[str, Any]) -> str:
        """Who speaks when: [["1", start, end], ...] in seconds."""
        return labels.decode(decided(output, **chosen))


def labels(_tokens: str, _targets: Sequence[str]) -> Labels:
    """Two speakers, whatever they are called: their order means nothing."""
    return Speakers(("1", "2"))


TASK = Diarization("sd", "frames", "recurrent_pit", ("der",), labels)
