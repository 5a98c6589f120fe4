"""Heads: SUPERB's sizes, s3prl's own functions, exactness of means, padding, SpecAugment."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from downstream.tasks.heads import FrameCTC, RecurrentCTC, Utterance
from downstream.tasks.specaug import specaug
from tests.optional import optional

s3prl_asr = optional("s3prl.downstream.asr.model")
s3prl = optional("s3prl.downstream.model")

LENS = torch.tensor([9, 4, 7])


def size(head: nn.Module) -> int:
    return sum(p.numel() for name, p in head.named_parameters() if name != "layer_weights")


@pytest.mark.parametrize(
    "dim, pr, sid, er, asr, ted",
    [  # spec, table of head sizes
        (768, 215_882, 518_371, 197_892, 42_828_832, 4_419_872),
        (1024, 281_418, 583_907, 263_428, 43_090_976, 4_485_408),
        (240, 80_714, 383_203, 62_724, 42_288_160, 4_284_704),
    ],
)
def test_sizes_are_superbs(dim: int, pr: int, sid: int, er: int, asr: int, ted: int) -> None:
    assert size(FrameCTC(13, dim, 74)) == pr
    assert size(Utterance(13, dim, 1251)) == sid
    assert size(Utterance(13, dim, 4)) == er
    assert size(RecurrentCTC(13, dim, 32)) == asr
    assert size(RecurrentCTC(1, dim, 32, projector=256, hidden=256, depth=3)) == ted


def test_weighted_sum_starts_uniform_and_one_layer_has_no_weight() -> None:
    x = torch.randn(5, 3, 9, 6)
    assert torch.allclose(Utterance(5, 6, 2).weighted_sum(x), x.mean(0), atol=1e-6)
    assert not Utterance(1, 6, 2).layer_weights.requires_grad


def test_time_means_are_exact_for_the_utterance_head() -> None:
    head = Utterance(4, 6, 5).double()
    head.layer_weights.data = torch.randn(4).double()
    x = torch.randn(4, 3, 9, 6).double()
    means = torch.stack([x[:, i, :n].mean(1) for i, n in enumerate(LENS)], 1)
    assert (head(x, LENS) - head(means, LENS)).abs().max() < 1e-12


def test_utterance_head_is_s3prls() -> None:
    head, projector, theirs = (
        Utterance(1, 6, 5),
        nn.Linear(6, 256),
        s3prl.UtteranceLevel(256, 5, post_net={"select": "FrameLevel"}),
    )
    head.projector.load_state_dict(projector.state_dict())
    head.linear.load_state_dict(theirs.post_net.linear.state_dict())
    x = torch.randn(3, 9, 6)
    assert torch.allclose(head(x[None], LENS), theirs(projector(x), LENS)[0], atol=1e-6)


def test_frame_head_is_s3prls() -> None:
    head, projector, theirs = FrameCTC(1, 6, 5), nn.Linear(6, 256), s3prl.FrameLevel(256, 5)
    head.projector.load_state_dict(projector.state_dict())
    head.linear.load_state_dict(theirs.linear.state_dict())
    x = torch.randn(3, 9, 6)
    assert torch.allclose(head(x[None], LENS), theirs(projector(x), LENS)[0], atol=1e-6)


def test_recurrent_head_and_its_gradients_are_s3prls_packed_lstm() -> None:
    torch.manual_seed(0)
    head = RecurrentCTC(1, 6, 5, projector=8, hidden=7, depth=2, dropout=0.0)
    projector = nn.Linear(6, 8)
    both = [False, False]
    theirs = s3prl_asr.RNNs(
        8, 5, 320, "LSTM", True, [7, 7], [0, 0], both, both, [1, 1], "concat", -1
    )
    head.projector.load_state_dict(projector.state_dict())
    head.linear.load_state_dict(theirs.linear.state_dict())
    for layer, ahead, back in zip(theirs.rnns, head.ahead, head.back):
        weights = layer.layer.state_dict()
        ahead.load_state_dict({k: v for k, v in weights.items() if "reverse" not in k})
        back.load_state_dict(
            {k.replace("_reverse", ""): v for k, v in weights.items() if "reverse" in k}
        )
    order = torch.tensor([0, 2, 1])  # s3prl packs utterances in falling length
    x = torch.randn(3, 9, 6)[order]
    lens = LENS[order]
    ours, reference = head(x[None], lens), theirs(projector(x), lens)[0]
    for i, n in enumerate(lens):
        assert torch.allclose(ours[i, :n], reference[i, :n], atol=1e-5)
    targets = [[1, 2], [3], [4, 4]]
    head.loss(ours, lens, targets).backward()
    head.loss(reference, lens, targets).backward()
    grad = theirs.rnns[0].layer.weight_hh_l0_reverse.grad
    assert torch.allclose(head.back[0].weight_hh_l0.grad, grad, atol=1e-6)


@pytest.mark.parametrize("kind", [Utterance, FrameCTC, RecurrentCTC])
def test_padding_has_no_say(kind: type) -> None:
    head = kind(2, 6, 5).eval()
    x = torch.randn(2, 3, 9, 6)
    spoilt = x.clone()
    for i, n in enumerate(LENS):
        spoilt[:, i, n:] = 100.0
        x[:, i, n:] = 0.0
    assert head.predict(head(x, LENS), LENS) == head.predict(head(spoilt, LENS), LENS)
    alone = head(x[:, 1:2, :4], LENS[1:2])
    assert torch.allclose(
        head(spoilt, LENS)[1][: alone[0].shape[0]] if alone.dim() == 3 else head(spoilt, LENS)[1],
        alone[0], atol=1e-5,
    )  # fmt: skip


def test_decoding_collapses_runs_and_drops_blanks() -> None:
    logits = nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2, 2, 0, 3]]), 5).float()
    assert FrameCTC(1, 2, 5).predict(logits, torch.tensor([7])) == [[1, 1, 2]]


def test_loss_divides_by_target_length_and_ignores_the_impossible() -> None:
    head = FrameCTC(1, 6, 5)
    x = torch.randn(1, 2, 9, 6)
    lens = torch.tensor([9, 2])
    logits = head(x, lens)
    alone = nn.functional.ctc_loss(
        logits[:1].log_softmax(-1).transpose(0, 1), torch.tensor([[1, 2]]), lens[:1],
        torch.tensor([2]), reduction="none",
    )  # fmt: skip
    impossible = [1, 1, 1, 1]  # needs more than two frames
    assert torch.allclose(head.loss(logits, lens, [[1, 2], impossible]), alone[0] / 2 / 2)


def test_specaug_masks_at_most_what_superb_allows() -> None:
    torch.manual_seed(1)
    lens = torch.tensor([300, 200, 8])
    x = torch.ones(3, 300, 240)
    out = specaug(x, lens)
    assert out.shape == x.shape and torch.isfinite(out).all()
    columns = (out[0].abs().sum(0) == 0).sum()
    rows = (out[0].abs().sum(1) == 0).sum()
    assert 0 < columns <= 4 * 49 and rows <= 2 * 39
    assert not torch.equal(out, x)
