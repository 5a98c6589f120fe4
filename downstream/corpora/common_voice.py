"""Common Voice as it unpacks: a folder of one language with `clips/` and a table for each split.

A table (`train.tsv`) has tabs, no quoting, a line for each clip:

    client_id  path                   sentence          up_votes ... age  gender  accents  locale
    0b5c...    common_voice_en_1.mp3  How are you?      2        ...      female           en
"""

from __future__ import annotations

from pathlib import Path

from downstream.base import Example
from downstream.corpora import tables
from downstream.corpora.common import require_folder
from downstream.corpora.utterances import Columns, Utterance, of_splits, require_audio, utterances
from upstream.common.errors import UserError

SENTENCE = "sentence"


def read(
    root: Path,
    target: str = "text",
    *,
    train: str | None = "train",
    dev: str | None = "dev",
    test: str | None = "test",
    group: str | None = None,
    unlabelled: bool = False,
) -> list[Example]:
    """Common Voice; `target` is text, speaker, or a column such as gender, accents or locale.

    `root` is the folder of one language (`cv-corpus-21.0/cy`); `train`, `dev` and `test` name its
    tables without `.tsv` (`validated`, `other`), null leaves a split out. The text is the sentence
    as it is written there. `group` is a column that scores are also given for. Many clips have no
    gender or accent: with `unlabelled: true` those without the target or the group are left out.
    Raises UserError, with the line of the table.
    """
    require_folder(root, "root")
    clips = require_folder(root / "clips", "root")
    column = {"text": SENTENCE, "speaker": "client_id"}.get(target, target)
    use = Columns([column], "path", speaker="client_id", group=group)
    listed: dict[str, list[Utterance]] = {}
    for split, name in (("train", train), ("dev", dev), ("test", test)):
        if name is None:
            continue
        source = root / f"{name}.tsv"
        columns, rows = tables.read(source)
        for needed in filter(None, (column, "path", group)):
            tables.require(needed, columns, source)
        if unlabelled:
            rows = [row for row in rows if row.cells[column] and (not group or row.cells[group])]
            if not rows:
                raise UserError(f"{source}: no row has {column!r}")
        listed[split] = utterances(source, columns, rows, use, clips)
        require_audio(listed[split], "it must be in `clips`")
    return [utterance.example for utterance in of_splits(listed)]
