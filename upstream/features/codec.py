"""Features of utterances as a head sees them, and how a frame is written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from upstream.common.errors import UserError

Kind = Literal["mean", "float16", "int8", "cnn"]
Array = np.ndarray[Any, np.dtype[Any]]
Mapped = np.memmap[Any, np.dtype[Any]]
IN_MEMORY = 4e9  # bytes of means that are held in memory: VoxCeleb1's three and more
SMALLEST = torch.finfo(torch.float32).tiny  # a frame of zeros has no scale
KINDS: dict[Kind, str] = {
    "mean": "time means, float32 [L, D]",
    "float16": "frames [T, L, D]",
    "int8": "frames [T, L, D] with a scale per frame and layer",
    "cnn": "the outputs of the frozen CNN, float32 [T, C]",
}


class Features(Protocol):
    """Features of N utterances by index."""

    layers: int
    dim: int
    lens: Tensor  # [N] frames

    @property
    def error(self) -> float:
        """Relative RMS error of keeping 8 bits, so far as it was measured; 0 for other kinds."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D] (or [L, B, D] for means) float32 and lens [B]."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of N utterances lie."""

    shards: list[Callable[[], dict[str, Mapped]]]  # each checks and maps the arrays of a shard
    place: Array  # [N, 2] int64: shard, first row
    lens: Tensor  # [N] frames
    shape: Sequence[int]  # of a row: [L, D], or [C] of a CNN
    reading: object  # keeps the entry from being evicted as long as the features are in use
    mapped: dict[int, dict[str, Mapped]] = field(default_factory=dict)

    def read(self, index: int, frames: int) -> dict[str, Array]:
        """The arrays of an utterance's rows. Raises UserError for damage.

        They are read, not mapped: a mapping costs a page fault every 4 kB in every epoch.
        """
        number, first = self.place[index].tolist()
        if number not in self.mapped:
            self.mapped[number] = self.shards[number]()
        rows = {}
        for name, mapped in self.mapped[number].items():
            width = int(np.prod(mapped.shape[1:]))
            offset = mapped.offset + first * width * mapped.itemsize
            try:
                flat = np.fromfile(str(mapped.filename), mapped.dtype, width * frames, "", offset)
            except OSError as error:  # another process found it damaged
                raise UserError(f"{mapped.filename}: gone; run the same command again") from error
            rows[name] = flat.reshape(frames, *mapped.shape[1:])
        return rows


class Means:
    """Time means: in memory, or on disk if they would take too much of it."""

    error = 0.0

    def __init__(self, rows: Rows) -> None:
        self.rows, self.lens = rows, rows.lens
        self.layers, self.dim = rows.shape
        size = len(self.lens) * self.layers * self.dim * 4
        self.values = self._values(range(len(self.lens))) if size <= IN_MEMORY else None

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, D], lens [B]. Raises UserError for a damaged shard."""
        chosen = torch.as_tensor(indices)
        values = self._values(indices) if self.values is None else self.values[chosen]
        return values.transpose(0, 1), self.lens[chosen]

    def _values(self, indices: Sequence[int]) -> Tensor:
        values = np.empty((len(indices), self.layers, self.dim), np.float32)
        for row, index in zip(values, indices):
            row[:] = self.rows.read(index, 1)["rows"][0]
        return torch.from_numpy(values)


class Frames:
    """All frames on disk; outputs of a CNN count as one layer."""

    def __init__(self, rows: Rows, error: float) -> None:
        self.rows, self.lens, self.error = rows, rows.lens, error
        *layers, self.dim = rows.shape
        self.layers = layers[0] if layers else 1

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [L, B, T, D] zero-padded, lens [B]. Raises UserError for a damaged shard."""
        lens = self.lens[torch.as_tensor(indices)]
        x = np.zeros((self.layers, len(indices), int(lens.max()), self.dim), np.float32)
        for row, (index, n) in enumerate(zip(indices, lens.tolist())):
            arrays = self.rows.read(index, n)
            # converts into place, without a float32 copy
            kept = arrays["rows"].reshape(n, self.layers, self.dim).transpose(1, 0, 2)
            np.copyto(x[:, row, :n], kept)
            if "scales" in arrays:
                x[:, row, :n] *= arrays["scales"].T[:, :, None]
        return torch.from_numpy(x), lens


def encode(kind: Kind, x: Tensor, name: str = "") -> tuple[dict[str, Array], float]:
    """The arrays that `kind` keeps of one utterance, and the relative RMS error of doing so.

    x: [T, L, D] float32, [1, L, D] for means, [T, C] for the CNN. The error is over frames and
    layers, each relative to its own size; it is measured for int8 only, 0 otherwise.
    Raises UserError, naming `name`, for numbers that are too large for float16.
    """
    if kind == "int8":
        steps, scales = _quantised(x)
        tensors = {"rows": steps.to(torch.int8), "scales": scales}
        error = _error(x, steps * scales[..., None])
    else:
        tensors, error = {"rows": _halved(x, name) if kind == "float16" else x}, 0.0
    return {name: t.contiguous().cpu().numpy() for name, t in tensors.items()}, error


def through(kind: Kind, x: Tensor, name: str = "") -> tuple[Tensor, float]:
    """x [..., D] as it would come back from the disk, and the error as of `encode`."""
    if kind == "float16":
        return _halved(x, name).float(), 0.0
    if kind == "int8":
        steps, scales = _quantised(x)
        decoded = steps * scales[..., None]
        return decoded, _error(x, decoded)
    return x, 0.0


def _halved(x: Tensor, name: str) -> Tensor:
    half = x.half()
    if not torch.isfinite(half).all():
        raise UserError(f"{name}: hidden states too large for float16; use frames: int8")
    return half


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole steps from -127 to 127 like x, and their size [...]."""
    scales = (x.abs().amax(-1) / 127).clamp(min=SMALLEST)
    return (x / scales[..., None]).round(), scales


def _error(x: Tensor, decoded: Tensor) -> float:
    noise = (decoded - x).square().mean(-1)
    return float((noise / x.square().mean(-1).clamp(min=SMALLEST)).mean().sqrt())
