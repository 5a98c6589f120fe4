"""Any corpus as a table of audio files: CSV, TSV or JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from downstream.base import Example
from downstream.corpora import tables
from downstream.corpora.rttm import with_turns
from downstream.corpora.splits import Part, Several, with_rule
from downstream.corpora.trials import with_trials
from downstream.corpora.utterances import Columns, require_audio, utterances
from upstream.common.errors import UserError

# the columns that may be absent as long as none is asked for
SPEAKER, SPLIT, CHANNEL = "speaker", "split", "channel"


def read(
    root: Path,
    target: str | list[str] | None = None,
    *,
    file: str = "manifest.tsv",
    path: str = "path",
    id: str | None = None,
    speaker: str = SPEAKER,
    split: str | None = SPLIT,
    start: str | None = None,
    end: str | None = None,
    channel: str | None = CHANNEL,
    group: str | None = None,
    tags: str | None = None,
    trials: str | list[str] | None = None,
    documents: bool = False,
    rttm: str | None = None,
    dev: Part | None = None,
    test: Part | None = None,
    split_by: Literal["row", "speaker"] = "row",
    folds: Several | None = None,
) -> list[Example]:
    """A table with one row per utterance; `target` is the column that the task learns.

    `file` lies in `root` or is an absolute path: `.csv`, `.tsv` (no quoting, so that a JSON cell
    stays as it is) or `.jsonl` (one object of plain values per line). `path`, `id`, `speaker`,
    `split`, `start`, `end`, `channel` and `group` are names of columns: paths relative to the
    table's folder, times in seconds, the one channel that is heard (0 is the first; without it, or
    where the cell is empty, the average of all), the group (language, accent, microphone) that
    scores are also given for. The usual id is the path without its suffix (and the part and the
    channel). Without a column "speaker" each utterance is a speaker of its own, or with `rttm` its
    speakers are those of the turns.

    What a task learns may also be several columns, `target: [action, object, location]` (IC), or
    - a transcript with `tags`, a column of one slot tag per word (SF): `O B-artist I-artist`, or
      plain `O artist artist`;
    - `trials`, one or several files beside the table (ASV, QbE), see `trials.py`: `target` is then
      of the training rows only, and with `documents: true` rows in no trial are searched by all;
    - `rttm`, a file or folder beside the table that says who speaks when (SD), without a `target`.

    The split column holds train, dev (or valid, validation), test, or fold1, fold2, ..., or
    `dev test` for audio that both compare with. When there is none, or with `split: null`, a rule
    makes the splits (see `splits.py`): `dev` and `test` are shares (0.1 = a tenth) of the rows or,
    with `split_by: speaker`, of the speakers; `folds: 5` with `split_by: speaker` gives fold1 ...
    fold5. Raises UserError, with the line of the table.
    """
    source = root / file
    columns, rows = tables.read(source)
    if split == SPLIT and SPLIT not in columns:
        split = None
    if channel == CHANNEL and CHANNEL not in columns:
        channel = None
    if split is not None and (dev, test, split_by, folds) != (None, None, "row", None):
        raise UserError(
            f"{source}: its column {split!r} gives the splits, and the recipe asks for a rule too; "
            "drop dev, test, split_by and folds, or set `split: null` to leave the column out"
        )
    anonymous = speaker == SPEAKER and SPEAKER not in columns
    if anonymous and split_by == "speaker":
        raise UserError(
            f"{source}: `split_by: speaker` needs a column of speakers; name it with `speaker` "
            f"(columns: {', '.join(columns)})"
        )
    if trials is not None and split is None:
        raise UserError(f"{source}: `trials` needs a column of splits; name it with `split`")
    targets = [target] if isinstance(target, str) else target or []
    _require_one_kind(targets, tags, trials, rttm)
    use = Columns(
        target=targets,
        path=path,
        id=id,
        speaker=None if anonymous else speaker,
        split=split,
        start=start,
        end=end,
        channel=channel,
        group=group,
        tags=tags,
        labelled=trials is None,
    )
    listed = utterances(source, columns, rows, use, source.parent)
    require_audio(listed, "paths are relative to the table's folder")
    examples = [utterance.example for utterance in listed]
    if trials is not None:
        files = [trials] if isinstance(trials, str) else trials
        examples = with_trials(listed, [source.parent / name for name in files], documents)
    if rttm is not None:
        examples = with_turns(listed, source.parent / rttm)
    if split is not None:
        return examples
    return with_rule(source, examples, dev=dev, test=test, split_by=split_by, folds=folds)


def _require_one_kind(
    targets: list[str], tags: str | None, trials: str | list[str] | None, rttm: str | None
) -> None:
    """Raises UserError for a recipe without a target, or with two."""
    if rttm is not None and (targets or tags or trials is not None):
        raise UserError("`rttm` says who speaks when; leave target, tags and trials out")
    if trials is not None and (tags or not trials):
        raise UserError("`trials` names at least one file, and goes without tags")
    if tags and len(targets) != 1:
        raise UserError("`tags` belong to the words of one `target` column, the transcript")
    if not targets and trials is None and rttm is None:
        raise UserError("missing key 'target': the column that the task learns")


def of_speakers(
    root: Path, *, file: str, path: str, speaker: str, dev: Part, test: Part
) -> list[Example]:
    """A table whose target is the speaker; `dev` and `test` are shares of the speakers."""
    return read(
        root, speaker, file=file, path=path, speaker=speaker, split=None,
        dev=dev, test=test, split_by="speaker",
    )  # fmt: skip
