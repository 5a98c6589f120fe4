"""A GPU that is not there: tensors that say they are on one, and compute on the CPU.

On a machine without a GPU the project can so be run with `--device cuda` as far as its own logic
goes: a tensor of the CPU that meets one of the device is an error here too, so is NumPy that looks
at what lies on the device, and every time that the CPU has to wait for it is counted. Kernels,
memory, low precision and speed are not tested so.

To PyTorch's own code a tensor of the device is one of "meta", for which it asks no driver.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
# whose result is a number, or has a size, that the CPU must know
WAIT = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_consecutive,
    aten._unique2, aten.unique_dim, aten.equal, aten.is_nonzero,
}  # fmt: skip
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PACK = aten._pack_padded_sequence  # whose lengths and batch sizes stay on the CPU
MIXED = {aten.copy_, aten._to_copy, PACK, *BY_INDEX}  # may take tensors of both


class Far(Tensor):
    """A tensor "on the GPU"; `near` has its numbers."""

    near: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=META,
        )  # fmt: skip
        far.near = near
        return far

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.near.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"far {self.near!r}"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _do(func, args, kwargs or {}, [])


class Device(TorchDispatchMode):
    """Sends what is asked of the device to it; `waits` names what the CPU waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _do(func, args, kwargs or {}, self.waits)


class _Named(TorchFunctionMode):
    """Where Python says "cuda", PyTorch's own code hears "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.device:
            args, kwargs = tree_map(_heard, (args, kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Far):
            args = (args[0], _index(args[1]), *args[2:])
        if func is torch.nn.functional.ctc_loss and isinstance(
            args[0], Far
        ):  # takes lengths from either
            lens = [each if isinstance(each, Far) else Far(each.clone()) for each in args[2:4]]
            args = (*args[:2], *lens, *args[4:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            return func(*args, **{**kwargs, "device": CPU}).to(META)
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """A list would become an index without numbers."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _heard(value: Any) -> Any:
    cuda = isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda"
    return META if cuda else value


def _do(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    packet = func.overloadpacket
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    far = [t for t in tensors if isinstance(t, Far)]
    near = [t for t in tensors if not isinstance(t, Far)]
    asked = kwargs.get("device")
    there = bool(far) if asked is None else torch.device(asked) == META
    if not far and not there:
        return func(*args, **kwargs)
    assert not any(t.device == META for t in near), f"{func}: a tensor without numbers"
    if far and packet not in MIXED and any(t.dim() for t in near):
        places = [(tuple(t.shape), str(t.device)) for t in tensors]
        raise RuntimeError(f"{func}: tensors on different devices: {places}")
    back = packet is aten.copy_ and not isinstance(args[0], Far)
    by_mask = packet in BY_INDEX and any(
        isinstance(t, Far) and t.dtype == torch.bool for t in args[1]
    )
    copied = packet is aten._to_copy and (bool(far) != there or not far)
    # a copy between the two waits, if it is not asked to go on from locked memory
    waited = copied and not (kwargs.get("non_blocking") and (far or hasattr(near[0], "locked")))
    if waited or (far and (packet in WAIT or back or by_mask)):
        waits.append(str(func))
    if packet is aten._fused_sdp_choice:
        return 0  # plain mathematics
    if there and asked is not None:
        kwargs = {**kwargs, "device": CPU}
    plain_args, plain = tree_map(_near, (args, kwargs))
    out = func(*plain_args, **plain)
    if packet is PACK:
        return Far(out[0]), out[1]
    if back or not there:
        return args[0] if back else out
    view = far and any(each.alias_info for each in func._schema.returns)
    # as everywhere, a view of a plain tensor is one in inference mode, too
    inference = torch.is_inference_mode_enabled() and not (view and not far[0].is_inference())
    with torch.inference_mode(inference):
        wrapped = tree_map(lambda t: Far(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if far else wrapped


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _locked(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.locked = True  # type: ignore[attr-defined]
    return copy


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream(_Event):
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...


@contextlib.contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Inside, `device="cuda"` can be used, in this thread."""
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "set_device": lambda _: None,
        "get_rng_state": lambda *_: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (8_000_000_000, 80_000_000_000),
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "get_device_name": lambda *_: "pretended",
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: _Stream(),
        "is_current_stream_capturing": lambda: False,
        "stream": lambda _: contextlib.nullcontext(),
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.backends.cudnn, "is_acceptable", lambda _: False)
    patch.setattr(torch.Tensor, "pin_memory", _locked)
    autocast, load = torch.autocast, torch.load

    def loaded(*args: Any, map_location: Any = None, **given: Any) -> Any:
        there = map_location is not None and torch.device(map_location).type == "cuda"
        content = load(*args, map_location=CPU, **given)
        wrap = lambda x: Far(x) if isinstance(x, Tensor) else x  # noqa: E731
        return tree_map(wrap, content) if there else content

    patch.setattr(torch, "load", loaded)
    patch.setattr(torch, "autocast", lambda _, *a, **given: autocast("cpu", *a, **given))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Device() as device, _Named():
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
