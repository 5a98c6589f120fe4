"""The yardstick: this machine's matrix-multiply peak, and how much arithmetic the work needs."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 2048  # on a CPU: large enough for a matrix product at its peak, small enough to repeat
TRIALS = 8


def clock(device: str) -> float:
    """Seconds, after all the work given to the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the best of several products of square matrices, float32 without TF32."""
    size = SIZE if device == "cpu" else 4 * SIZE  # a GPU needs more to be busy
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(TRIALS):
        begun = clock(device)
        torch.mm(a, b)
        best = min(best, clock(device) - begun)
    return 2 * size**3 / best


def describe(device: str) -> dict[str, Any]:
    """What the figures were measured on, and with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def memory_gb(device: str) -> dict[str, float]:
    """The most memory this process has held so far, in main memory and on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    held = {"main": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device != "cpu":
        held["gpu"] = torch.cuda.max_memory_allocated() / 1e9
    return held


def frames(config: Any, samples: int) -> int:
    """How many frames the CNN makes."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride):
        samples = (samples - kernel) // stride + 1
    return samples


def cnn_flops(config: Any, samples: int) -> float:
    """Multiplications and additions of the convolutional front end for one utterance."""
    total, width = 0.0, 1
    for channels, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride):
        samples = (samples - kernel) // stride + 1
        total += 2.0 * samples * kernel * width * channels
        width = channels
    return total


def encoder_flops(config: Any, samples: int) -> float:
    """Multiplications and additions of one pass over one utterance of so many samples.

    Only matrix products and convolutions: 14.6 GFLOP per second of speech for a Base model. The
    attention map grows with the square of the length, so every utterance is counted as it is.
    """
    length, dim, inner = frames(config, samples), config.hidden_size, config.intermediate_size
    position = config.num_conv_pos_embeddings * dim * dim / config.num_conv_pos_embedding_groups
    block = 4 * dim * dim + 2 * dim * inner + 2 * length * dim
    once = config.conv_dim[-1] * dim + position
    return cnn_flops(config, samples) + 2.0 * length * (once + config.num_hidden_layers * block)


def head_flops(head: nn.Module, layers: int, dim: int, classes: int) -> float:
    """Of one row (a frame, or a time mean) in a training step: forward and both halves of backward.

    The least that gives the same update: a head without a recurrent layer is one affine map.
    """
    matrices: list[Tensor] = [p for p in head.parameters() if p.dim() == 2]
    recurrent = any(isinstance(module, nn.LSTM) for module in head.modules())
    weights = sum(p.numel() for p in matrices) if recurrent else dim * classes
    return 6.0 * weights + 4.0 * layers * dim
