"""Splits by rule, for corpora that come without: the same on every machine, from hashes of ids."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated, Literal

from downstream.base import Example
from upstream.common.errors import UserError
from upstream.common.schema import Bound

Part = Annotated[float, Bound(0, 1, open_low=True, open_high=True)]  # of the rows or speakers
Several = Annotated[int, Bound(2, 1000)]


def split_by_rule(
    examples: Sequence[Example],
    *,
    dev: Part | None,
    test: Part | None,
    split_by: Literal["row", "speaker"],
    folds: Several | None,
) -> list[Example]:
    """The examples with their splits set: train, dev and test, or fold1 ... fold<folds>.

    `dev` and `test` are shares of the rows, or of the speakers; `folds` is always over speakers.
    Raises UserError for a rule that makes no sense or cannot be met.
    """
    shares = {name: share for name, share in (("dev", dev), ("test", test)) if share is not None}
    if folds is not None:
        if shares or split_by != "speaker":
            raise UserError("`folds` goes with `split_by: speaker` and without `dev` and `test`")
        splits = _folds(examples, folds)
    elif not shares:
        raise UserError(
            "no split column and no rule; name the column with `split`, or give the shares `dev` "
            "and `test`, or `folds` and `split_by: speaker`"
        )
    else:
        if sum(shares.values()) >= 1:
            raise UserError("`dev` and `test` together leave nothing for train")
        splits = (_rows if split_by == "row" else _speakers)(examples, shares)
    return [example._replace(split=split) for example, split in zip(examples, splits)]


def with_rule(
    source: object,
    examples: Sequence[Example],
    *,
    dev: Part | None,
    test: Part | None,
    split_by: Literal["row", "speaker"],
    folds: Several | None,
) -> list[Example]:
    """`split_by_rule`, whose UserError names the source."""
    try:
        return split_by_rule(examples, dev=dev, test=test, split_by=split_by, folds=folds)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _rows(examples: Sequence[Example], shares: dict[str, float]) -> list[str]:
    """Each row on its own, stratified: every group has its share, and at least one row in train.

    The groups are the labels; where the target is no label (a transcript), the speakers. What is
    taken from a label is spread over its speakers. A group too small for its share passes the rest
    on to the next: the totals hold as well.
    """
    groups: dict[str, list[Example]] = defaultdict(list)
    for group, example in zip(_groups(examples), examples):
        groups[group].append(example)
    split_of: dict[str, str] = {}
    seen, given = 0, Counter[str]()
    for group in sorted(groups, key=hashed):
        # the group is in the hash, or every label would take its test rows from the same speakers
        rest = sorted(groups[group], key=lambda e: (hashed(group + e.speaker), hashed(e.id)))
        size = len(rest)
        seen += size
        # the split that is furthest behind chooses first, or dev would starve beside test
        for name in sorted(shares, key=lambda name: given[name] - seen * shares[name]):
            due = round(seen * shares[name]) - given[name]
            take = max(0, min(due, math.ceil(size * shares[name]), len(rest) - 1))
            for position in [(2 * i + 1) * len(rest) // (2 * take) for i in reversed(range(take))]:
                split_of[rest.pop(position).id] = name
            given[name] += take
    for name, share in shares.items():
        if not given[name]:
            raise UserError(f"{len(examples)} rows are too few for `{name}: {share}`")
    return [split_of.get(example.id, "train") for example in examples]


def _speakers(examples: Sequence[Example], shares: dict[str, float]) -> list[str]:
    """Whole speakers, in the order of their hashes."""
    speakers = sorted({example.speaker for example in examples}, key=hashed)
    split_of = {}
    rest = iter(speakers)
    for name, share in shares.items():
        for _ in range(max(1, round(len(speakers) * share))):
            split_of[next(rest, "")] = name
    if next(rest, None) is None:
        wanted = ", ".join(f"`{name}: {share}`" for name, share in shares.items())
        raise UserError(f"{len(speakers)} speakers are too few for {wanted} and a train split")
    return [split_of.get(example.speaker, "train") for example in examples]


def _folds(examples: Sequence[Example], folds: int) -> list[str]:
    """Whole speakers, the one with most utterances first, each into the smallest fold so far."""
    sizes = Counter(example.speaker for example in examples)
    if folds > len(sizes):
        raise UserError(f"`folds: {folds}` is not possible with {len(sizes)} speakers")
    filled = dict.fromkeys((f"fold{k}" for k in range(1, folds + 1)), 0)
    fold_of = {}
    for speaker in sorted(sizes, key=lambda speaker: (-sizes[speaker], hashed(speaker))):
        fold_of[speaker] = min(filled, key=lambda fold: filled[fold])
        filled[fold_of[speaker]] += sizes[speaker]
    return [fold_of[example.speaker] for example in examples]


def _groups(examples: Sequence[Example]) -> list[str]:
    """What to stratify each row by: its label, else its speaker, else nothing."""
    for names in ([e.target for e in examples], [e.speaker for e in examples]):
        if 2 * len(set(names)) <= len(names):  # transcripts and ids do not come again
            return names
    return [""] * len(examples)


def hashed(name: str) -> str:
    """What to sort by for an order that is fixed and means nothing."""
    return hashlib.sha256(name.encode()).hexdigest()
