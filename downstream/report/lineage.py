"""What an upstream was made of, from the record that stands beside its weights."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from downstream.report.groups import Name, name
from downstream.report.results import SPOILT, Result
from upstream.common import disk
from upstream.common.text import LONGEST_PATH, read_name

MOST = 1000  # models that a merge may be made of
OTHER = ("name", "seed", "collect", "tensorboard")  # keys that change no weights, and the seed


class Lineage(NamedTuple):
    """A fine-tuned upstream, or a merge of such."""

    base: str  # fingerprint
    tuned: tuple[str, ...]  # fingerprints; of a fine-tuned upstream its own
    tuned_on: tuple[str, ...]  # tasks
    way: str  # how they were merged: the method and all but alpha; "" if they were not
    alpha: float | None  # None where it is no single number
    seconds: float  # of fine-tuning and merging
    peak: int  # bytes of memory
    stored: int  # bytes
    strategy: str = ""  # of stage 1, and what it collected: `stable/ema-0.99`
    recipe: str = ""  # of stage 1, all but names and the seed: rows of other seeds share it
    seeds: tuple[int, ...] = ()  # of stage 1, of each fine-tuned upstream
    layers: tuple[float, float] | None = None  # relative change of the least and most moved layer

    @property
    def row(self) -> tuple[Any, ...]:
        """What upstreams have in common that differ in nothing but fine-tuning seeds."""
        return self.base, self.tuned_on, self.strategy, self.recipe, self.way, self.alpha

    @property
    def curve(self) -> tuple[str, tuple[str, ...], str] | None:
        """What merges that differ in nothing but alpha have in common; None without a merge."""
        return (self.base, self.tuned, self.way) if self.way else None


def lineages(results: Iterable[Result]) -> dict[Name, Lineage]:
    """Of every upstream whose record can still be read."""
    sources = {name(r): (Path(r.score.source), r.folder.parents[3]) for r in results}
    read = dict[Path, Lineage | None]()
    found = {each: _lineage(*places, read) for each, places in sources.items()}
    return {each: lineage for each, lineage in found.items() if lineage}


def likely_base(results: Iterable[Result]) -> str | None:
    """What most upstreams grew from, as name@fingerprint, if it has results itself."""
    results = list(results)
    known = lineages(results)
    count = Counter(lineage.base for lineage in known.values())
    here = {each for each in map(name, results) if each not in known and each[1] in count}
    best = min(here, key=lambda each: (-count[each[1]], each), default=None)
    return "@".join(best) if best else None


def _lineage(source: Path, root: Path, read: dict[Path, Lineage | None]) -> Lineage | None:
    """Of the folder `source`, or where results were moved to `root`, of its namesake there.

    What a run collected, as `finetune@1f3a/ema-0.99`, has the run's own record. `read`: what was
    found before; of a folder that is just being read nothing, for a record may name itself.
    """
    if (key := root / source) not in read:
        read[key] = None
        read[key] = _found(source, root, read)
    return read[key]


def _found(source: Path, root: Path, read: dict[Path, Lineage | None]) -> Lineage | None:
    run = source.parent
    if "@" in run.name and (whole := _lineage(run, root, read)):
        strategy, layers = f"{whole.strategy}/{source.name}", None
        for folder in (run, root / "upstreams" / run.name):
            with contextlib.suppress(*SPOILT):
                record = disk.read_record(folder / "finetune.json")
                layers = layers or _layers(record["collected"][source.name])
        return whole._replace(strategy=strategy, tuned=(str(source),), layers=layers)
    for folder in (source, root / "upstreams" / source.name):
        try:
            if (folder / "merge.json").is_file():
                return _merged(disk.read_record(folder / "merge.json"), folder, root, read)
            if (folder / "finetune.json").is_file():
                return _tuned(disk.read_record(folder / "finetune.json"))
        except SPOILT:  # no record of ours
            pass
    return None


def _named(*names: Any) -> tuple[str, ...]:
    """Names out of a record. Raises ValueError for what is no text."""
    return tuple(read_name(name, "a name in a record", LONGEST_PATH) for name in names)


def _number(value: Any) -> float:
    """Raises ValueError, OverflowError or TypeError for what is no finite number."""
    if not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def _tuned(record: dict[str, Any]) -> Lineage:
    recipe = record["recipe"]
    aims = [aim.get("task") for aim in (recipe, *recipe.get("also", []))]
    return Lineage(
        base=_named(record["base_fingerprint"])[0],
        tuned=_named(record["fingerprint"]),
        tuned_on=_named(*(Path(aim).stem for aim in aims if isinstance(aim, str))),
        way="",
        alpha=1.0,
        seconds=_number(record.get("seconds", 0)),
        peak=int(record.get("peak_memory_bytes", 0)),
        stored=int(record.get("stored_bytes", 0)),
        strategy=_named(recipe.get("strategy", "stable"))[0],
        recipe=json.dumps({k: v for k, v in recipe.items() if k not in OTHER}, sort_keys=True),
        seeds=(int(recipe.get("seed", 0)),),
        layers=_layers(record.get("moved", {})),
    )


def _layers(moved: dict[str, Any]) -> tuple[float, float] | None:
    shares = [_number(share) for module, share in moved.items() if module.startswith("layer ")]
    return (min(shares), max(shares)) if shares else None


def _merged(
    record: dict[str, Any], folder: Path, root: Path, read: dict[Path, Lineage | None]
) -> Lineage:
    """Costs with those of the fine-tuned upstreams, where their folders are still there."""
    names = record["tuned"][:MOST]
    places = [[Path(tuned), folder / tuned] for tuned in _named(*names)]  # or beside the record
    parts = [[_lineage(place, root, read) for place in each] for each in places]
    known = [found for each in parts if (found := next(filter(None, each), None))]
    params = dict(record["params"])
    alpha = params.pop("alpha", None)
    recipe = record["recipe"]
    rest = [recipe.get(key) for key in ("only", "pos_conv", "several")]
    return Lineage(
        base=_named(record["base_fingerprint"])[0],
        tuned=_named(*record["fingerprints"]["tuned"][:MOST]),
        tuned_on=tuple(dict.fromkeys(task for part in known for task in part.tuned_on)),
        way=json.dumps([*_named(record["method"]), params, *rest], sort_keys=True),
        alpha=_number(alpha) if isinstance(alpha, (int, float)) else None,
        seconds=_number(record.get("seconds", 0)) + sum(part.seconds for part in known),
        peak=max([int(record.get("peak_memory_bytes", 0)), *(part.peak for part in known)]),
        stored=int(record.get("stored_bytes", 0)),
        strategy=" and ".join(dict.fromkeys(part.strategy for part in known)),
        recipe=" ".join(part.recipe for part in known),
        seeds=tuple(seed for part in known for seed in part.seeds),
        layers=_layers(record.get("moved", {})) or _moved(record, known),
    )


def _moved(record: dict[str, Any], parts: list[Lineage]) -> tuple[float, float] | None:
    """Of an older merge, which does not say: if linear and of one, alpha times what that moved."""
    alpha, single = record["params"].get("alpha"), parts[0].layers if len(parts) == 1 else None
    plain = record["method"] == "linear" and not record["recipe"].get("only")
    if single is None or not plain or not isinstance(alpha, (int, float)):
        return None
    return alpha * single[0], alpha * single[1]
