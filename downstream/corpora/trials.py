"""A trials file: which utterances are compared, for verification and query by example."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from downstream.base import Example
from downstream.corpora.common import read_text
from downstream.corpora.utterances import Utterance
from downstream.tasks.trials import write
from upstream.common.errors import UserError, near_miss

LABELS = {"1": 1, "0": 0, "target": 1, "nontarget": 0}


def with_trials(
    listed: Sequence[Utterance], files: Sequence[Path], documents: bool
) -> list[Example]:
    """The examples; those of dev and test have their trials as targets.

    files: lines `label first second` or `first second label` (1 or target, 0 or nontarget), apart
    by tabs or blanks; an utterance is named by its id, or by its path with or without suffix.
    documents: those in no trial are what every query of their split searches, not an oversight.
    Raises UserError, with its line.
    """
    names = _names(listed)
    trials: dict[int, dict[int, int]] = {}  # first utterance -> second -> label
    compared: set[int] = set()
    for file in files:
        before = len(compared)
        for where, label, *pair in _lines(file):
            first, second = (_find(names, listed, name, where) for name in pair)
            _require_comparable(listed[first].example, listed[second].example, where)
            known = trials.setdefault(first, {})
            if second in known:
                raise UserError(f"{where}: this pair is already listed; drop one of the lines")
            if trials.get(second, {}).get(first, label) != label:
                raise UserError(f"{where}: this pair has another label the other way round")
            known[second] = label
            compared |= {first, second}
        if len(compared) == before and not trials:
            raise UserError(f"{file}: holds no trials")
    examples = []
    for i, (example, place, _) in enumerate(listed):
        if example.split == "train":
            if not example.target:
                cure = "`target` names the column of what is learnt; fill it in or drop the row"
                raise UserError(f"{place}: this training utterance has no target: {cure}")
        elif i not in compared and not documents:
            raise UserError(
                f"{place}: {example.id!r} of {example.split} is in no trial: add its trials, drop "
                "the row, or set `documents: true` if it is searched by every query"
            )
        else:
            pairs = trials.get(i, {}).items()
            target = write((label, listed[other].example.id) for other, label in pairs)
            example = example._replace(target=target)
        examples.append(example)
    return examples


def _lines(file: Path) -> Iterator[tuple[str, int, str, str]]:
    """Place, label, first and second name of every line that is not blank."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        fields = line.split()
        if not fields:
            continue
        if "\t" in line:
            fields = [field.strip() for field in line.split("\t")]
        where = f"{file}:{number}"
        labels = [i for i in (0, 2) if len(fields) == 3 and fields[i] in LABELS]
        if len(labels) != 1:
            due = "`label first second`, the label 1, 0, target or nontarget"
            raise UserError(f"{where}: {line.strip()!r:.200} is not {due}")
        label = LABELS[fields.pop(labels[0])]
        yield where, label, fields[0], fields[1]


def _names(listed: Sequence[Utterance]) -> dict[str, list[int]]:
    """What an utterance may be called -> which are called so; an id is nobody else's name."""
    names: dict[str, list[int]] = {}
    for i, (_, _, called) in enumerate(listed):
        for name in {called, os.path.splitext(called)[0]}:
            names.setdefault(name, []).append(i)
    return names | {example.id: [i] for i, (example, _, _) in enumerate(listed)}


def _find(names: dict[str, list[int]], listed: Sequence[Utterance], name: str, where: str) -> int:
    found = names.get(name, ())
    if len(found) == 1:
        return found[0]
    if found:
        first, second = (listed[i].example.id for i in found[:2])
        raise UserError(f"{where}: {name!r} is several utterances ({first}, {second}); use the id")
    hint = near_miss(name, names) if len(names) < 5_000 else ""
    close = hint if hint.startswith("; did") else ""
    raise UserError(f"{where}: {name!r} is no utterance of the table{close}")


def _require_comparable(first: Example, second: Example, where: str) -> None:
    if first.id == second.id:
        raise UserError(f"{where}: {first.id!r} is compared with itself")
    if first.split == second.split and first.split in ("dev", "test"):
        return  # nearly all, and lists are long
    for example in (first, second):
        if not {*example.split.split()} <= {"dev", "test"}:
            split = example.split or "no split"
            fault = f"{example.id!r} is of {split}; trials are of dev and test"
            raise UserError(f"{where}: {fault}")
    if not {*first.split.split()} <= {*second.split.split()}:
        raise UserError(
            f"{where}: a trial across splits: {first.id!r} is of {first.split}, {second.id!r} of "
            f"{second.split}"
        )
