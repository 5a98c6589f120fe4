"""Numbers of the literature beside measured ones, by names such as `published:hubert-base`.

They come without predictions: a difference from one has neither interval nor p. They are numbers
of SUPERB's own data, and stand beside results on that data only.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from statistics import mean
from typing import NamedTuple

from downstream.base import METRICS
from downstream.report import superb
from downstream.report.compare import Comparison, Row, overall, scores
from downstream.report.groups import Labels, grouped, labels, results_of, version
from downstream.report.pool import Pool
from downstream.report.results import Result
from downstream.report.superb import METRIC, NAMES, Tasks
from upstream.common import DATA
from upstream.common.errors import UserError, near_miss

FOLDER = DATA / "results" / "published"
PREFIX = "published:"
NOTE = "a published number: no predictions, so neither interval nor p"
HEARD_TOO = "fine-tuned on this corpus"
HERE = "published numbers are of SUPERB's own data, and no task here is on it"

Key = tuple[str, str]  # SUPERB's task and a metric in METRICS, or METRIC and a set of constants


class Published(NamedTuple):
    """A row of results/published."""

    name: str  # published:hubert-base/asr-ted-lium3/speech-ft
    tuned_on: str  # as published; "" for a pre-trained upstream
    method: str
    scores: dict[Key, float]
    sources: tuple[str, ...]


@functools.cache
def known() -> dict[str, Published]:
    """All rows by name. Those of one name in several sources are one."""
    found: dict[str, Published] = {}
    for file in ("superb.csv", "speech_ft.csv"):
        with (FOLDER / file).open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                parts = [row.get("model") or row["upstream"], row.get("fine_tuned_on", "")]
                name = "/".join(filter(None, map(_slug, [*parts, row.get("method", "")])))
                before = found.get(name)
                found[name] = Published(
                    PREFIX + name,
                    parts[1],
                    row.get("method", ""),
                    {**(before.scores if before else {}), **_scores(row)},
                    (*(before.sources if before else ()), row["source"]),
                )
    return found


def _slug(text: str) -> str:
    """`ASR (TED-LIUM3)` -> `asr-ted-lium3`"""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).replace("-+-", "-").strip("-")


def _scores(row: dict[str, str]) -> dict[Key, float]:
    scores = {}
    for column, text in row.items():
        task, _, metric = column.partition("_")
        metric = NAMES.get(metric, metric)
        if task in superb.CORPORA and metric in METRICS and text:
            scores[task, metric] = float(text)
    for constants, tasks in superb.sets().items():
        if all((task, c.metric) in scores for task, each in tasks.items() for c in each):
            ways = (
                mean(c.way(scores[task, c.metric]) for c in each) for task, each in tasks.items()
            )
            scores[METRIC, constants] = mean(ways)
    if row.get("score_name") == "SUPERB_S":  # of rows whose tasks are not all known
        scores.setdefault((METRIC, "speech-ft"), float(row["score"]))
    return scores


def named(wanted: str) -> Published:
    """A row by name, however it is spelt: `published:HuBERT Base`. Raises UserError."""
    slug = "/".join(map(_slug, wanted.removeprefix(PREFIX).split("/")))
    if slug not in known():
        raise UserError(f"no published row {wanted!r}{near_miss(slug, known())}; list published")
    return known()[slug]


def chosen(patterns: Iterable[str]) -> list[Published]:
    """Rows by names in which `*` is anything. Raises UserError for one that fits nothing."""
    rows: dict[str, Published] = {}
    for pattern in patterns:
        short = pattern.removeprefix(PREFIX)
        hits = {k: row for k, row in known().items() if "*" in short and fnmatchcase(k, short)}
        rows |= hits or {named(pattern).name: named(pattern)}
    return list(rows.values())


def about() -> Iterator[tuple[str, str]]:
    """Every name with its numbers."""
    for row in known().values():
        numbers: dict[str, list[str]] = {}
        for (task, metric), value in row.scores.items():
            where = f"{METRIC} {metric}" if task == METRIC else task
            numbers.setdefault(where, []).append(f"{value:.2f}")
        yield row.name, ", ".join(f"{k} {'/'.join(v)}" for k, v in numbers.items())


def compare(a: str, b: str, results: Sequence[Result]) -> Comparison:
    """A minus B, at least one of them published, on what both have. Raises UserError."""
    sides = [_rows(wanted, results) for wanted in (a, b)]
    rows = []
    for key, left in sides[0]:
        for right in (right for other, right in sides[1] if other == key):
            # counts, and what a task is called, are of the measured one
            fact, other = (left, right) if left.seeds else (right, left)
            rows.append(fact._replace(
                upstream=left.upstream, fingerprint=left.fingerprint, score=left.score,
                seen=left.seen, reference=right.upstream, reference_score=right.score,
                reference_seen=right.seen, difference=left.score - right.score, low=math.nan,
                high=math.nan, verdict="unknown", note=other.note,
            ))  # fmt: skip
    return Comparison(a, b, rows, [] if rows else [f"{a}, {b}: {HERE}"])


def _rows(wanted: str, results: Sequence[Result]) -> list[tuple[Key, Row]]:
    if wanted.startswith(PREFIX):
        row = named(wanted)
        return [(key, _row(row, key)) for key in row.scores]
    mine = results_of(wanted, results)
    called, tasks, rows = labels(mine), grouped(mine, version), []
    pool = Pool(results)
    for group in tasks.values():
        if task := superb.task_of(group[0]):
            rows += [((task, row.metric), row) for row in scores(group, called, pool)]
    each = overall(tasks, called, pool)
    return rows + [((METRIC, row.task.removeprefix(f"{METRIC} ")), row) for row in each]


def beside(rows: Iterable[Published], tasks: Tasks, called: Labels) -> list[Row]:
    """Published rows on those of the measured tasks, in one version each, that are SUPERB's."""
    mine = {task: v for v, group in tasks.items() if (task := superb.task_of(group[0]))}
    sets = superb.complete(tasks)
    return [
        _row(row, key)._replace(
            suite=next(iter(tasks)).suite,
            task=called[mine[key[0]]] if key[0] in mine else " ".join(key),
        )
        for row in rows
        for key in row.scores
        if key[0] in mine or (key[0] == METRIC and key[1] in sets)
    ]


def left_out(rows: Iterable[Published], shown: Container[str]) -> list[str]:
    """One line for all rows that stand beside nothing."""
    names = [row.name for row in rows if row.name not in shown]
    return [f"{', '.join(names)}: {HERE}"] if names else []


def _row(row: Published, key: Key) -> Row:
    total = key[0] == METRIC
    own = re.search(r"\((.+)\)", row.tuned_on)  # the corpus that it was fine-tuned on
    heard = own and not total and own[1].lower() == superb.CORPORA[key[0]]
    return Row(
        suite="published", upstream=row.name, fingerprint="",
        task=" ".join(key) if total else key[0], recipe="", metric=METRIC if total else key[1],
        better="higher" if total else METRICS[key[1]].better, score=row.scores[key], low=math.nan,
        high=math.nan, seeds=0, clusters=0, unit="speakers", utterances=0, seen=0.0,
        note=f"{NOTE}; {HEARD_TOO}" if heard else NOTE,
    )  # fmt: skip
