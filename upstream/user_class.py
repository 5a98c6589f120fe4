"""A user's own class, `mine.py:Mine`: its file is run, and what its output rests on is hashed.

Features are cached by fingerprint, so a class must get another one whenever it may give another
output. Part of it are, besides the options and the weights:

- the content of its file and of every module of the user's that this imports, in turn;
- every tensor and array that the object, or one of these modules, holds;
- the output for half a second of fixed noise: the size (RMS) of each layer, in three digits.

The last is a net under the first two, for instance for a file that is read in `forward`. Three
digits and one thread make it the same in every process, and nearly always on every machine: the
odds that rounding moves one of 13 layers over a boundary are about 1 in 300, and cost a
computation, not a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstream.base import Upstream
from upstream.common import user_code
from upstream.common.errors import UserError, near_miss

PROBE = 8_000  # samples


def loader_of(path: Path, name: str) -> Callable[..., Upstream]:
    """The class `name` of the user's file, a subclass of Upstream. Runs the file. UserError."""
    module = user_code.run(path)
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise UserError(f"{path} has no upstream {name}{near_miss(name, names)}")
    user_class = getattr(module, name)
    if not isinstance(user_class, type) or not issubclass(user_class, Upstream):
        raise UserError(f"{path}:{name} is not a subclass of upstream.base.Upstream")

    def construct(**options: Any) -> Upstream:
        built: Upstream = user_code.in_user_code(path, lambda: user_class(**options).eval())
        for field in ("num_layers", "dim", "stride"):
            if not isinstance(getattr(built, field, None), int):
                raise UserError(f"{path}:{name} must set self.{field} to a whole number")
        built.source, built.options = built.source or str(path), options
        built.evidence = _evidence(built, module)
        return built

    construct.__wrapped__ = user_class  # type: ignore[attr-defined]  # its signature: the options
    return construct


def _evidence(built: Upstream, module: ModuleType) -> dict[str, Any]:
    """What the output rests on besides options and weights, as JSON can hold it."""
    output = _probe(built)  # first: it may import modules and load files
    path = Path(str(module.__file__))
    weights = {id(tensor) for tensor in built.state_dict(keep_vars=True).values()}
    parts = [*built.modules(), module, *user_code.imported(path)]
    held = [tensor for part in parts for tensor in _tensors(vars(part))]
    digests = {_digest(tensor) for tensor in held if id(tensor) not in weights}
    return {"files": user_code.digest(path), "tensors": sorted(digests), "output": output}


def _probe(built: Upstream) -> list[str]:
    """The RMS of each layer for fixed noise; empty for a class that fails or is random.

    Its first use tells of the one, and `benchmark.py check` of the other.
    """
    noise = torch.randn(1, PROBE, generator=torch.Generator().manual_seed(0)) / 10
    weight = next(iter(built.state_dict().values()), noise)
    batch = noise.to(weight.device), torch.tensor([PROBE], device=weight.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            sizes = [built(*batch).layers.double().square().mean((1, 2, 3)).sqrt() for _ in "12"]
        first, second = ([f"{size:.2e}" for size in layers] for layers in sizes)
        return first if first == second else []
    except Exception:  # whatever a user's class raises
        return []
    finally:
        torch.set_num_threads(threads)


def _tensors(value: Any) -> Iterator[Tensor | np.ndarray[Any, Any]]:
    """Tensors and arrays in nested containers."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _digest(array: Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(array, Tensor):
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(array.tobytes()).hexdigest()
