"""What gradient checkpointing saves and costs: `python -m tests.bench.checkpointing [SECONDS]`.

One forward and backward pass of stage 1 through a HuBERT Base of random weights, four utterances
that last so long together (60), in a process of its own each. Memory is the peak beyond what the
process has with weights and gradients in place.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time

import torch

from upstream.checkpoints.read import Checkpoint
from upstream.encoder.config import FAMILIES, Config
from upstream.encoder.encoder import Encoder
from upstream.encoder.transformer import Model

SETTINGS = {"model_type": "hubert", "hidden_size": 768, "num_hidden_layers": 12}
UTTERANCES = 4


def used() -> float:
    """Peak memory of this process in GB (of Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024


def measure(checkpointing: bool, seconds: float) -> None:
    """Print one line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(Config.read(SETTINGS, FAMILIES["hubert"], ""))
    state = {name: 0.02 * torch.randn_like(t) for name, t in model.state_dict().items()}
    encoder = Encoder(Checkpoint("hubert", SETTINGS, state, False, "random")).train()
    del model, state
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    encoder.model.encoder.checkpointing = checkpointing
    frames = round(seconds / UTTERANCES * 50)
    x, lens = torch.randn(UTTERANCES, frames, 512), torch.full((UTTERANCES,), frames)
    before, begun = used(), time.process_time()
    encoder.contextual(x, lens, lens).layers[-1].square().mean().backward()
    spent = time.process_time() - begun
    name = "checkpointing" if checkpointing else "plain"
    print(f"{name:<14} {used() - before:6.2f} GB {spent:7.1f} CPU-s for {seconds:g} s of audio")


if __name__ == "__main__":
    length = float(sys.argv[1]) if sys.argv[1:] else 60.0
    for on in (False, True):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(on, length))
        process.start()
        process.join()
