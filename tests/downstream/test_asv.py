"""Verification: s3prl's x-vector and AM-softmax, trials and their EER, what cannot be scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from downstream.base import METRICS, Item, Trial
from downstream.tasks import asv, trials
from downstream.tasks.xvector import XVector
from tests.optional import optional
from upstream.common.errors import UserError

s3prl = optional("s3prl.downstream.sv_voxceleb1.model")
s3prl_utils = optional("s3prl.downstream.sv_voxceleb1.utils")

LENS = torch.tensor([40, 25, 33])


@pytest.mark.parametrize(("dim", "connector"), [(768, 393_728), (1024, 524_800), (240, 123_392)])
def test_sizes_are_superbs(dim: int, connector: int) -> None:
    head = XVector(13, dim, 1211)
    sizes = {name: p.numel() for name, p in head.named_parameters()}
    body = sum(n for name, n in sizes.items() if name.split(".")[0] in ("tdnn", "embed", "last"))
    assert sum(n for name, n in sizes.items() if name.startswith("projector")) == connector
    assert (body, sizes["speakers"]) == (5_716_444, 620_032)


def theirs(head: XVector, width: int, pooled: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """s3prl's model and loss with the head's parameters."""
    hparams = {"agg_dim": pooled, "dropout_p": 0.0, "batch_norm": False}
    model = s3prl.Model(width, pooled, "SP", "XVector", "UtteranceExtractor", hparams)
    loss = s3prl.AMSoftmaxLoss(width, classes, s=30.0, m=0.4)
    loss.W.data.copy_(head.speakers.data)
    for mine, layer in zip(head.tdnn, model.framelevel_feature_extractor.module):
        layer.kernel.weight.data.copy_(mine.weight.data.transpose(1, 2).flatten(1))
        layer.kernel.bias.data.copy_(mine.bias.data)
    extractor = model.utterancelevel_feature_extractor
    extractor.linear1.load_state_dict(head.embed.state_dict())
    extractor.linear2.load_state_dict(head.last.state_dict())
    return model, loss


def mask(lens: Tensor) -> Tensor:
    """As their expert makes it: 0 where a frame is left after the TDNN, -100000 in padding."""
    ones = [torch.ones(int(n) - 14) for n in lens]
    return (1.0 - nn.utils.rnn.pad_sequence(ones, batch_first=True)) * -100000.0


@pytest.mark.parametrize("stats", ["plus_one", "exact"])
def test_embedding_loss_and_gradients_are_s3prls(stats: Any) -> None:
    torch.manual_seed(0)
    head = XVector(1, 6, 4, width=16, pooled=24, stats=stats)
    model, objective = theirs(head, 16, 24, 4)
    x = torch.randn(3, 40, 6) * (torch.arange(40) < LENS[:, None])[:, :, None]
    # alone, an utterance has no padding for s3prl to take a frame of
    rows = [slice(None)] if stats == "plus_one" else [slice(i, i + 1) for i in range(3)]
    batches = [(x[r, : int(LENS[r].max())], LENS[r]) for r in rows]
    embedded = torch.cat([model.inference(head.projector(v), mask(n)) for v, n in batches])
    trained = torch.cat([model(head.projector(v), mask(n)) for v, n in batches])
    ours = head(x[None], LENS)
    assert (ours - embedded).abs().max() < 1e-5
    vectors = torch.tensor(np.array(head.predict(ours, LENS)))
    assert (vectors - nn.functional.normalize(embedded, dim=1)).abs().max() < 1e-5

    mine, reference = (
        head.loss(ours, LENS, [[2], [0], [3]]),
        objective(trained, torch.tensor([2, 0, 3])),
    )
    assert mine.item() == pytest.approx(reference.item(), abs=1e-5)
    head.zero_grad()
    gradients = torch.autograd.grad(mine, [head.tdnn[0].weight, head.embed.weight, head.speakers])
    first = model.framelevel_feature_extractor.module[0].kernel.weight
    last = model.utterancelevel_feature_extractor.linear1.weight
    expected = torch.autograd.grad(reference, [first, last, objective.W])
    gradients = (gradients[0].transpose(1, 2).flatten(1), *gradients[1:])
    for got, due in zip(gradients, expected):
        assert (got - due).abs().max() < 1e-5 * max(1.0, float(due.abs().max()))


def test_padding_has_no_say_and_the_short_are_repeated() -> None:
    torch.manual_seed(0)
    head = XVector(2, 6, 4, width=8, pooled=8).eval()
    x = torch.randn(2, 4, 40, 6)
    lens = torch.tensor([40, 25, 15, 3])
    spoilt = x.clone()
    for i, n in enumerate(lens):
        spoilt[:, i, n:] = 100.0
    assert torch.allclose(head(x, lens), head(spoilt, lens), atol=1e-6)
    for i, n in enumerate(lens):
        assert torch.allclose(
            head(x[:, i : i + 1, :n], lens[i : i + 1])[0], head(x, lens)[i], atol=1e-5
        )
    again = x[:, 3:, :3].repeat(1, 1, 6, 1)[:, :, :16]
    assert torch.allclose(head(x, lens)[3], head(again, torch.tensor([16]))[0], atol=1e-6)
    loss = head.loss(head(x, lens), lens, [[0], [1], [2], [3]])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("grid", [4, 20, 10**9])
def test_eer_is_s3prls_also_with_ties(grid: int) -> None:
    rng = np.random.default_rng(grid)
    for _ in range(50):
        labels = np.append([0, 1], rng.integers(0, 2, 60))
        scores = np.round((rng.normal(size=62) + labels) * grid) / grid
        records = [
            Trial(str(i), "", "", float(s), int(n), "")
            for i, (s, n) in enumerate(zip(scores, labels))
        ]
        assert METRICS["eer"].score(records) == pytest.approx(
            100 * s3prl_utils.EER(labels, scores)[0], abs=1e-6
        )


def test_eer_of_the_golden_trials() -> None:
    labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    scores = [0.9, 0.8, 0.7, 0.35, 0.6, 0.5, 0.3, 0.2, 0.1, 0.55]
    records = [Trial(str(i), "", "", s, n, "") for i, (s, n) in enumerate(zip(scores, labels))]
    assert METRICS["eer"].score(records) == pytest.approx(20)


def items(**changes: str) -> list[Item]:
    targets = {
        "a1": trials.write([(1, "a2"), (0, "b1"), (0, "b1")]),
        "a2": trials.write([]),
        "b1": trials.write([(0, "a2")]),
        **changes,
    }
    return [Item(name, name[0], target) for name, target in targets.items()]


def test_every_pair_is_a_trial_of_both_speakers_and_counts_as_often_as_it_is_listed() -> None:
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=np.float32)
    records = asv.TASK.records(items(), list(vectors), asv.labels("train", ["a", "b"]))
    assert [(r.id, round(r.score, 6), r.label, r.speaker) for r in records] == [
        ("a1 a2", 0.6, 1, "a"),
        ("a1 b1", 0.0, 0, "a + b"),
        ("a1 b1 2", 0.0, 0, "a + b"),
        ("b1 a2", 0.8, 0, "a + b"),
    ]
    assert records[1].clusters == ("a", "b")
    assert asv.TASK.score(records)["eer"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"b1": trials.write([(0, "a22")])}, "b1: is compared with 'a22', which is not .* mean a2"),
        ({"a2": "a"}, "a2: its target is no list of trials"),
        ({"a1": trials.write([(0, "b1")])}, "nothing to find: no trial is labelled 1"),
    ],
)
def test_a_split_that_cannot_be_scored_is_one_line(changes: dict[str, str], fault: str) -> None:
    asv.TASK.check(items())
    with pytest.raises(UserError, match=fault):
        asv.TASK.check(items(**changes))


def test_labels_are_the_training_speakers_and_trials_have_none() -> None:
    labels = asv.labels("train", ["b", "a", "b"])
    assert labels.symbols == ("a", "b") and labels.encode("b") == [1]
    assert labels.unknown(trials.write([(1, "x")])) == []
    with pytest.raises(UserError, match="speaker 'c' is a target in dev or test"):
        labels.unknown("c")
    with pytest.raises(UserError, match="train holds trials"):
        asv.labels("train", ["a", trials.write([])])
