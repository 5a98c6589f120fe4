"""Rows of Arrow and Parquet files as Hugging Face's `datasets` writes them; only pyarrow is needed.

Nothing of such a folder is run, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from downstream.corpora.tables import Row
from downstream.corpora.utterances import SPLIT_NAMES
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.packages import require_package

BATCH = 16  # rows decoded at once
LARGEST = 1 << 30  # bytes of one utterance's audio
UNPACKED = 1 << 34  # bytes that a row group of Parquet may unpack to
SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3"}
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
NOT_WHAT_IT_SAYS = (ValueError, TypeError, AttributeError, KeyError, RecursionError)
NAME, SPLIT = "(name)", "(split)"  # columns that every row has


class Shard(NamedTuple):
    """A file of rows, and the split that its name or its folder tells; "" for none."""

    path: Path
    split: str


def shards(root: Path) -> list[Shard]:
    """The files of a folder of save_to_disk or of Parquet, in order. Raises UserError."""
    if (root / "dataset_dict.json").is_file():
        names = _json(root / "dataset_dict.json", "splits")
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{root}/dataset_dict.json: {name!r} is no folder's name")
        return [shard for name in names for shard in _saved(root / name, name)]
    if (root / "state.json").is_file():
        return _saved(root, "")
    found: list[Shard] = []
    homes: set[str] = set()
    for path in sorted(root.rglob("*.parquet")):
        place = path.relative_to(root)
        if any(part.startswith(".") for part in place.parts):
            continue
        match, home = SHARD.fullmatch(path.stem), place.parent
        split = match[1] if match else path.stem if path.stem in SPLIT_NAMES else ""
        if not split and home.name in SPLIT_NAMES:
            split, home = home.name, home.parent
        found.append(Shard(path, split))
        homes.add(str(home))
    if not found:
        fault = "holds neither dataset_dict.json, state.json nor *.parquet"
        raise UserError(f"{root}: {fault}; write it with save_to_disk or to_parquet")
    if len(homes) > 1:
        raise UserError(f"{root}: several data sets ({', '.join(sorted(homes))}); set root to one")
    nameless = [shard.path for shard in found if not shard.split]
    if nameless and len(nameless) < len(found):
        raise UserError(f"{nameless[0]}: names no split, and the files beside it do; rename it")
    return found


def columns(shard: Path) -> dict[str, Any]:
    """Column -> how `datasets` describes it, {} where it does not. Raises UserError."""
    with _reading(shard):
        if shard.suffix == ".parquet":
            schema = _parquet(shard).schema_arrow
        else:
            with _arrow().memory_map(str(shard)) as source:
                schema = _arrow().ipc.open_stream(source).schema
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = (content.get("info") or {}).get("features") or {}
        return {name: features.get(name) or {} for name in schema.names}


def rows(
    files: Sequence[Shard], named: Sequence[str], audio: str, home: Path, unpacked: Path
) -> Iterator[Row]:
    """The `named` columns of every row as text.

    audio: a column of them; what lies in the data set is written to `unpacked`, once, under a name
    of its content. home: what relative paths are relative to. Raises UserError.
    """
    counts: dict[str, int] = {}
    for path, split in files:
        known = columns(path)
        for name in named:
            if name not in known:
                raise UserError(f"{path}: no column {name!r}, which the files before it have")
        for number, record in enumerate(_records(path, named), 1):
            where = f"{path}:{number}"
            counts[split] = counts.get(split, 0) + 1
            cells = {
                n: _text(v, known[n], f"{where}: {n!r}") for n, v in record.items() if n != audio
            }
            cells |= {
                audio: str(_audio(record[audio], f"{where}: {audio!r}", home, unpacked)),
                NAME: f"{split}{'-' * bool(split)}{counts[split]:06d}",
                SPLIT: split,
            }
            yield Row(str(path), number, cells)


def _records(path: Path, named: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _reading(path):
        if path.suffix == ".parquet":
            file = _parquet(path)
            for index in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(index).total_byte_size
                if size > UNPACKED:
                    fault = f"row group {index} unpacks to {size} bytes, {UNPACKED} are read"
                    raise UserError(f"{path}: {fault}; write it in smaller groups")
            for batch in file.iter_batches(BATCH, columns=list(named)):
                yield from batch.to_pylist()
            return
        with _arrow().memory_map(str(path)) as source:
            for batch in _arrow().ipc.open_stream(source):
                batch.validate(full=True)  # offsets of a damaged file point anywhere
                chosen = batch.select(list(named))
                for start in range(0, len(chosen), BATCH):
                    yield from chosen.slice(start, BATCH).to_pylist()


def _text(value: Any, feature: Any, where: str) -> str:
    """A cell as a table would have it: classes by name, nothing as "", lists with spaces."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = inner.get("feature", inner) if isinstance(inner, Mapping) else {}
        return " ".join(_text(item, inner, where) for item in value)
    if value is None or value != value:
        return ""
    if isinstance(value, (dict, bytes)):
        raise UserError(f"{where} holds {type(value).__name__}, not text")
    names = feature.get("names") if isinstance(feature, Mapping) else None
    if names and isinstance(value, int):
        if value >= len(names):
            raise UserError(f"{where} is class {value} of {len(names)}")
        return str(names[value]).strip() if value >= 0 else ""  # -1: the class is not told
    return str(value).strip()


def _audio(value: Any, where: str, home: Path, unpacked: Path) -> Path:
    """The file of a cell of audio, which is written where it was none. Raises UserError."""
    if isinstance(value, str) and value:
        return home / value
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        data, path = value.get("bytes"), value.get("path")
        if data:
            return _written(data, where, unpacked)
        if path:
            return home / str(path)
    elif value:
        cure = "cast the column to datasets.Audio() and save it again"
        raise UserError(f"{where} holds neither a file nor a path; {cure}")
    raise UserError(f"{where} is empty; drop the row")


def _written(data: bytes, where: str, folder: Path) -> Path:
    if len(data) > LARGEST:
        raise UserError(f"{where} holds {len(data)} bytes, at most {LARGEST} are read")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    suffix = next((s for head, s in SUFFIXES.items() if data.startswith(head)), ".audio")
    path = folder / digest[:2] / f"{digest}{suffix}"
    if not path.is_file() or path.stat().st_size != len(data):
        disk.write(path, data)
    return path


def _saved(folder: Path, split: str) -> list[Shard]:
    """The files of one Dataset.save_to_disk."""
    state = folder / "state.json"
    if _json(state, "_indices_data_files", ()):
        raise UserError(f"{state}: written by an old version of datasets; load and save it again")
    entries = _json(state, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{state}: {name!r} is no file's name")
    return [Shard(folder / str(name), split) for name in names]


def _json(path: Path, key: str, default: Any = None) -> Any:
    """A list in a small JSON file of `datasets`. Raises UserError."""
    try:
        found = json.loads(disk.read(path, 1 << 20)).get(key, default)
    except NOT_WHAT_IT_SAYS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not what datasets writes ({error!s:.100})") from error
    if not isinstance(found, (list, tuple)) or (default is None and not found):
        raise UserError(f"{path}: {key!r} is not a list of anything")
    return found


def _arrow() -> Any:
    require_package("pyarrow.parquet")
    return require_package("pyarrow")


def _parquet(path: Path) -> Any:
    return _arrow().parquet.ParquetFile(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What pyarrow says of a damaged file, in one line."""
    disk.require_file(path)
    arrow = _arrow()
    try:
        yield
    except UserError:
        raise
    except (arrow.ArrowException, OSError, MemoryError, *NOT_WHAT_IT_SAYS) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason:.200}); copy it again") from error
