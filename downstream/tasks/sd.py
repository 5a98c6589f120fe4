"""SD as SUPERB does it: who of two speakers speaks when, also both at once; LSTM, PIT, DER.

Source: s3prl downstream/diarization, with dscore (collar 0, overlap scored). Threshold and median
filter are chosen here by the DER on dev, there by the lowest on test; the dev DER also chooses the
step and the learning rate, there the frame accuracy does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from downstream.base import Calibration, Item, Labels, Part, Record, Task
from downstream.tasks.segments import cut, read, write
from upstream.common.errors import UserError

__all__ = ["TASK", "cut", "read", "write"]

THRESHOLDS, MEDIANS = (0.5, 0.4, 0.6, 0.3, 0.7), (1, 11)  # of equals the first is chosen


class Speakers(Labels):
    """Between who speaks when in seconds and in frames."""

    def unknown(self, target: str) -> list[str]:
        """Nothing is; UserError for more speakers than the head can tell apart."""
        speakers = sorted({segment.speaker for segment in read(target)})
        if len(speakers) > self.size:
            fault = f"{len(speakers)} speakers ({', '.join(speakers[:3])}), {self.size} at most"
            raise UserError(f"{fault}: leave the recording out, or take a part without the others")
        return []

    def encode(self, target: str) -> list[Any]:
        """(speaker by number, first frame, frame after the last) of each segment."""
        segments = read(target)
        number = {who: k for k, who in enumerate(sorted({s.speaker for s in segments}))}
        return [
            (number[who], *(round(time * 16000 / (16000 * self.frame)) for time in (start, end)))
            for who, start, end in segments
        ]  # via samples, as in s3prl: 0.35 s is 17.5 frames of 0.02 s, which floats are not sure of

    def decode(self, ids: Any) -> str:
        """A target from [T, speakers] posteriors, or decisions of 0 and 1; times as in an RTTM."""
        found = []
        for who, active in zip(self.symbols, (np.asarray(ids) > 0.5).T):
            changes = np.flatnonzero(np.diff(active, prepend=False, append=False))
            times = [round(float(change) * self.frame, 2) for change in changes]
            found += [(who, *ends) for ends in zip(times[::2], times[1::2]) if ends[0] < ends[1]]
        return write(found)


class Diarization(Task):
    """Posteriors are extended to the end of the audio, where the upstream has no frame of its own,
    by repeating the last one (s3prl repeats its feature)."""

    def excerpt(self, target: str, start: float, end: float) -> str:
        return write(cut(read(target), start, end))

    def records(
        self, items: Sequence[Item], outputs: Sequence[Any], labels: Labels
    ) -> list[Record]:
        return super().records(items, [*map(_extended(labels), items, outputs)], labels)

    def calibrate(self, part: Callable[[str], Part], labels: Labels) -> Calibration:
        """The threshold and the width of the median filter with the lowest DER on dev."""

        def decide(
            items: Sequence[Item], outputs: Sequence[Any], threshold: float, median: int
        ) -> list[Any]:
            from scipy.ndimage import median_filter  # 0.1 s

            whole = map(_extended(labels), items, outputs)
            hard = [(posteriors > threshold).astype(np.float32) for posteriors in whole]
            return [median_filter(x, (median, 1), mode="constant") for x in hard]

        items, outputs = part("dev")
        errors = {
            (threshold, median): self.score(
                self.records(items, decide(items, outputs, threshold, median), labels)
            )[self.metrics[0]]
            for median, threshold in itertools.product(MEDIANS, THRESHOLDS)
        }
        threshold, median = min(errors, key=errors.__getitem__)
        chosen = {"threshold": threshold, "median": median, "dev": errors[threshold, median]}
        return Calibration(chosen, lambda items, outputs: decide(items, outputs, threshold, median))


def _extended(labels: Labels) -> Callable[[Item, Any], Any]:
    """What makes [T, speakers] as many frames as the audio has."""

    def extended(item: Item, output: Any) -> Any:
        missing = round(item.seconds / labels.frame, 6) // 1 - len(output)
        return np.pad(output, ((0, max(0, int(missing))), (0, 0)), "edge")

    return extended


def labels(_tokens: str, _targets: Sequence[str]) -> Labels:
    """Two speakers, whatever they are called: their order means nothing."""
    return Speakers(("1", "2"))


TASK = Diarization("sd", "frames", "recurrent_pit", ("der",), labels)
