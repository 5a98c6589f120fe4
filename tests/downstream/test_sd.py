"""Diarization: s3prl's head and loss, frames and seconds, DER against counting, calibration."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import medfilt

from downstream.base import Item, Part, Tally
from downstream.tasks import sd
from downstream.tasks.pit import RecurrentPIT
from downstream.tasks.segments import Segment, cut, diarization_errors, read, write
from tests.optional import optional
from upstream.common.errors import UserError

s3prl = optional("s3prl.downstream.diarization.model")
s3prl_utils = optional("s3prl.downstream.diarization.utils")

LABELS = sd.labels("superb", [])


@pytest.mark.parametrize(("dim", "size"), [(768, 2_626_562), (1024, 3_150_850), (240, 1_545_218)])
def test_sizes_are_superbs(dim: int, size: int) -> None:
    head = RecurrentPIT(13, dim, LABELS.size)
    assert sum(p.numel() for p in head.parameters()) - 13 == size


def test_head_loss_and_gradients_are_s3prls() -> None:
    torch.manual_seed(0)
    head, model = RecurrentPIT(1, 6, 2, hidden=8), s3prl.Model(6, 2, 1, 8)
    model.rnn.load_state_dict(head.lstm.state_dict())
    model.linear.load_state_dict(head.linear.state_dict())
    lens = torch.tensor([50, 31, 44])
    x = torch.randn(3, 50, 6) * (torch.arange(50) < lens[:, None])[:, :, None]
    segments = [
        [("a", 0.0, 0.5), ("b", 0.31, 1.0)],
        [("x", 0.2, 0.35), ("x", 0.3, 0.62)],
        [("b", 0.0, 0.1), ("a", 0.1, 0.9)],
    ]
    targets = [LABELS.encode(write(each)) for each in segments]
    labels = torch.zeros(3, 50, 2)
    for row, target in zip(labels, targets):
        for speaker, first, end in target:
            row[first:end, speaker] = 1
    ours, reference = head(x[None], lens), model(x)
    assert (ours - reference).abs().max() < 1e-6
    loss, (due, _, _) = (
        head.loss(ours, lens, targets),
        s3prl_utils.pit_loss(reference, labels, lens),
    )
    assert loss.item() == pytest.approx(due.item(), abs=1e-6)
    gradients = torch.autograd.grad(loss, [*head.lstm.parameters(), *head.linear.parameters()])
    expected = torch.autograd.grad(due, [*model.rnn.parameters(), *model.linear.parameters()])
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients, expected))


def test_padding_and_the_order_of_speakers_have_no_say() -> None:
    torch.manual_seed(0)
    head, lens = RecurrentPIT(2, 6, 2, hidden=8), torch.tensor([9, 4])
    x = torch.randn(2, 2, 9, 6)
    spoilt = x.clone()
    spoilt[:, 1, 4:] = 100.0
    targets = [[(0, 0, 3), (1, 5, 99)], [(1, 2, 4)]]
    swapped = [[(1 - who, *ends) for who, *ends in target] for target in targets]
    loss = head.loss(head(x, lens), lens, targets)
    assert torch.allclose(loss, head.loss(head(spoilt, lens), lens, swapped), atol=1e-6)
    said = head.predict(head(spoilt, lens), lens)
    assert [row.shape for row in said] == [(9, 2), (4, 2)]
    assert np.allclose(said[1], head.predict(head(x[:, 1:, :4], lens[1:]), lens[1:])[0], atol=1e-6)


def test_seconds_become_frames_as_numpys_rint_does() -> None:
    """0.35 s is 17.5 frames, and half goes to the even one."""
    target = write([("b", 0.35, 0.37), ("a", 0.49, 0.51)])
    assert LABELS.encode(target) == [(1, 18, 18), (0, 24, 26)]
    times = np.round(np.random.default_rng(0).uniform(0, 40, 2000), 2)
    expected = np.rint(times * 16000 / 320).astype(int).tolist()
    rows = LABELS.encode(write(("s", t, t + 1) for t in times.tolist()))
    assert [row[1] for row in rows] == expected


def test_decisions_become_segments_and_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        posteriors = rng.random((int(rng.integers(1, 60)), 2))
        active = np.zeros(posteriors.shape)
        for speaker, first, end in LABELS.encode(LABELS.decode(posteriors)):
            active[first:end, speaker] = 1
        hard = posteriors > 0.5
        if not hard[:, 0].any():  # speakers are numbered by who there is
            active = active[:, ::-1]
        assert (active == hard).all()
    assert LABELS.decode(np.zeros((5, 2))) == "[]"


# --- DER ------------------------------------------------------------------------------------------


def counted(reference: list[Any], hypothesis: list[Any], length: int) -> tuple[float, float]:
    """DER by looking at every hundredth of a second, all mappings tried."""

    def active(segments: list[Any]) -> dict[str, set[int]]:
        speakers: dict[str, set[int]] = {}
        for who, start, end in segments:
            speakers.setdefault(who, set()).update(range(round(100 * start), round(100 * end)))
        return speakers

    said, heard = active(reference), active(hypothesis)
    names = [*heard, *(f"none{i}" for i in range(len(said)))]
    best = min(
        sum(
            max(sum(t in s for s in said.values()), sum(t in h for h in heard.values()))
            - sum(t in said[a] and t in heard.get(b, ()) for a, b in zip(said, order))
            for t in range(length)
        )
        for order in itertools.permutations(names, len(said))
    )
    return best / 100, sum(map(len, said.values())) / 100


def some(rng: np.random.Generator, speakers: int, length: int) -> list[Any]:
    rows = []
    for _ in range(int(rng.integers(0, 6))):
        start, end = sorted(rng.choice(length + 1, 2, replace=False).tolist())
        rows.append((f"s{rng.integers(speakers)}", start / 100, end / 100))
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_der_is_what_counting_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, hypothesis = some(rng, 3, 60), some(rng, 3, 60)
    got = diarization_errors(write(reference), write(hypothesis))
    assert got == pytest.approx(counted(reference, hypothesis, 60), abs=1e-9)
    renamed = [(f"t{who}", *ends) for who, *ends in reversed(hypothesis)]
    assert diarization_errors(write(reference), write(renamed)) == pytest.approx(got, abs=1e-9)


def test_der_by_hand() -> None:
    def der(*hypothesis: Any) -> Tally:
        return diarization_errors(write([("a", 0, 4), ("b", 3, 6)]), write(hypothesis))

    assert der() == (7, 7)
    assert der(("1", 3, 6), ("2", 0, 4)) == (0, 7)
    assert der(("1", 0, 6)) == (3, 7)  # a second of overlap missed, two of b given to a
    assert der(("1", 0, 4), ("2", 3, 6), ("3", 8, 9)) == (1, 7)
    assert diarization_errors("[]", write([("1", 0, 2)])) == (2, 0)
    assert diarization_errors("[]", "[]") == (0, 0)


# --- targets --------------------------------------------------------------------------------------


def test_a_part_has_the_segments_inside_it() -> None:
    segments = read(write([("a", 0, 50), ("b", 45, 60), ("c", 10, 20)]))
    assert cut(segments, 40, 55) == [Segment("a", 0, 10), Segment("b", 5, 15)]
    assert read(sd.TASK.excerpt(write(segments), 40, 55)) == cut(segments, 40, 55)


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("LIGHTS ON", "does not say who speaks when"),
        ('{"trials": []}', "does not say who speaks when"),
        ('[["a", 1]]', "does not say who speaks when"),
        ('[["a", "x", 2]]', "does not say who speaks when"),
        ("3", "does not say who speaks when"),
        ('[["a", 2, 1]]', "'a' speaks from 2 to 1 s"),
        ('[["a", -1, 1]]', "'a' speaks from -1 to 1 s"),
        ('[["a", 0, NaN]]', "'a' speaks from 0 to nan s"),
        ('[["a", 0, Infinity]]', "'a' speaks from 0 to inf s"),
        (write([("a", 0, 1), ("b", 0, 1), ("c", 0, 1)]), r"3 speakers \(a, b, c\), 2 at most"),
    ],
)
def test_a_target_that_says_nothing_is_one_line(target: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        LABELS.unknown(target)
    assert "\n" not in str(caught.value)


# --- calibration and records ----------------------------------------------------------------------


def test_posteriors_reach_to_the_end_of_the_audio() -> None:
    """699 frames of 14 s of audio: what was going on in the last goes on in the missing one."""
    item = Item("r", "a + b", write([("a", 0, 14.0)]), 14.0)
    posteriors = np.tile(np.array([[0.9, 0.1]], dtype=np.float32), (699, 1))
    (record,) = sd.TASK.records([item], [posteriors], LABELS)
    assert json.loads(record.hypothesis) == [["1", 0.0, 14.0]]
    assert (record.errors, record.total) == (0, 14) and record.clusters == ("a", "b")


def test_threshold_and_median_are_those_with_the_lowest_der_on_dev() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(0, 2, (12, 2)), 25, axis=0).astype(float)
    posteriors = (0.25 + 0.3 * truth + rng.normal(0, 0.12, truth.shape)).astype(np.float32)
    item = Item("r", "a + b", LABELS.decode(truth), 6.0)
    asked = []

    def part(name: str) -> Part:
        asked.append(name)
        return Part([item], [posteriors])

    calibration = sd.TASK.calibrate(part, LABELS)
    errors = {}
    for threshold, median in itertools.product((0.3, 0.4, 0.5, 0.6, 0.7), (1, 11)):
        hard = medfilt((posteriors > threshold).astype(float), (median, 1))
        errors[threshold, median] = 100 * np.divide(
            *diarization_errors(item.target, LABELS.decode(hard))
        )
    best = min(errors, key=errors.__getitem__)
    assert best == (0.4, 11) and asked == ["dev"]
    assert calibration.chosen == {
        "threshold": 0.4, "median": 11, "dev": pytest.approx(errors[best]),
    }  # fmt: skip
    (record,) = sd.TASK.records([item], calibration.use([item], [posteriors]), LABELS)
    assert 100 * record.errors / record.total == pytest.approx(errors[best])
    assert sd.TASK.say(posteriors, LABELS, calibration.chosen) == record.hypothesis
