"""The checker keeps no secret: good upstreams keep every promise, each bad habit breaks its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

import upstream
from upstream.base import Hidden, Upstream
from upstream.check import PROMISES, check


def broken(model: Upstream) -> set[str]:
    return {promise.name for promise in check(model) if not promise.kept}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_family_keeps_every_promise(variant: str, tmp_path: Path) -> None:
    results = check(tiny.encoder(tmp_path, variant))
    assert [promise for promise in results if not promise.kept] == []
    assert [promise.name for promise in results] == list(PROMISES)
    assert all(promise.evidence and "\n" not in promise.evidence for promise in results)


@pytest.mark.parametrize("name", ["fbank", "fbank_no_cmvn"])
def test_fbank_keeps_every_promise(name: str) -> None:
    assert broken(upstream.load(name)) == set()


def test_s3prl_padding_is_found_out(tmp_path: Path) -> None:
    assert broken(tiny.encoder(tmp_path, padding="s3prl")) == {"padding has no say"}


class Good(Upstream):
    """Mean of each 160 samples, twice; the frames of an utterance are its own."""

    num_layers, dim, stride = 2, 4, 160

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(1, 4)
        self.eval()

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        wavs = torch.nn.functional.pad(wavs, (0, -wavs.shape[1] % 160))
        x = self.project(wavs.unflatten(1, (-1, 160)).mean(-1, keepdim=True))
        return Hidden(torch.stack([x, x]), (lens + 159) // 160)


class Shape(Good):
    num_layers = 3


class Dtype(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        return Hidden(super().forward(wavs, lens).layers.double(), lens // 160)


class FrameCount(Good):
    stride = 320


class Lengths(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        return Hidden(super().forward(wavs, lens).layers, lens)


class Finite(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        hidden = super().forward(wavs, lens)
        return Hidden(hidden.layers.log(), hidden.lens)


class Silence(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        hidden = super().forward(wavs, lens)
        return Hidden(hidden.layers / wavs.abs().amax(1)[:, None, None], hidden.lens)


class Short(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        if wavs.shape[1] < 400:
            raise RuntimeError("kernel larger\nthan input")
        return super().forward(wavs, lens)


class Random(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        hidden = super().forward(wavs, lens)
        return Hidden(hidden.layers + torch.rand(1), hidden.lens)


class Training(Good):
    def __init__(self) -> None:
        super().__init__()
        self.project.train()


class Padding(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        hidden = super().forward(wavs, lens)
        return Hidden(hidden.layers - hidden.layers.mean(2, keepdim=True), hidden.lens)


class Meddling(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        hidden = super().forward(wavs, lens)
        wavs.mul_(0.5)
        return hidden


class Gradient(Good):
    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        if torch.is_inference_mode_enabled():
            return super().forward(wavs, lens)
        with torch.enable_grad():
            return super().forward(wavs, lens)


class Anonymous(Good):
    def fingerprint(self) -> str:
        return "0123456789ab"


BAD = [
    (Shape, "shape"),
    (Dtype, "dtype"),
    (FrameCount, "frame count"),
    (Lengths, "lengths"),
    (Finite, "finite"),
    (Silence, "silence"),
    (Short, "very short input"),
    (Random, "determinism"),
    (Training, "eval mode"),
    (Padding, "padding has no say"),
    (Meddling, "input untouched"),
    (Gradient, "no gradient"),
    (Anonymous, "fingerprint"),
]


def test_each_promise_has_a_model_that_breaks_it() -> None:
    assert broken(Good()) == set()
    assert {promise for _, promise in BAD} == set(PROMISES)


@pytest.mark.parametrize(("model", "promise"), BAD)
def test_a_bad_habit_breaks_its_promise(model: type[Good], promise: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = {result.name: result for result in check(model())}
    assert not results[promise].kept, results[promise].evidence
    assert "\n" not in results[promise].evidence


def test_checking_changes_no_weight(tmp_path: Path) -> None:
    model = tiny.encoder(tmp_path)
    before = model.fingerprint()
    check(model)
    assert model.fingerprint() == before
