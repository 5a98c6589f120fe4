"""Training heads: the stream, selection on dev, resuming, and that something is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from downstream import recipe
from downstream.base import Example, Item
from downstream.run import train
from downstream.run.learner import Learner
from downstream.run.order import Stream
from downstream.run.prepare import Prepared, folds, prepare
from downstream.run.train import Data, dev_score, fit, predict
from downstream.tasks import asr, er
from downstream.tasks.heads import FrameCTC
from upstream.features.clips import Clip


class Given:
    """Features in memory: [N, L, D] means, or frames of N utterances [T_i, L, D]."""

    def __init__(self, values: Tensor | list[Tensor]) -> None:
        self.values, self.read = values, list[list[int]]()
        means = isinstance(values, Tensor)
        self.lens = torch.tensor([10 if means else len(v) for v in values])
        self.layers, self.dim = values[0].shape[-2:]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.read.append(list(indices))
        if isinstance(self.values, Tensor):
            x = self.values[torch.as_tensor(indices)].transpose(0, 1)
        else:
            padded = pad_sequence([self.values[i] for i in indices], batch_first=True)
            x = padded.permute(2, 0, 1, 3)
        return x, self.lens[torch.as_tensor(indices)]


def task(suite: Path, *overrides: str, name: str = "label") -> recipe.Recipe:
    return recipe.load(suite / f"{name}.yaml", recipe.overrides(overrides))


def items(targets: list[str]) -> list[Item]:
    return [Item(f"u{i}", "s", target) for i, target in enumerate(targets)]


def separable(n: int = 60) -> tuple[Data, dict[str, list[int]]]:
    torch.manual_seed(0)
    labels = [i % 3 for i in range(n)]
    values = torch.randn(n, 2, 5)
    values[torch.arange(n), 1, labels] += 4
    targets = ["abc"[label] for label in labels]
    known = er.TASK.labels("train", targets)
    split = {"train": list(range(30)), "dev": list(range(30, 45)), "test": list(range(45, n))}
    return Data(Given(values), items(targets), known), split


def spoken(n: int = 16) -> tuple[Data, dict[str, list[int]]]:
    """Utterances of 15 to 60 frames with a word each."""
    torch.manual_seed(0)
    values = [torch.randn(int(frames), 3, 240) for frames in torch.randint(15, 60, (n,))]
    targets = [["RED", "GREEN", "BLUE"][i % 3] for i in range(n)]
    split = {"train": list(range(10)), "dev": list(range(10, n))}
    return Data(Given(values), items(targets), asr.TASK.labels("train", targets)), split


def test_heads_learn_and_every_dev_score_is_kept(suite: Path) -> None:
    data, split = separable()
    fitted = fit(task(suite, "train.lr=[1.0e-5, 1.0e-1]"), data, split, seed=0)
    assert fitted.lr == 0.1 and set(fitted.dev) == {"1e-05", "0.1"}
    test = split["test"]
    assert dev_score(er.TASK, data, test, predict(fitted.head, data, test)) > 90


def test_best_step_is_chosen_on_dev(suite: Path) -> None:
    """With a learning rate that diverges later, the kept head is the early good one."""
    data, split = separable()
    scores = []
    original = Learner.keep

    def spy(run: Learner, dev: float, metric: object) -> None:
        scores.append(dev)
        original(run, dev, metric)  # type: ignore[arg-type]

    Learner.keep = spy  # type: ignore[method-assign]
    try:
        fitted = fit(task(suite, "train.lr=[0.3]", "train.eval_every=5"), data, split, seed=0)
    finally:
        Learner.keep = original  # type: ignore[method-assign]
    assert fitted.dev["0.3"] == max(scores) and len(scores) == 12


def test_stream_covers_every_epoch_and_repeats_itself() -> None:
    lens = torch.arange(10) * 7 % 10 + 1
    for sort in (True, False):
        stream = Stream(range(10), lens, 4, seed=3, sort=sort)
        for epoch in range(3):
            batches = [stream[epoch * 3 + k] for k in range(3)]
            assert sorted(i for batch in batches for i in batch) == list(range(10))
            if sort:  # neighbours in length
                assert all(max(lens[b]) - min(lens[b]) <= 4 for b in batches)
        fresh = Stream(range(10), lens, 4, seed=3, sort=sort)
        assert fresh[7] == stream[7]
        other = Stream(range(10), lens, 4, seed=4, sort=sort)
        assert any(other[k] != stream[k] for k in range(6))


def test_resumed_training_equals_an_unbroken_one(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, split = separable()
    one = task(suite, "train.eval_every=10")
    unbroken = fit(one, data, split, seed=1)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    state, original, steps = tmp_path / "state.pt", Learner.update, []

    def stop(run: Learner) -> None:
        steps.append(1)
        if len(steps) > 2 * 35:  # two learning rates
            raise KeyboardInterrupt
        original(run)

    monkeypatch.setattr(Learner, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(one, data, split, seed=1, state=state)
    monkeypatch.setattr(Learner, "update", original)
    resumed = fit(one, data, split, seed=1, state=state)
    assert resumed.dev == unbroken.dev and resumed.lr == unbroken.lr
    for ours, theirs in zip(resumed.head.parameters(), unbroken.head.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["label", "word"])  # word: SpecAugment, dropout, micro-batches
def test_every_learning_rate_trains_as_if_alone(suite: Path, tmp_path: Path, name: str) -> None:
    data, split = separable() if name == "label" else spoken()
    rates = [1e-3, 1e-2, 1e-1]
    small = ("train.batch=4", "train.accumulate=2", "train.steps=12", f"train.lr={rates}")
    together = fit(task(suite, *small, name=name), data, split, seed=2, state=tmp_path / "all.pt")
    runs = torch.load(tmp_path / "all.pt", weights_only=True)["runs"]
    for lr, run in zip(rates, runs):
        lone = task(suite, *small[:3], f"train.lr=[{lr}]", name=name)
        alone = fit(lone, data, split, seed=2, state=tmp_path / "one.pt")
        (own,) = torch.load(tmp_path / "one.pt", weights_only=True)["runs"]
        (tmp_path / "one.pt").unlink()
        assert together.dev[f"{lr:g}"] == alone.dev[f"{lr:g}"]
        for key, value in own["head"].items():
            assert torch.allclose(run["head"][key], value, rtol=1e-5, atol=1e-5), key
    first, last = runs[0]["head"], runs[-1]["head"]
    assert not torch.allclose(first["layer_weights"], last["layer_weights"], atol=1e-3)


def test_features_are_read_once_for_all_learning_rates(suite: Path) -> None:
    data, split = separable()
    one = task(suite, "train.lr=[1.0e-3, 1.0e-2, 1.0e-1]", "train.accumulate=2")
    fit(one, data, split, seed=0)
    read = data.features.read  # type: ignore[attr-defined]
    assert len(read) == 60 * 2 + 3  # sixty updates; 15 dev utterances, in one batch, three times
    assert sum(sorted(batch) == split["dev"] for batch in read) == 3


def test_long_utterances_are_predicted_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = spoken()
    head = FrameCTC(3, 240, data.labels.size)
    whole = predict(head, data, range(16))
    read = data.features.read  # type: ignore[attr-defined]
    assert len(read) == 1
    read.clear()
    monkeypatch.setattr(train, "PREDICT_FLOATS", 70 * 3 * 240)
    assert predict(head, data, range(16)) == whole and len(set(map(tuple, whole))) > 1
    lens = data.features.lens
    assert sorted(i for batch in read for i in batch) == list(range(16))
    for batch in read:  # one utterance may be more than the budget, two may not
        assert len(batch) == 1 or len(batch) * int(lens[batch].max()) <= 70
    assert 16 / 3 < len(read) < 16


def test_an_update_with_nan_gradient_is_skipped(suite: Path) -> None:
    data, split = separable()
    data.features.values[0] = float("nan")  # type: ignore[attr-defined]
    fitted = fit(task(suite, "train.batch=1", "train.lr=[1.0e-2]"), data, split, seed=0)
    assert all(torch.isfinite(p).all() for p in fitted.head.parameters())


def test_folds_are_s3prls() -> None:
    """Test on one session; 80/20 of the rest with seed 0. Sizes from the spec (section 1.8)."""
    sizes = {
        "session1": 1085,
        "session2": 1023,
        "session3": 1151,
        "session4": 1031,
        "session5": 1241,
    }
    corpus = [
        Example(f"{s}-{i}", "x", None, None, "hap", s, s)
        for s, n in sizes.items()
        for i in range(n)
    ]
    found = folds(corpus)
    assert list(found) == list(sizes)
    pools = [4446, 4508, 4380, 4500, 4290]
    for (fold, split), pool in zip(found.items(), pools):
        assert len(split["test"]) == sizes[fold]
        assert len(split["train"]) == int(0.8 * pool)
        assert len(split["train"]) + len(split["dev"]) == pool
        assert not set(split["train"]) & set(split["dev"])
        assert all(corpus[i].split == fold for i in split["test"])


def test_crops_replace_long_training_utterances_only(suite: Path, tmp_path: Path) -> None:
    whole = prepare(task(suite), tmp_path)
    cropped = prepare(task(suite, "crop={seconds: 0.4, per_utterance: 3}"), tmp_path)
    again = prepare(task(suite, "crop={seconds: 0.4, per_utterance: 3}"), tmp_path)
    assert cropped.clips == again.clips and cropped.revision == again.revision != whole.revision

    def of(found: Prepared, part: str) -> list[Clip]:
        return found.audio(found.splits[""][part])

    assert all(of(cropped, part) == of(whole, part) for part in ("dev", "test"))
    assert len(cropped.splits[""]["train"]) == len(whole.splits[""]["train"])
    short = [clip for clip in of(whole, "train") if clip.seconds <= 0.4]
    windows = [clip for clip in of(cropped, "train") if clip not in short]
    assert len(windows) == 3 * (len(of(whole, "train")) - len(short)) > 0 < len(short)
    assert all(clip.seconds == pytest.approx(0.4, abs=1e-4) for clip in windows)
    used = {i for split in cropped.splits.values() for part in split.values() for i in part}
    used |= {i for crops in cropped.windows.values() for i in crops}
    assert used == set(range(len(cropped.clips))), "nothing passes that no split uses"


@pytest.mark.parametrize("sort", [True, False])
def test_long_and_short_utterances_are_drawn_equally_often(sort: bool) -> None:
    """Utterance 0 has four crops (0, 10, 11, 12), 1 to 9 are short: once each in every epoch."""
    lens, windows = torch.ones(13), {0: [0, 10, 11, 12]}
    stream = Stream(range(10), lens, 5, 3, sort, windows)
    drawn = [i for number in range(2 * 8) for i in stream[number]]
    for epoch in range(8):
        once = drawn[epoch * 10 : (epoch + 1) * 10]
        assert sorted(0 if i >= 10 else i for i in once) == list(range(10))
    assert all(drawn.count(crop) == 2 for crop in windows[0]), "each crop its turn"
    assert Stream(range(10), lens, 5, 3, sort, windows)[9] == stream[9]
