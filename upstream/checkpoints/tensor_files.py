"""Files of tensors: read without trusting them, written whole or not at all.

Reading maps a file into memory: a tensor costs nothing until it is used, and its pages are the
system's to drop again (torch's format before 1.6 excepted, which is read whole).
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import re
import types
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from upstream.checkpoints.foreign import explain_pickle
from upstream.common import disk
from upstream.common.errors import UserError

DICTIONARY = "fairseq.data.dictionary.Dictionary"  # HuBERT files carry some along
PICKLE_BYTES = 8 << 20  # the pickle of a model of 2 B parameters with its optimizer has under 1 MB
PICKLE_STEPS = 1_000_000  # that model takes 100,000; reading a million takes seconds
EXPANDED = 5_000_000  # items that a file's entries may have when every reference is followed
ENDLESS = "refused: its entries repeat each other without end"
# What a pickle may name. None of it runs code or makes memory that the file does not hold.
ALLOWED = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|(__builtin__|builtins)\.set"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter"
    r"|torch(\.storage)?\.(\w*Storage|Size|device|bool|[a-z]+\d+\w*)|" + re.escape(DICTIONARY)
)
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Inert:
    """Stands in for fairseq's Dictionary. Holds what the file says, does nothing."""


@contextmanager
def guarded(
    path: Path, reason: str = "not a checkpoint, or a truncated one; copy it again"
) -> Iterator[None]:
    """Whatever a hostile or damaged file makes fail inside becomes one line about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in any way; all mean the same to the user
        if isinstance(error, OSError) and error.strerror:
            raise disk.Unreadable(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: {reason}") from error


def load(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's content, and the metadata of safetensors. Raises UserError.

    Tensors (mapped, on the CPU, in the stored dtype), plain containers, argparse.Namespace and
    `Inert` are all that is ever made; a file that names anything else is refused unopened.
    """
    disk.require_file(path)
    with guarded(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                metadata = dict(sorted((file.metadata() or {}).items()))
                return {name: file.get_tensor(name) for name in names}, metadata
        zipped = _inspect(path)
        allowed = [argparse.Namespace, (Inert, DICTIONARY)]
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(content, dict) or not content:
            raise UserError(f"{path}: not a checkpoint: holds a {type(content).__name__}")
        storages: dict[int, int] = {}
        if _items(content, {}, storages, path) > EXPANDED:
            raise UserError(f"{path}: {ENDLESS}")
        if sum(storages.values()) > path.stat().st_size:
            raise UserError(f"{path}: refused: asks for more memory than the file has bytes")
        return content, {}


def _inspect(path: Path) -> bool:
    """Refuse a torch file that would run code or never end; whether it is the zip format."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            stream = io.BytesIO(file.read(PICKLE_BYTES))
            for _ in range(5):  # magic number, protocol, system, content, keys; then the storages
                _scan(stream, path)
            return False
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            pickles = [member for member in members if member.filename.endswith("/data.pkl")]
            sound = len(set(archive.namelist())) == len(members) and len(pickles) == 1
            if not sound or any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise UserError(f"{path}: not a checkpoint: a zip file that torch did not write")
            if pickles[0].file_size > PICKLE_BYTES:
                raise UserError(f"{path}: refused: {pickles[0].file_size >> 20} MB beside tensors")
            _scan(io.BytesIO(archive.read(pickles[0])), path)
            return True


def _scan(stream: io.BytesIO, path: Path) -> None:
    """Read one pickle's instructions without following them. Raises UserError."""
    sizes, protocol = _Sizes(), 0
    texts = deque(["", ""], maxlen=2)  # the last two: module and name, if a name is made of them
    for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if step > PICKLE_STEPS:
            raise UserError(f"{path}: refused: has more than {PICKLE_STEPS} entries beside tensors")
        if isinstance(argument, str):
            texts.append(argument.replace(" ", "."))
        if code.name == "PROTO":
            protocol = int(argument or 0)
        if code.name in ("GLOBAL", "INST") and not ALLOWED.fullmatch(texts[1]):
            raise UserError(_way_out(path, texts[1]))
        if code.name == "STACK_GLOBAL":
            raise UserError(_way_out(path, ".".join(texts)))
        if sizes.follow(code, argument) > EXPANDED:
            raise UserError(f"{path}: {ENDLESS}")
    if protocol != 2:
        raise UserError(f"{path}: not a checkpoint: torch writes no pickle of protocol {protocol}")


class _Sizes:
    """How many items each object on an unpickler's stack has when every reference is followed.

    Of tuples and what is made from them only: as a key of a dict, one that repeats itself n deep
    takes 2^n steps to hash, for ever.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []  # None is a mark
        self.memo: dict[Any, int] = {}

    def follow(self, code: pickletools.OpcodeInfo, argument: Any) -> int:
        """Do to the sizes what an instruction does to its objects; the size of what it makes."""
        if code.name.endswith("PUT"):
            self.memo[argument] = self.stack[-1] or 1
            return 1
        if code.name.endswith("GET"):
            self.stack.append(self.memo[argument])
            return 1
        needs = [item.name for item in code.stack_before]
        taken: list[int | None] = list(iter(self.stack.pop, None)) if "mark" in needs else []
        taken += [self.stack.pop() for name in needs if name not in ("mark", "stackslice")]
        nested = code.name.startswith(("TUPLE", "REDUCE", "NEWOBJ"))
        size = 1 + sum(filter(None, taken)) if nested else 1
        self.stack += [None if item.name == "mark" else size for item in code.stack_after]
        return size


def _items(value: Any, sizes: dict[int, int], storages: dict[int, int], path: Path) -> int:
    """How many items `value` has if every reference is followed; collects its storages' bytes."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return 1
    if isinstance(value, (str, bytes)):
        return 1 + len(value) // 16
    if isinstance(value, dict) and getattr(value, "__dict__", {}).keys() - {"_metadata"}:
        raise UserError(f"{path}: refused: a dictionary with attributes of its own")
    if isinstance(value, (argparse.Namespace, Inert)):
        value = vars(value)
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = EXPANDED  # met again below itself: a cycle
        children = [*value, *(dict.values(value) if isinstance(value, dict) else ())]
        sizes[id(value)] = 1 + sum(_items(child, sizes, storages, path) for child in children)
    return sizes[id(value)]


def _way_out(path: Path, needs: str) -> str:
    if fault := explain_pickle(needs):
        return f"{path}: {fault}"
    return (
        f"{path}: would have to run code ({needs[:80]!r}) and is not opened. If you trust it, keep "
        f'its tensors only: python -c "import torch, safetensors.torch as s; c = torch.load('
        f"'{path}', 'cpu', weights_only=False); w = c.get('model_weight') or c.get('model') or "
        "c.get('Upstream') or c.get('state_dict') or c; s.save_file({k: v.clone() for k, v in "
        f"w.items() if torch.is_tensor(v)}}, '{path.with_suffix('.safetensors')}')\""
    )


_PythonPickler: Any = pickle._Pickler  # the one whose steps can be overridden


class _Pickler(_PythonPickler):
    """Writes `Inert` under the name of the class it stands for."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is not Inert:
            return super().save_global(obj, name)
        self.write(pickle.GLOBAL + "\n".join([*DICTIONARY.rsplit(".", 1), ""]).encode())
        return self.memoize(obj)


def save_torch(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, whole or not at all; the same content gives the same bytes."""
    pickle_module = types.SimpleNamespace(__name__="pickle", Pickler=_Pickler)
    # through an open file: torch writes a path's name into the archive
    with disk.writing(path), disk.whole(path) as part, part.open("wb") as file:
        _save(content, file, pickle_module=pickle_module)


def _save(content: Any, file: BinaryIO, **options: Any) -> None:
    """`torch.save`, which hides the disk's error behind one of its own. Raises OSError."""
    try:
        torch.save(content, file, **options)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def save_state(content: Any, path: Path, before: Path | None = None) -> None:
    """The state of interrupted work, whole or not at all, for `load_state`. Raises UserError.

    before: where an older state at `path` is moved to, which stays should the new one be torn.
    """
    with disk.writing(path), disk.whole(path) as part:
        with part.open("wb") as file:
            _save(content, file)
        if before and path.exists():
            disk.rename(path, before)


def load_state(path: Path, device: torch.device | str = "cpu", reason: str = "damaged") -> Any:
    """What `save_state` wrote; runs no code. Raises UserError if any byte is not as it was written,
    and Unreadable for a read that failed for now.
    """
    with guarded(path, reason):
        with disk.open_file(path) as file, zipfile.ZipFile(file) as archive:
            if torn := archive.testzip():  # torch does not look at the checksums
                raise ValueError(torn)
        _inspect(path)
        return torch.load(path, weights_only=True, map_location=device)


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    values: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write safetensors, one tensor in memory at a time; the same tensors give the same bytes.

    The format: 8 bytes with the header's length (little-endian), the header (JSON: dtype, shape
    and place of each tensor), then the data without gaps, widest types first so that all are
    aligned. `dtype` casts. `values`: the tensors themselves, in any order, where they are only
    made now and `tensors` says what they are like. UserError for a dtype that the format lacks.
    """
    kinds = {name: (dtype or tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name)):
        kind, shape = kinds[name]
        if kind not in DTYPES:
            raise UserError(f"{path}: {name} is {kind}: not a type of safetensors here")
        start, end = end, end + shape.numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with disk.writing(path), disk.whole(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items() if values is None else values:
            kind, shape = kinds.pop(name)
            if tensor.shape != shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            tensor = tensor.detach().to("cpu", kind).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if kinds:
            raise ValueError(f"{path}: {', '.join(kinds)} never came")
