"""Training heads: the stream, selection on dev, resuming, and that something is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from downstream import er, recipe, train
from downstream.base import Example
from downstream.evaluate import prepare
from downstream.metrics import METRICS
from downstream.train import Data, Stream, fit, predict, rate
from upstream.cache import Means


def task(suite: Path, *overrides: str) -> recipe.Recipe:
    return recipe.load(suite / "label.yaml", recipe.overrides(overrides))


def separable(n: int = 60) -> tuple[Data, dict[str, list[int]]]:
    torch.manual_seed(0)
    labels = [i % 3 for i in range(n)]
    values = torch.randn(n, 2, 5)
    values[torch.arange(n), 1, labels] += 4
    targets = ["abc"[label] for label in labels]
    known = er.TASK.labels("train", targets)
    split = {"train": list(range(30)), "dev": list(range(30, 45)), "test": list(range(45, n))}
    return Data(Means(values, torch.full((n,), 10)), targets, known), split


def test_heads_learn_and_every_dev_score_is_kept(suite: Path) -> None:
    data, split = separable()
    fitted = fit(task(suite, "train.lr=[1.0e-5, 1.0e-1]"), data, split, seed=0)
    assert fitted.lr == 0.1 and set(fitted.dev) == {"1e-05", "0.1"}
    test = split["test"]
    assert rate(METRICS["accuracy"], data, test, predict(fitted.head, data, test)) > 90


def test_best_step_is_chosen_on_dev(suite: Path) -> None:
    """With a learning rate that diverges later, the kept head is the early good one."""
    data, split = separable()
    scores = []
    original = train._Run.keep

    def spy(run: train._Run, dev: float, metric: object) -> None:
        scores.append(dev)
        original(run, dev, metric)  # type: ignore[arg-type]

    train._Run.keep = spy  # type: ignore[method-assign]
    try:
        fitted = fit(task(suite, "train.lr=[0.3]", "train.eval_every=5"), data, split, seed=0)
    finally:
        train._Run.keep = original  # type: ignore[method-assign]
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
    state, original, steps = tmp_path / "state.pt", train._Run.step, []

    def stop(run: train._Run, batches: object) -> None:
        steps.append(1)
        if len(steps) > 2 * 35:  # two learning rates
            raise KeyboardInterrupt
        original(run, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(train._Run, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(one, data, split, seed=1, state=state)
    monkeypatch.setattr(train._Run, "step", original)
    resumed = fit(one, data, split, seed=1, state=state)
    assert resumed.dev == unbroken.dev and resumed.lr == unbroken.lr
    for ours, theirs in zip(resumed.head.parameters(), unbroken.head.parameters()):
        assert torch.equal(ours, theirs)


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
    items = [
        Example(f"{s}-{i}", "x", None, None, "hap", s, s)
        for s, n in sizes.items()
        for i in range(n)
    ]
    folds = er.folds(items)
    assert list(folds) == list(sizes)
    pools = [4446, 4508, 4380, 4500, 4290]
    for (fold, split), pool in zip(folds.items(), pools):
        assert len(split["test"]) == sizes[fold]
        assert len(split["train"]) == int(0.8 * pool)
        assert len(split["train"]) + len(split["dev"]) == pool
        assert not set(split["train"]) & set(split["dev"])
        assert all(items[i].split == fold for i in split["test"])


def test_crops_replace_long_training_utterances_only(suite: Path, tmp_path: Path) -> None:
    whole = prepare(task(suite), tmp_path)
    cropped = prepare(task(suite, "crop={seconds: 0.4, per_utterance: 3}"), tmp_path)
    again = prepare(task(suite, "crop={seconds: 0.4, per_utterance: 3}"), tmp_path)
    assert cropped.clips == again.clips and cropped.revision == again.revision != whole.revision
    assert cropped.splits[""]["test"] == whole.splits[""]["test"]
    new = [cropped.clips[i] for i in cropped.splits[""]["train"] if i >= len(whole.clips)]
    assert new and all(abs(c.end - c.start - 0.4) < 1e-6 for c in new)  # type: ignore[operator]
