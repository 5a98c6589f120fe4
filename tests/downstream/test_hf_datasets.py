"""Folders as `datasets` 5.2 writes them: save_to_disk and Parquet, sound, odd and hostile."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from downstream import recipe
from downstream.base import CORPORA, Example
from downstream.corpora import hf_datasets
from tests.corpora import fault, wav
from upstream.common.errors import UserError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[hf]'")
pq = pytest.importorskip("pyarrow.parquet")

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "lang": {"names": ["en", "de"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["O", "B-x"], "_type": "ClassLabel"}, "_type": "List"},
}
SCHEMA = pa.schema(
    [("audio", AUDIO), ("text", pa.string()), ("lang", pa.int64()), ("tags", pa.list_(pa.int64()))],
    {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()},
)


def sound(folder: Path) -> bytes:
    wav(folder / "x.wav")
    return (folder / "x.wav").read_bytes()


def table(folder: Path, **changes: Any) -> Any:
    """Two rows: audio inside, and audio at a path."""
    content = {
        "audio": [{"bytes": sound(folder), "path": "a.wav"}, {"bytes": None, "path": "x.wav"}],
        "text": ["hello you", "ho"],
        "lang": [1, 0],
        "tags": [[0, 1], [0]],
    }
    return pa.table({**content, **changes}, schema=SCHEMA)


def save(folder: Path, content: Any) -> None:
    """As Dataset.save_to_disk does."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / name), content.schema) as stream:
        stream.write_table(content)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))


def parquet(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path)


def read(root: Path, target: Any = "text", **options: Any) -> list[Example]:
    return hf_datasets.read(root, target, results=root.parent / "results", **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    content = table(folder)
    for split in ("train", "validation", "test"):
        save(folder / split, content)
    splits = {"splits": ["train", "validation", "test"]}
    (folder / "dataset_dict.json").write_text(json.dumps(splits))
    return folder


def test_a_dataset_dict(root: Path) -> None:
    examples = read(root, group="lang")
    digest = hashlib.blake2b(sound(root), digest_size=16).hexdigest()
    inside = root.parent / "results/cache/audio" / digest[:2] / f"{digest}.wav"
    assert inside.read_bytes() == sound(root)
    one, two = "train-000001", "train-000002"
    assert examples[:2] == [
        Example(one, str(inside), None, None, "hello you", one, "train", "de"),
        Example(two, str(root / "x.wav"), None, None, "ho", two, "train", "en"),
    ]
    assert [e.split for e in examples] == ["train"] * 2 + ["dev"] * 2 + ["test"] * 2
    written = inside.stat().st_mtime_ns
    assert read(root, group="lang") == examples and inside.stat().st_mtime_ns == written
    inside.write_bytes(b"half")
    assert read(root, group="lang") == examples and inside.read_bytes() == sound(root)


def test_columns_of_classes_and_lists(root: Path) -> None:
    assert read(root, ["lang", "text"])[0].target == "de ; hello you"
    assert read(root, tags="tags")[0].target == "HELLO B-x YOU E-x"


def test_one_dataset_and_a_rule(root: Path) -> None:
    wav(root / "train" / "x.wav")
    assert {e.split for e in read(root / "train", dev=0.5)} == {"train", "dev"}
    assert "no split column and no rule" in fault(read, root / "train")
    assert "asks for a rule too" in fault(read, root, dev=0.5)
    assert {e.split for e in read(root, dev=0.5, splits={"train": "test"})} == {"train", "dev"}


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"],
        ["train/0000", "train/0001", "test/0000"],
        ["train", "train-00000-of-00001", "test"],
    ],
)
def test_parquet(tmp_path: Path, names: list[str]) -> None:
    root = tmp_path / "set"
    for name in names:
        parquet(root / f"{name}.parquet", table(root))
    examples = read(root)
    assert sorted(e.split for e in examples) == ["test"] * 2 + ["train"] * 4
    assert len({e.id for e in examples}) == 6
    parquet(root / "de" / "other.parquet", table(root))
    assert "several data sets (" in fault(read, root)


def test_splits_of_other_names(root: Path) -> None:
    (root / "train").rename(root / "train.100")
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train.100", "test"]}))
    assert "its splits are train.100, test; choose with `splits`" in fault(read, root)
    chosen = read(root, splits={"train": "train.100", "dev": "test"})
    assert [e.split for e in chosen] == ["train"] * 2 + ["dev"] * 2
    line = fault(read, root, splits={"train": "train.10"})
    assert "no split 'train.10'; did you mean train.100?" in line
    assert "must be different" in fault(read, root, splits={"train": "test", "dev": "test"})
    assert "'tain' is not train" in fault(read, root, splits={"tain": "test"})


def test_in_a_recipe(root: Path, tmp_path: Path) -> None:
    corpus = {"name": "hf_datasets", "root": str(root), "target": "text"}
    train = {"steps": 1, "batch": 1, "lr": [0.1], "eval_every": 1}
    content = {"kind": "task", "task": "asr", "corpus": corpus, "train": train}
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(content))
    assert len(recipe.examples(recipe.load(path), tmp_path / "here")) == 6
    assert any((tmp_path / "here/cache/audio").iterdir())
    corpus["results"] = "/tmp"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="unknown key 'results'"):
        recipe.load(path)
    assert "hf_datasets" in CORPORA


@pytest.mark.parametrize(
    ("changes", "options", "part"),
    [
        ({}, {"audio": "adio"}, "no column 'adio'; did you mean audio?"),
        ({}, {"target": "txt"}, "no column 'txt'; did you mean text?"),
        ({"text": ["hi", None]}, {}, "arrow:2: 'text' is empty"),
        ({"lang": [-1, 0]}, {"target": "lang"}, "arrow:1: 'lang' is empty"),
        ({"lang": [7, 0]}, {"target": "lang"}, "arrow:1: 'lang' is class 7 of 2"),
        ({"audio": [{"bytes": None, "path": None}] * 2}, {}, "arrow:1: 'audio' is empty"),
        ({"audio": [{"bytes": None, "path": "z.wav"}] * 2}, {}, "arrow:1: no audio file"),
        ({}, {"target": "audio"}, "`target` must be a column beside the audio"),
        ({}, {"split": "text"}, "arrow:1: unknown split 'hello'"),
        ({}, {"split_by": "speaker", "dev": 0.5}, "needs a column of speakers"),
        ({}, {"tags": "tags", "target": ["text", "lang"]}, "without `tags`"),
    ],
)
def test_faults(tmp_path: Path, changes: Any, options: Any, part: str) -> None:
    save(tmp_path / "set", table(tmp_path / "set", **changes))
    if "split" not in options and "dev" not in options:
        options = {**options, "dev": 0.5}
    line = fault(read, tmp_path / "set", **options)
    assert part in line, line


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "x.parquet"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_damaged_files(tmp_path: Path, name: str, share: float) -> None:
    root = tmp_path / "set"
    content = table(root)
    parquet(root / name, content) if name.endswith("parquet") else save(root, content)
    whole = (root / name).read_bytes()
    (root / name).write_bytes(whole[: int(share * len(whole))])
    if name.endswith("arrow") and share > 0.9:
        return  # only the end-of-stream mark is gone
    assert str(root / name) in fault(read, root, dev=0.5)


def test_any_byte_may_be_wrong(tmp_path: Path) -> None:
    root = tmp_path / "set"
    save(root, table(root))
    path = root / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + b"\xff\xff" + whole[place + 2 :])
        try:
            read(root, dev=0.5)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500


@pytest.mark.parametrize(
    ("state", "part"),
    [
        ({"_data_files": [{"filename": "../x.arrow"}]}, "'../x.arrow' is no file's name"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "'/etc/passwd' is no file's name"),
        ({"_data_files": ["x"]}, "None is no file's name"),
        ({"_data_files": []}, "is not a list of anything"),
        ({"_data_files": 3}, "is not a list of anything"),
        ({"_data_files": [{"filename": "no.arrow"}]}, "no such file"),
        ({"_data_files": [{"filename": "x"}], "_indices_data_files": ["i"]}, "an old version"),
        ([], "not what datasets writes"),
    ],
)
def test_hostile_folders(tmp_path: Path, state: Any, part: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (root / "state.json").write_text(json.dumps(state))
    (root / "set.py").write_text("raise SystemExit('run')\n")
    assert part in fault(read, root, dev=0.5)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["../set"]}))
    assert "'../set' is no folder's name" in fault(read, root)


def test_pipes_and_arrays_and_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    assert "no such folder" in fault(read, root)
    root.mkdir()
    assert "holds neither" in fault(read, root)
    os.mkfifo(root / "x.parquet")
    assert "is a pipe" in fault(read, root)
    os.remove(root / "x.parquet")
    decoded = [{"array": [0.0], "sampling_rate": 16000}] * 2
    parquet(root / "x.parquet", pa.table({"audio": decoded, "text": ["a", "b"]}))
    assert "cast the column to datasets.Audio()" in fault(read, root, dev=0.5)
    zeros = pa.table({"audio": [{"bytes": b"\0" * (1 << 23), "path": "a"}] * 2, "text": ["a", "b"]})
    pq.write_table(zeros, root / "x.parquet", compression="zstd", use_dictionary=False)
    assert (root / "x.parquet").stat().st_size < 1 << 15
    monkeypatch.setattr("downstream.corpora.arrow.UNPACKED", 1 << 20)
    assert "row group 0 unpacks to 16" in fault(read, root, dev=0.5)
    monkeypatch.setattr("downstream.corpora.arrow.UNPACKED", 1 << 30)
    monkeypatch.setattr("downstream.corpora.arrow.LARGEST", 1 << 20)
    assert "x.parquet:1: 'audio' holds 8388608 bytes" in fault(read, root, dev=0.5)
