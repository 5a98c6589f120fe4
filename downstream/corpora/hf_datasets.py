"""Folders that Hugging Face's `datasets` writes: save_to_disk, or Parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora import arrow
from downstream.corpora.arrow import NAME, SPLIT, Shard
from downstream.corpora.common import require_folder
from downstream.corpora.splits import Part, Several, with_rule
from downstream.corpora.tables import require
from downstream.corpora.utterances import SPLIT_NAMES, Columns, require_audio, utterances
from upstream.common.errors import UserError, near_miss
from upstream.common.progress import progress


def read(
    root: Path,
    target: str | list[str],
    *,
    results: Path,
    audio: str = "audio",
    id: str | None = None,
    speaker: str | None = None,
    splits: dict[str, str] | None = None,
    split: str | None = None,
    group: str | None = None,
    tags: str | None = None,
    dev: Part | None = None,
    test: Part | None = None,
    split_by: Literal["row", "speaker"] = "row",
    folds: Several | None = None,
) -> list[Example]:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, or of Parquet files.

    `target` (one column, or several for IC), `tags` (SF), `id`, `speaker`, `group`, `split` and the
    rule (`dev`, `test`, `split_by`, `folds`) mean what they mean in a manifest; without `speaker`
    each utterance is a speaker of its own. `audio` is a column of `datasets.Audio`, or of paths
    relative to `root`. Classes have their names; a list of words is a text. The splits are those
    of the folder or of the Parquet files' names (`data/train-00000-of-00002.parquet`,
    `test/0000.parquet`); `splits: {train: train.100, test: test.clean}` chooses among those of
    other names. The usual id is the split and the number of the row.

    Audio that lies inside is written to the results folder (`cache/audio`), once. Raises UserError,
    with the file and the number of the row.
    """
    rule = {"dev": dev, "test": test, "split_by": split_by, "folds": folds}
    ruled = rule != {"dev": None, "test": None, "split_by": "row", "folds": None}
    if ruled and split is not None:
        raise UserError(f"{root}: drop either `split` or the rule (dev, test, split_by, folds)")
    files = _chosen(arrow.shards(require_folder(root, "root")), splits, root)
    if split is None and not ruled and files[0].split:
        split = SPLIT
    if ruled and len({file.split for file in files}) > 1:
        raise UserError(
            f"{root}: has splits of its own, and the recipe asks for a rule too; drop the rule, or "
            "choose one of them with `splits`"
        )
    if split_by == "speaker" and speaker is None:
        raise UserError(f"{root}: `split_by: speaker` needs a column of speakers, `speaker`")
    targets = [target] if isinstance(target, str) else target
    if not targets or audio in targets or (tags and len(targets) > 1):
        cure = "a column beside the audio, or several without `tags`"
        raise UserError(f"{root}: `target` must be {cure}")
    known = [*arrow.columns(files[0].path)]
    named = [name for name in (audio, *targets, id, speaker, group, tags, split) if name]
    named = [name for name in dict.fromkeys(named) if name != SPLIT]
    for name in named:
        require(name, known, root)
    read = arrow.rows(files, named, audio, root, results / "cache" / "audio")
    rows = list(progress(read, f"reading {root.name}"))
    use = Columns(targets, audio, id or NAME, speaker, split, group=group, tags=tags)
    listed = utterances(root, [*known, NAME, SPLIT], rows, use, root)
    require_audio(listed, "paths are relative to `root`")
    examples = [utterance.example for utterance in listed]
    if split is not None:
        return examples
    return with_rule(root, examples, dev=dev, test=test, split_by=split_by, folds=folds)


def _chosen(files: list[Shard], splits: Mapping[str, str] | None, root: Path) -> list[Shard]:
    """The files of the splits that `splits` names, or all under the usual names."""
    own = list(dict.fromkeys(file.split for file in files))
    if splits is None:
        for name in own:
            if name and name not in SPLIT_NAMES and not name.startswith("fold"):
                cure = "choose with `splits`, for example {train: " + own[0] + "}"
                raise UserError(f"{root}: its splits are {', '.join(own)}; {cure}")
        return files
    for role, name in splits.items():
        if role not in ("train", "dev", "test"):
            raise UserError(f"{root}: splits: {role!r} is not train, dev or test")
        if name not in own:
            raise UserError(f"{root}: has no split {name!r}{near_miss(name, own)}")
    roles = {name: role for role, name in splits.items()}
    if len(roles) < len(splits) or not roles:
        raise UserError(f"{root}: splits: train, dev and test must be different splits")
    return [file._replace(split=roles[file.split]) for file in files if file.split in roles]
