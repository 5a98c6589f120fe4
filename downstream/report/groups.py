"""Which results belong together, and what to call them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from downstream.report.results import Result
from upstream.common.errors import UserError, near_miss

Key = TypeVar("Key")


class TaskVersion(NamedTuple):
    """What two upstreams must have in common to be compared."""

    suite: str
    task: str
    revision: str


class Name(NamedTuple):
    """An upstream: what it is called and what it is."""

    upstream: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.upstream}@{self.fingerprint}"


class Labels(NamedTuple):
    """What a table calls upstreams and tasks."""

    upstream: dict[Name, str]  # with the fingerprint where a name has several
    task: dict[TaskVersion, str]  # with suite and revision where needed to tell them


def version(result: Result) -> TaskVersion:
    """What a result is one upstream's answer to."""
    return TaskVersion(result.cell.suite, result.cell.task, result.cell.revision)


def name(result: Result) -> Name:
    """The upstream that a result is about."""
    return Name(result.cell.upstream, result.cell.fingerprint)


def grouped(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """The results that have a key in common, by key."""
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return groups


def of_upstream(results: Iterable[Result], wanted: str) -> list[Result]:
    """The results of one upstream, by name or name@fingerprint.

    Raises UserError if there are none, or if the name stands for several weights.
    """
    groups = grouped(results, name)
    hits = sorted(n for n in groups if wanted in (n.upstream, str(n)))
    if not hits:
        known = {n.upstream for n in groups}
        raise UserError(f"no results for upstream {wanted!r}{near_miss(wanted, known)}")
    if len(hits) > 1:
        choices = " or ".join(map(str, hits))
        raise UserError(f"{wanted!r} has results of different weights; say {choices}")
    return groups[hits[0]]


def labels(results: Iterable[Result]) -> Labels:
    """Names as short as they can be and still tell apart what is there."""
    results = list(results)
    names, versions = {name(r) for r in results}, {version(r) for r in results}
    weights = Counter(n.upstream for n in names)
    versions_of = Counter((v.suite, v.task) for v in versions)
    several = len({v.suite for v in versions}) > 1
    return Labels(
        {n: str(n) if weights[n.upstream] > 1 else n.upstream for n in names},
        {
            v: f"{v.suite}/" * several
            + v.task
            + f"@{v.revision[:6]}" * (versions_of[v.suite, v.task] > 1)
            for v in versions
        },
    )
