"""What is not the same about two results, besides the upstreams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from downstream.report.groups import results_of
from downstream.report.results import Result
from downstream.report.summary import PREDICTED
from upstream.common.text import portable


def versions(x: Result, y: Result) -> str:
    """Why two results of a task are of different versions: keys of the recipe, or the data."""
    mine, theirs = (flat(portable(r.score.recipe)) for r in (x, y))
    keys = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
    if not keys:
        if x.summary.test == y.summary.test:
            return "the same recipe and test set, but other training or dev data"
        return f"the same recipe on other data: {test_sets(x, y)}"
    shown = [f"{k} ({mine.get(k, 'absent')!s:.40}, {theirs.get(k, 'absent')!s:.40})" for k in keys]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f"the recipes differ in {', '.join(shown[:3])}{more}"


def flat(recipe: Mapping[str, object], above: str = "") -> dict[str, object]:
    """Keys as `--set` writes them: `{"train": {"steps": 5}}` -> `{"train.steps": 5}`."""
    keys: dict[str, object] = {}
    for key, value in recipe.items():
        inner = flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else None
        keys |= inner if inner is not None else {f"{above}{key}": value}
    return keys


def test_sets(a: Result, b: Result) -> str:
    """Where two test sets part."""
    x, y = ({(r.id, r.metric): r._asdict() for r in side.predictions} for side in (a, b))
    if lone := sorted(x.keys() ^ y.keys()):
        return f"{len(lone)} utterances that only one was tested on (such as {lone[0][0]})"
    differ = [
        f"the {field} of {key[0]}"
        for key, fields in x.items()
        for field in fields.keys() - PREDICTED
        if fields[field] != y[key][field]
    ]
    if not differ:  # a summary that is not of its predictions
        return f"{a.folder} or {b.folder}: summary.json is of another test set; delete it"
    return f"the test sets disagree on {len(differ)} facts (such as {differ[0]})"


def circumstances(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """What the results of upstreams differ in besides their weights: versions, code, device."""
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for wanted in names:
        for r in results_of(wanted, results):
            facts = {f"{k} version": v for k, v in r.score.versions.items()}
            facts |= {"code": str(r.score.git.get("revision", ""))[:12], "device": r.score.device}
            facts[f"features of {r.cell.suite}/{r.cell.task}"] = r.score.features
            for fact, value in facts.items():
                seen[fact][wanted].add(str(value))
    notes = []
    for fact, sides in seen.items():
        if len(sides) > 1 and len({frozenset(values) for values in sides.values()}) > 1:
            shown = "; ".join(f"{n}: {', '.join(sorted(v)) or 'unknown'}" for n, v in sides.items())
            notes.append(f"not the same {fact}: {shown}")
    return notes
