"""An update is one large batch, however it is cut: into micro-batches or among processes."""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import upstream
from merging.tuning import build_tuned, loop
from merging.tuning.objectives import TaskObjective
from merging.tuning.ranks import ALL, Portion
from merging.tuning.recipe import Plan, load_recipe, open_plan
from tests import tiny
from tests.merging.test_tuning import changed, record
from upstream.checkpoints.tensor_names import module_of
from upstream.encoder.transformer import Layer
from upstream.features.store import Store

# nothing random
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "head_only": 0.0}
TASK = """\
kind: task
task: sd
corpus: {{name: manifest, root: {tones}, rttm: {rttm}}}
train: {{steps: 20, batch: 12, lr: [1.0e-2], eval_every: 10}}
"""


def diarization(recipes: Path, tones: Path) -> None:
    """A task whose loss is a mean over frames: one voice from the first to the last but 0.1 s."""
    rows = list(csv.DictReader((tones / "manifest.tsv").open(), delimiter="\t"))
    turns = [f"SPEAKER {Path(row['path']).stem} 1 0.05 0.15 <NA> <NA> {row['speaker']} <NA> <NA>\n"
             for row in rows]  # fmt: skip
    (recipes / "turns.rttm").write_text("".join(turns))
    task = TASK.format(tones=tones, rttm=recipes / "turns.rttm")
    (recipes / "turns.yaml").write_text(task)


@pytest.fixture(params=["label", "word", "turns"])
def plan(recipes: Path, tones: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Plan:
    """Losses that are a mean over utterances (two kinds) and over frames; nothing random."""
    if request.param == "word":
        head = {"projector": 8, "hidden": 8, "depth": 1, "dropout": 0.0}
        return open_plan(
            changed(recipes, "finetune_word", specaug=False, head=head, **STILL), tmp_path / "r"
        )
    if request.param == "turns":
        diarization(recipes, tones)
    return open_plan(changed(recipes, task=f"{request.param}.yaml", **STILL), tmp_path / "r")


class Cut:
    """A stream with these batches in every update."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> list[int]:
        return list(self.batches[number % len(self.batches)])


Gradients = dict[str, Tensor]


def update(
    plan: Plan, folder: Path, batches: Sequence[Sequence[int]], step: int = 5
) -> tuple[Gradients, float]:
    """The gradients of one update on `batches`, and its loss as it was logged."""
    recipe = dataclasses.replace(plan.recipe, accumulate=len(batches))
    plan = plan._replace(recipe=recipe, encoder=copy.deepcopy(plan.encoder))
    objective = TaskObjective(plan, Store(folder / "cache"))
    objective.stream = Cut(batches)  # type: ignore[assignment]
    running = loop.Loop(plan, objective, folder / f"{len(batches)}" / "state.pt")
    running.place.parent.mkdir()
    running._update(step)
    given = {name: p.grad for name, p in running._named() if p.grad is not None}
    return given, running.log.lines()[0]["loss"]


def same(one: Gradients, other: Gradients, most: float) -> None:
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 1e-3, "there is something to compare"
    for name in one:
        assert (one[name] - other[name]).abs().max() <= most, name


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 4, 4, 2), (1, 9)])
def test_micro_batches_are_one_large_batch(
    plan: Plan, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """Within 1e-6, also where the last one is smaller; with equal weights the ragged are not."""
    train = plan.prepared.splits[""]["train"][: sum(sizes)]
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    batches = [train[a:b] for a, b in itertools.pairwise(ends)]
    whole, loss = update(plan, tmp_path, [train])
    parts, cut_loss = update(plan, tmp_path, batches)
    same(whole, parts, 1e-6)
    assert cut_loss == pytest.approx(loss, rel=1e-5)


def test_unequal_micro_batches_count_by_what_their_loss_is_a_mean_of(
    plan: Plan, tmp_path: Path
) -> None:
    objective = TaskObjective(plan, Store(tmp_path / "cache"))
    train = sorted(plan.prepared.splits[""]["train"], key=lambda i: plan.prepared.items[i].seconds)
    objective.stream = Cut([train[:2], train[-6:]])  # type: ignore[assignment]
    weights = objective.weights(range(2))
    frames = objective.features.lens
    expected = [2 / 8, 6 / 8]
    if plan.prepared.recipe.task == "sd":
        sizes = [float(frames[list(i)].sum()) for i in (train[:2], train[-6:])]
        expected = [size / sum(sizes) for size in sizes]
        assert expected[0] < 0.2, "the short ones have fewer frames"
    assert weights == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_shares_of_a_batch_are_the_batch(plan: Plan, tmp_path: Path, parts: int) -> None:
    """Gradients of all shares, weighted and summed; some of too many are empty."""
    store, heard = Store(tmp_path / "cache"), []
    train = plan.prepared.splits[""]["train"][:10]

    def gradients(share: Portion) -> tuple[list[Tensor | None], float]:
        objective = TaskObjective(plan._replace(share=share), store)
        objective.stream = Cut([train])  # type: ignore[assignment]
        (weight,) = objective.weights([0])
        plan.encoder.zero_grad()
        if weight:
            (weight * objective.loss(plan.encoder, 0)).backward()
        heard.extend(objective.names(0))
        both = [*plan.encoder.named_parameters(), *objective.head.named_parameters()]
        return [p.grad for _, p in both], weight

    whole, weight = gradients(ALL)
    assert weight == 1
    heard.clear()
    shares = [gradients(Portion(k, parts)) for k in range(parts)]
    assert sum(weight for _, weight in shares) == pytest.approx(1)
    assert sorted(heard) == sorted(plan.prepared.items[i].id for i in train), "each once"
    for each, *split in zip(whole, *(given for given, _ in shares)):
        if each is not None:
            total = torch.stack([g for g in split if g is not None]).sum(0)
            assert (total - each).abs().max() <= 1e-6 + 1e-5 * each.abs().max()


def test_a_build_of_several_micro_batches_is_another_than_before_they_were_weighted(
    recipes: Path, tmp_path: Path
) -> None:
    one, two = (open_plan(changed(recipes, accumulate=n), tmp_path / "r") for n in (1, 2))

    def old(plan: Plan) -> str:
        facts = [plan.recipe.facts(), plan.fingerprint, plan.prepared.revision]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    assert one.key == old(one) and two.key != old(two)
    assert load_recipe(recipes / "finetune.yaml").accumulate == 2


def test_batches_of_seconds_hold_what_fits(recipes: Path, tmp_path: Path) -> None:
    """Each utterance once an epoch, of similar length, no more audio than asked; the same again."""
    path = changed(recipes, batch=None, batch_seconds=2.0)
    plan = open_plan(path, tmp_path / "r")
    clips, split = plan.prepared.clips, plan.prepared.splits[""]
    objective = TaskObjective(plan, Store(tmp_path / "cache"))
    batches = [objective.stream[n] for n in range(len(objective.stream.groups))]
    for found, part in ((batches, "train"), (objective.dev_batches, "dev")):
        assert sorted(i for batch in found for i in batch) == sorted(split[part])
        sizes = [len(batch) * max(clips[i].seconds for i in batch) for batch in found]
        assert max(sizes) <= 2.0 and sorted(sizes)[1] > 1.4, "only the last one has room left"
    order = sorted(batches, key=lambda batch: -clips[batch[0]].seconds)
    flat = [clips[i].seconds for batch in order for i in batch]
    assert flat == pytest.approx(sorted(flat, reverse=True), abs=1e-4), "of similar length"
    again = TaskObjective(plan, Store(tmp_path / "cache"))
    assert [again.stream[n] for n in (7, 0, 3)] == [objective.stream[n] for n in (7, 0, 3)]
    assert objective.stream[len(batches)] in batches, "the next epoch: another order"
    single = open_plan(changed(recipes, batch=None, batch_seconds=0.1), tmp_path / "r")
    stream = TaskObjective(single, Store(tmp_path / "cache")).stream
    assert len(stream.groups) == len(split["train"]), "longer ones stand alone"


def test_batches_of_seconds_train(recipes: Path, tmp_path: Path) -> None:
    path = changed(recipes, batch=None, batch_seconds=2.0, accumulate=2)
    facts = record(build_tuned(path, tmp_path / "r"))
    assert facts["recipe"]["batch_seconds"] == 2.0 and facts["recipe"]["batch"] is None
    assert facts["moved"]["layer 1"] > 0


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_checkpointing_changes_no_gradient(
    recipes: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, for every family; and it does compute layers twice."""
    base = str(tiny.hf_folder(tmp_path, variant))
    passed, forward = [], Layer.forward

    def counted(self: Layer, *given: Any) -> Tensor:
        passed.append(self)
        return forward(self, *given)

    monkeypatch.setattr(Layer, "forward", counted)
    found = {}
    for on in (False, True):
        path = changed(recipes, upstream=base, checkpointing=on, head_only=0.0)
        plan = open_plan(path, tmp_path / "r")
        passed.clear()
        train = plan.prepared.splits[""]["train"][:5]
        found[on] = (*update(plan, tmp_path / str(on), [train]), len(passed))
    plain, again = found[False], found[True]
    assert again[2] == 2 * plain[2] > 0
    assert plain[1] == again[1], "the same dropout"
    same(plain[0], again[0], 1e-6)


def test_low_precision_is_of_the_products_alone(recipes: Path, tmp_path: Path) -> None:
    path = changed(recipes, head_only=0.0)
    full = open_plan(path, tmp_path / "r")
    low = open_plan(changed(recipes, head_only=0.0, precision="bfloat16"), tmp_path / "r")
    assert low.fingerprint == full.fingerprint, "of the same base"
    assert low.key != full.key
    train = full.prepared.splits[""]["train"][:8]
    (one, loss), (other, low_loss) = (
        update(plan, tmp_path / name, [train]) for plan, name in ((full, "full"), (low, "low"))
    )
    assert low_loss == pytest.approx(loss, rel=0.05) and low_loss != loss
    assert {g.dtype for g in other.values()} == {torch.float32}
    along = [torch.cosine_similarity(one[n].flatten(), other[n].flatten(), 0) for n in one]
    assert torch.stack(along).median() > 0.95, "about the same way"
    folder = build_tuned(path, tmp_path / "r")
    tuned = upstream.load(str(folder))
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert tuned.fingerprint() == record(folder)["fingerprint"], "an ordinary upstream of float32"
    assert record(folder)["base_fingerprint"] == upstream.load(full.recipe.upstream).fingerprint()


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_step_has_its_rate_and_moves_what_it_should(
    recipes: Path, tmp_path: Path, variant: str
) -> None:
    """Spec section 3.1 step by step, with both shares of 25 cut to whole steps: 2 and 10."""
    base = str(tiny.hf_folder(tmp_path, variant))
    plan = open_plan(changed(recipes, upstream=base, steps=25, lr=1e-3), tmp_path / "r")
    running = loop.Loop(plan, TaskObjective(plan, Store(tmp_path / "cache")), tmp_path / "s.pt")
    rates = [0.0, 0.5e-3, *[1e-3] * 11, *(1e-3 * (25 - step) / 13 for step in range(13, 25))]
    for step, rate in enumerate(rates):
        before = {name: p.detach().clone() for name, p in running._named()}
        running._update(step)
        assert [group["lr"] for group in running.optimizer.param_groups] == pytest.approx(
            [rate, rate]
        )
        moved = {name for name, p in running._named() if not torch.equal(p, before[name])}
        modules = {name if name.startswith("head") else module_of(name) for name in moved}
        head = {
            "head.projector.weight",
            "head.projector.bias",
            "head.linear.weight",
            "head.linear.bias",
        }
        if step < 2:
            assert modules == (head if rate else set()), "the head alone, once there is a rate"
        else:
            assert {*head, "layer 1", "layer 2", "projection"} <= modules, step
            assert not {"cnn", "other"} & modules, "never, with no gradient nor by decay"
