"""Who speaks when, as an utterance's target, and how wrong a guess at it is: DER.

A target is a JSON list of [speaker, start, end] in seconds from the beginning of the utterance's
audio. Segments of different speakers may overlap; those of one speaker count as their union.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from downstream.base import Labels, Metric, Tally, Task
from downstream.tasks.metrics import error_rate
from upstream.common.errors import UserError

RATE = 16000  # samples a second
BEYOND = 0.5  # seconds; times are often rounded up a little past the end of the audio
OTHER_UNIT = 100  # times as long as the audio: milliseconds or samples


class Segment(NamedTuple):
    speaker: str
    start: float  # seconds
    end: float


def write(segments: Iterable[tuple[str, float, float]]) -> str:
    """A target; times are rounded to a tenth of a millisecond."""
    rows = [[speaker, round(start, 4), round(end, 4)] for speaker, start, end in segments]
    return json.dumps(rows, ensure_ascii=False)


def read(target: str) -> list[Segment]:
    """The segments of a target. Raises UserError for anything else, and for times that are none."""
    try:
        segments = [Segment(str(who), float(a), float(b)) for who, a, b in json.loads(target)]
    except (ValueError, TypeError) as error:
        due = '[["speaker", start, end], ...] in seconds'
        raise UserError(f"the target {target!r:.60} does not say who speaks when: {due}") from error
    for who, start, end in segments:
        if not 0 <= start < end < math.inf:
            raise UserError(f"{who!r} speaks from {start:g} to {end:g} s: not a stretch of time")
    return segments


def cut(segments: Iterable[Segment], start: float, end: float) -> list[Segment]:
    """What is said between `start` and `end`, in seconds from `start`."""
    inside = [Segment(s.speaker, max(s.start, start), min(s.end, end)) for s in segments]
    return [Segment(s.speaker, s.start - start, s.end - start) for s in inside if s.start < s.end]


class Speakers(Labels):
    """Between who speaks when in seconds and in frames; symbols are what speakers are called."""

    def unknown(self, target: str) -> list[str]:
        """Nothing is; UserError for more speakers than the head can tell apart."""
        speakers = sorted({segment.speaker for segment in read(target)})
        if len(speakers) > self.size:
            fault = f"{len(speakers)} speakers ({', '.join(speakers[:3])}), {self.size} at most"
            raise UserError(f"{fault}: leave the recording out, or take a part without the others")
        return []

    def encode(self, target: str) -> list[Any]:
        """(speaker by number, first frame, frame after the last) of each segment.

        By way of samples, as in s3prl: 0.35 s are 17.5 frames of 0.02 s, which floats may miss.
        """
        said = read(target)
        number = {who: k for k, who in enumerate(sorted({s.speaker for s in said}))}
        hop = round(RATE * self.frame, 6)
        return [(number[who], round(a * RATE / hop), round(b * RATE / hop)) for who, a, b in said]

    def decode(self, ids: Any) -> str:
        """A target from [T, speakers] posteriors or decisions of 0 and 1; times as in an RTTM."""
        found = []
        for who, active in zip(self.symbols, (np.asarray(ids) > 0.5).T):
            changes = np.flatnonzero(np.diff(active, prepend=False, append=False))
            times = [round(float(change) * self.frame, 2) for change in changes]
            found += [(who, *ends) for ends in zip(times[::2], times[1::2]) if ends[0] < ends[1]]
        return write(found)


def decided(posteriors: Any, threshold: float = 0.5, median: int = 1, **_: Any) -> Any:
    """1 where a speaker speaks, else 0, of the majority of `median` frames around each."""
    from scipy.ndimage import median_filter  # 0.1 s

    hard = (posteriors > threshold).astype(np.float32)
    return median_filter(hard, (median, 1), mode="constant")


class Timed(Task):
    """A task whose targets are segments."""

    def excerpt(self, target: str, start: float, end: float) -> str:
        return write(cut(read(target), start, end))

    def last_second(self, target: str) -> float:
        return max((segment.end for segment in read(target)), default=0.0)


def require_inside(name: str, last: float, seconds: float) -> None:
    """Raises UserError for times that go on until `last`, behind the end of `name`'s audio."""
    if last <= seconds + BEYOND:
        return
    cure = "are these the times of another recording?"
    if last > OTHER_UNIT * seconds:
        cure = "times are in seconds: are these milliseconds or samples?"
    raise UserError(f"{name}: speech until {last:g} s in {seconds:.2f} s of audio; {cure}")


def diarization_errors(reference: str, hypothesis: str) -> Tally:
    """Missed, false and confused speaker time in seconds, out of the reference's speaker time.

    NIST's definition (md-eval, as dscore runs it for s3prl) without a collar and with overlapped
    speech: the one-to-one mapping of speakers that agrees longest; where m speak and n are heard,
    max(m, n) less those that agree are errors.
    """
    from scipy.optimize import linear_sum_assignment  # 0.1 s

    said, heard = read(reference), read(hypothesis)
    times = np.unique([time for s in said + heard for time in (s.start, s.end)])
    seconds, right, guess = np.diff(times), _active(said, times), _active(heard, times)
    together = (right * seconds) @ guess.T
    agreed = together[linear_sum_assignment(together, maximize=True)].sum()
    errors = seconds @ np.maximum(right.sum(0), guess.sum(0)) - agreed
    return Tally(max(0.0, float(errors)), float(seconds @ right.sum(0)))


def _active(segments: Sequence[Segment], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """[speakers, stretches between the times] of 1 where the speaker speaks and else 0."""
    speakers = {speaker: row for row, speaker in enumerate(sorted({s.speaker for s in segments}))}
    active = np.zeros((len(speakers), max(0, len(times) - 1)))
    for speaker, start, end in segments:
        first, last = np.searchsorted(times, (start, end))
        active[speakers[speaker], first:last] = 1
    return active


DER = Metric("der", "DER", "lower", error_rate, diarization_errors)
