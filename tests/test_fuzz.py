"""Broken, mismatched and hostile checkpoints: one line, or a success; never a crash or a hang."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from upstream.checkpoints import containers as container
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints.write import to_s3prl
from upstream.common.errors import UserError
from upstream.encoder.encoder import load

FUZZ = settings(
    max_examples=60,
    deadline=10_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZES: dict[str, Any] = {"conv_dim": [8] * 7, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small valid file of each format."""
    folder = tmp_path_factory.mktemp("valid")
    encoder = load(tiny.hf_folder(folder, **SIZES))
    content = to_s3prl(encoder)
    torch.save(content, folder / "zip.pt")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(encoder.model.state_dict(), folder / "bare.safetensors")
    names = ["zip.pt", "legacy.pt", "bare.safetensors"]
    return {name: (folder / name).read_bytes() for name in names}


NAMES = ["zip.pt", "legacy.pt", "bare.safetensors"]


@contextmanager
def ends(seconds: float = 120) -> Iterator[None]:
    """Not after ages: a bound on what hangs, far beyond what a slow machine needs (0.1 s)."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def outcome(path: Path) -> str:
    """The one line that opening `path` and building its encoder ends in, or `ok`."""
    message = "ok"
    with ends():
        try:
            found = container.open_container(path)
            assert sum(t.numel() * t.element_size() for t in found.tensors.values()) < 1 << 24
            load(path, family="hubert")
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert str(path) in message
            assert len(message) < 4000
    return message


def refused(path: Path, *words: str) -> None:
    message = outcome(path)
    assert all(word in message for word in words), message


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# -- random damage -------------------------------------------------------------------------------


@FUZZ
@given(content=st.binary(max_size=300), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
@pytest.mark.parametrize("name", NAMES)
def test_random_bytes(name: str, content: bytes, head: bytes, tmp_path: Path) -> None:
    assert outcome(put(tmp_path, name, head + content)) != "ok"


@pytest.mark.parametrize("name", NAMES)
def test_the_valid_files_are_valid(name: str, valid: dict[str, bytes], tmp_path: Path) -> None:
    done = outcome(put(tmp_path, name, valid[name]))
    assert done == "ok" or ("holds no architecture" in done and name == "bare.safetensors")


@FUZZ
@given(place=st.floats(0, 1))
@pytest.mark.parametrize("name", NAMES)
def test_truncated_anywhere(
    name: str, place: float, valid: dict[str, bytes], tmp_path: Path
) -> None:
    content = valid[name]
    refused(put(tmp_path, name, content[: int(place * (len(content) - 1))]), "not a checkpoint")


@pytest.mark.parametrize("name", NAMES)
def test_truncated_at_every_interesting_place(
    name: str, valid: dict[str, bytes], tmp_path: Path
) -> None:
    content, cuts = valid[name], {1, 2, 4, 7, 8, 9, 16, 63, 64, 65, 128}
    marks = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"data.pkl", b"}", b"storage")
    found = [content.find(mark) for mark in marks] + [content.rfind(mark) for mark in marks]
    for cut in sorted(cuts | {at + i for at in found if at > 0 for i in (0, 1, 4)}):
        refused(put(tmp_path, name, content[:cut]), "not a checkpoint")
    for cut in (1, 2, 8, 21, 22, 23):
        refused(put(tmp_path, name, content[:-cut]), "not a checkpoint")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_flipped_bits(name: str, data: Any, valid: dict[str, bytes], tmp_path: Path) -> None:
    """A flipped bit of a weight is another weight: no format's reader here checks sums."""
    content = bytearray(valid[name])
    header = 20_000  # mostly the pickle or the JSON, less the tensors
    ends = st.integers(0, min(header, len(content) - 1)) | st.integers(1, 6000).map(lambda i: -i)
    for place, bit in data.draw(st.lists(st.tuples(ends, st.integers(0, 7)), min_size=1)):
        content[place] ^= 1 << bit
    outcome(put(tmp_path, name, bytes(content)))


# -- safetensors ---------------------------------------------------------------------------------


def safe(header: Any, data: bytes = b"", length: int | None = None, order: str = "<Q") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(order, len(text) if length is None else length) + text + data


def entry(start: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":%s}'
HEADERS = {
    "big-endian length": safe({"a": entry(0, 4, 1)}, bytes(4), order=">Q"),
    "length of 2^60": safe({"a": entry(0, 4, 1)}, bytes(4), length=1 << 60),
    "length of 2^64-1": safe({"a": entry(0, 4, 1)}, bytes(4), length=(1 << 64) - 1),
    "length beyond the file": safe({"a": entry(0, 4, 1)}, bytes(4), length=500),
    "overlapping": safe({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12)),
    "a gap": safe({"a": entry(0, 4, 1), "b": entry(8, 12, 1)}, bytes(12)),
    "beyond the data": safe({"a": entry(0, 400, 100)}, bytes(4)),
    "backwards": safe({"a": entry(8, 0, 2)}, bytes(8)),
    "negative": safe({"a": entry(-8, 0, 2)}, bytes(8)),
    "shape is not the data": safe({"a": entry(0, 8, 3)}, bytes(8)),
    "absurd shape": safe({"a": entry(0, 8, 1 << 40, 1 << 40)}, bytes(8)),
    "overflowing to nothing": safe({"a": entry(0, 0, 1 << 32, 1 << 32)}),
    "negative shape": safe({"a": entry(0, 8, -1, -2)}, bytes(8)),
    "unknown dtype": safe({"a": entry(0, 8, 2, dtype="X9")}, bytes(8)),
    "half a byte": safe({"a": entry(0, 4, 8, dtype="F4")}, bytes(4)),
    "complex": safe({"a": entry(0, 8, 1, dtype="C64")}, bytes(8)),
    "duplicate keys": safe(TWICE % b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', bytes(8)),
    "not JSON": safe(b"{" * 64),
    "deep": safe(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a list": safe([1, 2]),
    "wrong types": safe({"a": {"dtype": 3, "shape": "x", "data_offsets": None}}),
    "metadata of numbers": safe({"__metadata__": {"a": 1}, "a": entry(0, 4, 1)}, bytes(4)),
    "not UTF-8": safe(b"\xff\xfe{}"),
    "nothing": b"",
    "no tensors": safe({}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    words = "no weights" if name == "no tensors" else "not a checkpoint"
    if name in ("half a byte", "complex"):
        words = "quantised" if name == "half a byte" else "not a plain tensor"
    if name in ("duplicate keys", "metadata of numbers", "deep"):
        words = ""  # the library may take the last, or refuse; neither finds an encoder
    refused(put(tmp_path, "x.safetensors", HEADERS[name]), words, "x.safetensors")


def test_names_that_are_no_names(tmp_path: Path) -> None:
    for name in ("a\nb", "a\x1b[31m", "a" * 501):
        path = put(tmp_path, "x.safetensors", safe({name: entry(0, 4, 1)}, bytes(4)))
        refused(path, "is no name of a tensor")
    torch.save({7: torch.zeros(1)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "'7' is no name of a tensor")


# -- pickles -------------------------------------------------------------------------------------


class Call:
    """Unpickling this calls something."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def zipped(pickled: bytes, **members: bytes) -> bytes:
    """A torch file around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in members.items():
            archive.writestr(f"archive/data/{name.strip('_')}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["zip", "plain"])
def test_no_command_is_run(protocol: int, where: str, tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    calls = [
        Call(os.system, f"touch {mark}"),
        Call(eval, f"open({str(mark)!r}, 'w')"),
        Call(torch.load, str(mark)),
        Call(bytearray, 1 << 40),
        Call(torch.FloatTensor, 1 << 40),
    ]
    for call in calls:
        pickled = pickle.dumps({"model": call}, protocol=protocol)
        content = zipped(pickled) if where == "zip" else pickled
        refused(put(tmp_path, "x.pt", content), "would have to run code")
    assert not mark.exists()


def bomb(depth: int, make: bytes) -> bytes:
    """A tuple of `depth` values, each of which holds the one before it twice."""
    out = b"(K\x01r\0\0\0\0"
    for i in range(depth):
        again = b"j" + struct.pack("<I", i)
        out += make % (again, again) + b"r" + struct.pack("<I", i + 1)
    return out + b"t"


TUPLES, LISTS = b"%s%s\x86", b"](%s%se"


def test_memo_bombs(tmp_path: Path) -> None:
    """Kilobytes that expand to 2^60 items: as a key (hashed), a value and a setting (printed)."""
    name = b"X\x01\0\0\0x"
    for kind, body in {
        "key": b"}" + bomb(60, TUPLES) + b"K\x01s",
        "value": b"}" + name + bomb(60, LISTS) + b"s",
        "tuple": b"}" + name + bomb(60, TUPLES) + b"s",
    }.items():
        path = put(tmp_path, f"{kind}.pt", zipped(b"\x80\x02" + body + b"."))
        refused(path, "repeat each other without end")
        refused(put(tmp_path, f"plain-{kind}.pt", b"\x80\x02" + body + b"."), f"plain-{kind}.pt")
    cycle: list[Any] = []
    cycle.append(cycle)
    torch.save({"model_cfg": cycle, "model_weight": {"a": torch.zeros(1)}}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "repeat each other without end")
    text = "x" * 100_000
    for _ in range(3):
        text = [text] * 100  # type: ignore[assignment]
    torch.save({"state_dict": {}, "hyper_parameters": text}, tmp_path / "t.pt")
    refused(tmp_path / "t.pt", "repeat each other without end")


def test_pickles_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PICKLE_STEPS", 20_000)  # to be quick
    for content, words in (
        (b"(" * 20_001, "has more than 20000 entries"),
        (b"(" * 1000, "not a checkpoint"),
        (b"]" * 9_000 + b"a" * 8_999, "holds a list"),
        (b"}X\1\0\0\0w" + b"]" * 9_000 + b"a" * 8_999 + b"s", "not a checkpoint"),
    ):
        refused(put(tmp_path, "x.pt", zipped(b"\x80\x02" + content + b".")), words)
    refused(put(tmp_path, "x.pt", zipped(bytes(9 << 20))), "refused: 9 MB beside tensors")
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28))
    refused(put(tmp_path, "x.pt", deflated.getvalue()), "torch did not write")


def rebuilt(storage: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of {"w": a tensor of `size` on storage 0 that claims `storage` floats}."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", storage
            return None

    class Rebuild:
        def __reduce__(self) -> tuple[Any, ...]:
            args = (Storage(), offset, size, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, args

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Rebuild()})
    return buffer.getvalue()


def test_tensors_that_the_file_does_not_hold(tmp_path: Path) -> None:
    data = bytes(64)
    refused(put(tmp_path, "x.pt", zipped(rebuilt(16, 0, (4, 4), (4, 1)), _0=data)), "not a HuBERT")
    for pickled in (
        rebuilt(16, 0, (1 << 40,), (1,)),
        rebuilt(1 << 40, 0, (1 << 40,), (1,)),
        rebuilt(16, 0, (1 << 40,), (0,)),  # stride 0: in bounds, and 4 TB once computed with
        rebuilt(16, 8, (4, 4), (4, 1)),
        rebuilt(16, -8, (4, 4), (4, 1)),
        rebuilt(16, 0, (4, 4), (-4, 1)),
        rebuilt(-16, 0, (4, 4), (4, 1)),
        rebuilt(1 << 62, 0, (1 << 62, 4), (4, 1)),
    ):
        assert outcome(put(tmp_path, "x.pt", zipped(pickled, _0=data))) != "ok"
        assert "not a HuBERT" not in outcome(put(tmp_path, "x.pt", zipped(pickled, _0=data)))
    refused(put(tmp_path, "x.pt", zipped(rebuilt(16, 0, (4,), (1,)))), "not a checkpoint")


def members(content: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]]) -> bytes:
    """A torch file with every member replaced by what `change` makes of it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            for member in change(name, old.read(name)):
                new.writestr(*member)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_with_other_members(valid: dict[str, bytes], tmp_path: Path) -> None:
    content = valid["zip.pt"]
    for ending, words in (("data.pkl", "torch did not write"), ("data/0", "not a checkpoint")):
        lost = members(content, lambda n, b, e=ending: [] if n.endswith(e) else [(n, b)])  # type: ignore[misc]
        refused(put(tmp_path, "x.pt", lost), words)
    twice = members(content, lambda n, b: [(n, b)] * (1 + n.endswith("data.pkl")))
    refused(put(tmp_path, "x.pt", twice), "torch did not write")
    wrong = members(content, lambda n, b: [(n, b"middle" if n.endswith("byteorder") else b)])
    refused(put(tmp_path, "x.pt", wrong), "not a checkpoint")
    short = members(content, lambda n, b: [(n, b[:8] if "/data/" in n else b)])
    assert outcome(put(tmp_path, "x.pt", short)) != "ok"
    script = members(content, lambda n, b: [(n, b), (f"{n}.x/constants.pkl", b)])
    outcome(put(tmp_path, "x.pt", script))


def test_dictionaries_with_methods_of_their_own(tmp_path: Path) -> None:
    content = OrderedDict(to_s3prl(tiny.encoder(tmp_path)))
    vars(content)["get"] = "no function"
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "attributes of its own")


# -- settings ------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.sampled_from([2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = [
    "model_type", "num_hidden_layers", "hidden_size", "conv_dim", "conv_kernel", "conv_stride",
    "num_attention_heads", "intermediate_size", "num_conv_pos_embeddings", "hidden_dropout",
    "num_conv_pos_embedding_groups", "feat_extract_norm", "hidden_act", "layer_norm_eps",
    "do_stable_layer_norm", "conv_bias",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    made = tiny.hf_folder(tmp_path_factory.mktemp("hf"), **SIZES)
    return made, json.loads((made / "config.json").read_text())


@FUZZ
@given(junk=st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=2))
def test_a_config_of_wrong_types(junk: dict[str, Any], folder: tuple[Path, dict[str, Any]]) -> None:
    path, config = folder
    (path / "config.json").write_text(json.dumps({**config, **junk}))
    outcome(path)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_config_that_is_no_object(file: str, folder: tuple[Path, dict[str, Any]]) -> None:
    path, config = folder
    (path / "config.json").write_text(json.dumps(config))
    before = (path / file).read_text()
    for text in ("[1]", "3", "null", '"x"', "{", "", "[" * 100_000, "\xff" * 9, "1" * 5000):
        (path / file).write_text(text)
        refused(path, "not JSON, or not an object")
    (path / file).write_text(before)
    assert outcome(path) == "ok"


SETTINGS = [
    "conv_feature_layers",
    "encoder_attention_heads",
    "activation_fn",
    "dropout",
    "w2v_args",
]


@FUZZ
@given(
    junk=st.dictionaries(st.sampled_from(SETTINGS), JUNK, max_size=2),
    whole=st.dictionaries(st.sampled_from(["model_cfg", "task_cfg"]), JUNK, max_size=1),
)
def test_settings_of_wrong_types(
    junk: dict[str, Any], whole: dict[str, Any], folder: tuple[Path, dict[str, Any]]
) -> None:
    weight: dict[str, Tensor] = safetensors.torch.load_file(folder[0] / "model.safetensors")
    cfg = {"conv_feature_layers": "[(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2", **junk}
    path = folder[0].parent / "settings.pt"
    torch.save({"model_weight": weight, "model_cfg": cfg, "task_cfg": {}, **whole}, path)
    outcome(path)


@pytest.mark.parametrize(
    "text",
    [
        "[(1, 1, 1)] * 999999999",
        "[(1, 1, 1)] * 99" + " * 99" * 90,
        "(" * 900,
        "9**9**9**9",
        "[1] * -5",
    ],
)
def test_settings_that_would_never_end(text: str, tmp_path: Path) -> None:
    content = to_s3prl(tiny.encoder(tmp_path))
    content["model_cfg"]["conv_feature_layers"] = text
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "conv")


def test_layers_in_the_billions(tmp_path: Path) -> None:
    """Sizes are counted, not believed."""
    content = to_s3prl(tiny.encoder(tmp_path))
    weight = content["model_weight"]
    weight["encoder.layers.999999999.final_layer_norm.weight"] = torch.zeros(1)
    weight["feature_extractor.conv_layers.999999999.0.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "2 tensors unexpected")
    made = tiny.hf_folder(tmp_path, "data2vec")
    for key in ("num_hidden_layers", "num_conv_pos_embeddings"):
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps({**config, key: 10**9}))
        refused(made, f"{key} in config.json is more")
        (made / "config.json").write_text(json.dumps(config))
