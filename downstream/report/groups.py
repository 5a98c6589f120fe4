"""Which results belong together, and what to call them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias, TypeVar

from downstream.report.results import Result
from upstream.common.errors import UserError, near_miss
from upstream.resolve import canonical

Key = TypeVar("Key")
Item = TypeVar("Item")
Name: TypeAlias = tuple[str, str]  # of an upstream: what it is called, its fingerprint
Labels: TypeAlias = dict[tuple[str, ...], str]  # what a table calls a Name or a TaskVersion


class TaskVersion(NamedTuple):
    """What two upstreams must have in common to be compared."""

    suite: str
    task: str
    revision: str


def version(result: Result) -> TaskVersion:
    """What a result is one upstream's answer to."""
    return TaskVersion(result.cell.suite, result.cell.task, result.cell.revision)


def name(result: Result) -> Name:
    """The upstream that a result is about."""
    return result.cell.upstream, result.cell.fingerprint


def grouped(results: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The results that have a key in common, by key."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return groups


def results_of(wanted: str, results: Iterable[Result]) -> list[Result]:
    """The results of one upstream, by name or name@fingerprint.

    Raises UserError if there are none, or if the name stands for several weights.
    """
    groups = grouped(results, name)
    spellings = {wanted, canonical(wanted)}  # hf:folder/ is folder
    hits = sorted(n for n in groups if spellings & {n[0], "@".join(n)})
    if len(hits) > 1:
        choices = " or ".join(map("@".join, hits))
        raise UserError(f"{wanted!r} has results of different weights; say {choices}")
    if not hits:
        known = {upstream for upstream, _ in groups}
        raise UserError(f"no results for upstream {wanted!r}{near_miss(wanted, known)}")
    return groups[hits[0]]


def labels(results: Iterable[Result]) -> Labels:
    """Names as short as they can be and still tell apart what is there.

    An upstream has its fingerprint where its name has several, a task suite and revision likewise.
    """
    results = list(results)
    names, versions = {name(r) for r in results}, {version(r) for r in results}
    weights = Counter(upstream for upstream, _ in names)
    revisions = Counter((v.suite, v.task) for v in versions)
    several = len({v.suite for v in versions}) > 1
    called: Labels = {n: "@".join(n) if weights[n[0]] > 1 else n[0] for n in names}
    for v in versions:
        suite = f"{v.suite}/" if several else ""
        revision = f"@{v.revision[:6]}" if revisions[v.suite, v.task] > 1 else ""
        called[v] = f"{suite}{v.task}{revision}"
    return called
