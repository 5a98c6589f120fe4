"""Adam: the numbers of torch.optim, a state that can be saved, and no compiler imported."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from downstream.run.adam import Adam
from tests.conftest import ROOT

HEAD_IS_TRAINED = """
import copy, sys, torch
from downstream.run.adam import Adam
from downstream.base import HEADS
from downstream.recipe import Train
from downstream.run.learner import Batch, Lanes, Learner
options, shape = {"projector": 4, "hidden": 4}, (2, 5, 3)
first = HEADS["recurrent_ctc"](*shape, **options)
train = Train(steps=1, batch=2, lr=[1e-3], eval_every=1)
run = Learner(train, 1e-3, copy.deepcopy(first))
Lanes([run], "cpu").backward(Batch(torch.randn(2, 2, 9, 5), torch.tensor([9, 7]), [[1], [2]]), 0)
run.update()
assert any((p != q).any() for p, q in zip(run.head.parameters(), first.parameters()))
print("torch._dynamo" in sys.modules)
"""


def weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in [(13,), (40, 7), (7,), (1, 3, 2)]]


def give_gradients(parameters: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 10 ** (step % 5 - 3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("lr", [1e-4, 1e-1])
def test_fifty_steps_are_torch_optims(name: str, lr: float) -> None:
    ours, theirs = weights(), weights()
    mine, reference = Adam(ours, lr, name == "AdamW"), getattr(torch.optim, name)(theirs, lr=lr)
    for step in range(50):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        reference.step()
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-6) for p, q in zip(ours, theirs))
    assert not any(torch.equal(p, q) for p, q in zip(ours, weights()))


def test_a_step_can_be_left_out_by_what_a_device_finds() -> None:
    """As if it had not been: s3prl leaves out updates whose gradients are not finite."""
    ours, theirs = weights(), weights()
    mine, reference = Adam(ours, 1e-2), Adam(theirs, 1e-2)
    for step, out in enumerate([False, True, False]):
        give_gradients(ours, step)
        if out:
            ours[0].grad = ours[0].grad * torch.nan  # type: ignore[operator]
        mine.step(unless=torch.tensor(out))
        if not out:
            give_gradients(theirs, step)
            reference.step()
    assert all(map(torch.equal, ours, theirs))
    assert mine.steps[0] == 2


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    unbroken, broken = weights(), weights()
    one, two = Adam(unbroken, 1e-2), Adam(broken, 1e-2)
    for step in range(20):
        for parameters, optimizer in ((unbroken, one), (broken, two)):
            give_gradients(parameters, step)
            optimizer.step()
        if step == 9:
            file = io.BytesIO()
            torch.save(two.state_dict(), file)
            file.seek(0)
            two = Adam(broken, 1e-2)
            two.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(unbroken, broken))


def test_training_a_head_never_imports_torchs_compiler() -> None:
    found = subprocess.run(
        [sys.executable, "-c", HEAD_IS_TRAINED], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout.strip() == "False", found.stderr
