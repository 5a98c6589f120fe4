"""KS, IC and SF: sizes and losses as in SUPERB, balanced draws, metrics of both directions."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import WeightedRandomSampler

from downstream.base import METRICS, Count
from downstream.report.compare import compare
from downstream.report.results import load_results, save
from downstream.run.order import Stream, balanced, drawn
from downstream.run.train import Data, dev_score, fit, predict
from downstream.tasks import er, ic, ks, sf
from downstream.tasks.heads import RecurrentCTC, Utterance
from tests.corpora import fault
from tests.downstream.test_heads import size
from tests.downstream.test_results import CELL, SCORE
from tests.downstream.test_tasks import respell, score
from tests.downstream.test_train import Given, items, task
from tests.optional import optional

s3prl = optional("s3prl.downstream.model")

ACTIONS = ["activate", "bring", "change language", "deactivate", "decrease", "increase"]
OBJECTS = """Chinese English German Korean heat juice lamp lights music newspaper none shoes socks
    volume""".split()
LOCATIONS = ["bedroom", "kitchen", "none", "washroom"]
INTENTS = [f"{ACTIONS[k % 6]} ; {OBJECTS[k % 14]} ; {LOCATIONS[k * 7 % 4]}" for k in range(14 * 6)]


@pytest.mark.parametrize(
    "dim, kws, intents, slots",
    [
        (768, 199_948, 203_032, 42_986_605),
        (1024, 265_484, 268_568, 43_248_749),
        (240, 64_780, 67_864, 42_445_933),
    ],
)
def test_sizes_are_superbs(dim: int, kws: int, intents: int, slots: int) -> None:
    assert size(Utterance(13, dim, ks.TASK.labels("superb", []).size)) == kws
    assert size(Utterance(13, dim, ic.TASK.labels("superb", INTENTS).size)) == intents
    assert size(RecurrentCTC(13, dim, sf.TASK.labels("superb", []).size)) == slots


def test_keywords_stand_in_superbs_order() -> None:
    labels = ks.TASK.labels("superb", [])
    assert labels.size == 12 and labels.encode("go") == [9]
    assert labels.decode([10]) == "_unknown_" and labels.decode([11]) == "_silence_"
    assert "tokens: train" in fault(labels.encode, "bed")
    assert ks.TASK.labels("train", ["up", "bed"]).symbols == ("bed", "up")


def test_answers_are_numbered_as_they_first_appear() -> None:
    labels = ic.TASK.labels("superb", INTENTS)
    assert labels.sizes == (6, 14, 4) and labels.size == 24
    for intent in INTENTS:
        assert labels.decode(labels.encode(intent)) == intent
    two = ic.TASK.labels("train", ["up ; none", "down ; up", "up ; up"])
    assert two.encode("down ; none") == [1, 2] and two.sizes == (2, 2)
    assert ic.TASK.labels("train", []).decode([]) == "", "classes of a kept head come later"


def test_each_mistake_in_an_intent_is_one_clear_line() -> None:
    labels = ic.TASK.labels("train", [*INTENTS, "bring ; shoes"])
    assert labels.sizes == (6, 14, 4)
    assert "'bring ; shoes' has 2 answers, the training set mostly 3" in fault(
        labels.unknown, "bring ; shoes"
    )
    line = fault(labels.unknown, "bring ; shos ; none")
    assert "answer '2: shos' is in dev or test but not in train" in line and "2: shoes?" in line


def test_loss_and_gradients_of_three_questions_are_s3prls() -> None:
    torch.manual_seed(0)
    labels = ic.TASK.labels("superb", INTENTS)
    head, projector = Utterance(1, 6, labels.size), nn.Linear(6, 256)
    head.sizes = labels.sizes
    theirs = s3prl.UtteranceLevel(256, 24, post_net={"select": "FrameLevel"})
    head.projector.load_state_dict(projector.state_dict())
    head.linear.load_state_dict(theirs.post_net.linear.state_dict())
    x, lens = torch.randn(5, 9, 6), torch.tensor([9, 4, 7, 1, 9])
    targets = [labels.encode(intent) for intent in INTENTS[3:8]]
    logits = head(x[None], lens)
    head.loss(logits, lens, targets).backward()
    reference = theirs(projector(x), lens)[0]
    loss, chosen, first = torch.tensor(0.0), [], 0
    for question, classes in enumerate(labels.sizes):
        part = reference[:, first : first + classes]
        right = torch.tensor([target[question] - first for target in targets])
        loss = loss + nn.CrossEntropyLoss()(part, right)
        chosen.append(part.argmax(1) + first)
        first += classes
    loss.backward()
    assert torch.allclose(head.loss(logits, lens, targets), loss, atol=1e-6)
    for ours, other in (
        (head.linear.weight, theirs.post_net.linear.weight),
        (head.projector.weight, projector.weight),
    ):
        assert ours.grad is not None and other.grad is not None
        assert torch.allclose(ours.grad, other.grad, atol=1e-6)
    assert head.predict(logits, lens) == torch.stack(chosen, 1).tolist()


# Balanced draws -----------------------------------------------------------------------------------

CLASSES = ["a"] * 80 + ["b"] * 15 + ["c"] * 5


def test_a_balanced_epoch_is_s3prls_sampler() -> None:
    counts = Counter(CLASSES)
    theirs = WeightedRandomSampler([100 / counts[c] for c in CLASSES], 100)
    stream = Stream(range(100), torch.ones(100), 10, 3, True, weigh=CLASSES)
    theirs.generator = torch.Generator().manual_seed(3 * 1_000_003)
    ours = [i for number in range(10) for i in stream[number]]
    assert ours == list(theirs)
    many = Counter(CLASSES[i] for number in range(600) for i in stream[number])
    assert all(many[c] == pytest.approx(2000, abs=120) for c in "abc"), "36 is a standard deviation"
    fresh = Stream(range(100), torch.ones(100), 10, 3, True, weigh=CLASSES)
    assert fresh[57] == stream[57] and len(set(ours)) < 100


def test_dev_is_one_draw_where_training_is_balanced(suite: Path) -> None:
    torch.manual_seed(0)
    targets = CLASSES * 2
    values = torch.randn(200, 2, 5)
    values[torch.arange(200), 0, ["abc".index(t) for t in targets]] += 1.5
    data = Data(Given(values), items(targets), er.TASK.labels("train", targets))
    split = {"train": list(range(100)), "dev": list(range(100, 200))}
    draw = drawn(data.items, split["dev"])
    assert draw == drawn(data.items, split["dev"]) and len(draw) == 100
    assert all(20 < n < 47 for n in Counter(targets[i] for i in draw).values())
    options = ("train.balanced=true", "train.lr=[1.0e-2]", "train.eval_every=60")
    scores = []
    for seed in (0, 1):
        fitted = fit(task(suite, *options), data, split, seed=seed)
        at = {dev: predict(fitted.head, data, dev) for dev in map(tuple, (draw, split["dev"]))}
        whole, plain = (dev_score(er.TASK, data, dev, at[dev]) for dev in at)
        assert fitted.dev["0.01"] == whole != plain
        scores.append(whole)
    assert scores[0] != scores[1], "heads differ"
    assert all(len(set(batch)) == len(batch) for batch in data.features.read[-2:]), "read once"


def test_weights_make_classes_equal() -> None:
    weights = balanced(CLASSES)
    for label in "abc":
        assert sum(w for w, c in zip(weights, CLASSES) if c == label) == pytest.approx(1)


# Metrics of both directions -----------------------------------------------------------------------

OWN = """
from downstream.base import Metric, Tally
from downstream.tasks.metrics import error_rate, success_rate
GOOD = Metric("good", "GOOD", "higher", success_rate, lambda r, h: Tally(float(r != h), 1))
BAD = Metric("bad", "BAD", "lower", error_rate, lambda r, h: Tally(float(r != h), 1))
"""


@pytest.mark.parametrize("own", [False, True])
def test_each_metric_of_a_task_has_its_own_direction(own: bool, tmp_path: Path) -> None:
    """One upstream is better in both: F1 is higher, CER lower."""
    (tmp_path / "own.py").write_text(OWN)
    file = tmp_path / "own.py"
    names = (f"{file}:GOOD", f"{file}:BAD") if own else ("slot_f1", "slot_cer")
    rng = random.Random(0)
    for upstream, wrong in (("good", 0.2), ("poor", 0.6)):
        for seed in range(3):
            records = [
                Count(f"u{n}", f"s{n % 8}", "r", "h", float(rng.random() < wrong), 1.0, metric=name)
                for n in range(160)
                for name in names
            ]
            first = [r.errors for r in records if r.metric == names[0]]
            total = 100 - 100 * sum(first) / 160
            directions = {name: METRICS.named(name).better for name in names}
            result = replace(
                SCORE, metric=names[0], score=total, lr={"": 0.1}, dev={}, metrics=directions
            )
            save(tmp_path / "r", replace(CELL, upstream=upstream, seed=seed), result, records)
    results = load_results(tmp_path / "r")
    f1, cer = compare("good", "poor", results).rows
    assert (f1.metric, f1.better) == (names[0], "higher") and f1.score > 70 and f1.difference > 0
    assert (cer.metric, cer.better) == (names[1], "lower") and cer.score < 30 and cer.difference < 0
    assert f1.verdict == cer.verdict == "better"


# From audio to score ------------------------------------------------------------------------------


def test_keywords_and_intents_from_audio_to_score(suite: Path, tones: Path, tmp_path: Path) -> None:
    where, balance = f"corpus.root={suite / 'corpus'}", "train.balanced=true"
    plain, _ = score(suite, tmp_path / "r", "label", "task=ks", balance, "train.lr=[1.0e-1]")
    assert plain.score > 60
    both = {"LOW": "low ; none", "MID": "mid ; low", "HIGH": "none ; low"}
    respell(suite, tones, lambda n, text: both[text])
    options = ("task=ic", where, "corpus.target=text", "train.lr=[1.0e-1]")
    result, records = score(suite, tmp_path / "r", "label", *options)
    assert result.score > 60 and result.metric == "accuracy"
    assert {r.reference for r in records} == set(both.values())
    right = [r.hypothesis == r.reference for r in records]
    assert 100 * sum(right) / len(right) == pytest.approx(result.score)


def test_slots_from_audio_to_score(suite: Path, tones: Path, tmp_path: Path) -> None:
    marked = {"LOW": "B-low A E-low", "MID": "B-mid A E-mid", "HIGH": "HI"}
    respell(suite, tones, lambda n, text: marked[text])
    options = ("task=sf", f"corpus.root={suite / 'corpus'}", "train.specaug=false")
    options = (*options, "train.steps=400", "train.lr=[1.0e-2]", "train.eval_every=50")
    result, records = score(suite, tmp_path / "r", "word", *options)
    assert result.metric == "slot_f1" and result.better == "higher"
    assert result.directions == {"slot_f1": "higher", "slot_cer": "lower"}
    assert Counter(r.metric for r in records) == {"slot_f1": result.n, "slot_cer": result.n}
    assert result.score > 60, "no one answer gets more than a third"
    assert sf.TASK.score(records)["slot_cer"] < 60
    assert json.dumps([r._asdict() for r in records])


def test_a_slot_that_only_the_test_set_has_is_seen_before_training(
    suite: Path, tones: Path, tmp_path: Path
) -> None:
    respell(suite, tones, lambda n, text: f"B-x {text} E-{'x' if n else 'y'}")
    options = ("task=sf", f"corpus.root={suite / 'corpus'}")
    line = fault(score, suite, tmp_path / "r", "word", *options)
    assert "0-0" in line and "E-y is out of place" in line and str(suite / "word.yaml") in line
    slots = ["room"] * 70 + ["romo"] * 2
    respell(suite, tones, lambda n, text: f"B-{slots[n]} {text} E-{slots[n]}")
    line = fault(score, suite, tmp_path / "r", "word", *options)
    assert "slot 'romo' is in dev or test but not in train" in line and "did you mean room?" in line
