"""Upstreams that were built here, found by the names under which a results folder holds them.

`merged` and `finetuned` are no upstreams of the world but of one results folder. Commands that only
look (export, describe, check, predict) take what is there, and build nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from upstream.common.errors import UserError
from upstream.resolve import RECIPES, canonical, parse

BUILT = {"merged": "merge.json", "finetuned": "finetune.json"}  # name -> record beside its weights
EXACT = re.compile(r"(.+)@([0-9a-f]{12})")  # NAME@FINGERPRINT
MOST_LISTED = 6


class Stored(NamedTuple):
    """Weights in a results folder."""

    name: str  # `merged`, `finetuned`, or as results call it
    fingerprint: str
    folder: Path
    options: str = ""  # of the upstream's name that its weights are to be loaded with

    @property
    def spec(self) -> str:
        """What `upstream.load` takes."""
        return f"{self.folder}{self.options}"


def is_built(spec: str) -> bool:
    """Whether a name stands for what is built here: merged, finetuned, a recipe, NAME@FINGERPRINT.

    Raises UserError for what is no name at all.
    """
    name, options = parse(spec)
    if EXACT.fullmatch(spec) and not Path(name).exists():
        return True
    return (name in BUILT and "recipe" not in options) or name.endswith(RECIPES)


def find(spec: str, results: Path, suite: str | None = None) -> Stored:
    """The weights that `results` holds under a name; those scored in `suite` come first.

    Raises UserError if there are none, with the command that builds them, or several, with their
    names.
    """
    stored = hold(spec, results, suite)
    if stored is None:
        there = sorted({f"{each.name}@{each.fingerprint}" for each in _stored(results)})
        hint = f"; there is {', '.join(there[:MOST_LISTED])}" if there else ""
        raise UserError(
            f"{spec}: {results} holds no such upstream, and nothing is built unasked; build it: "
            f"benchmark.py --upstream {spec} --suite {suite or 'SUITE'} --results {results}{hint}"
        )
    return stored


def hold(spec: str, results: Path, suite: str | None = None) -> Stored | None:
    """The same; None if there are none.

    Names are those of scored cells, else of folders of weights. Raises UserError for several.
    """
    stored = _stored(results)
    if exact := EXACT.fullmatch(spec):
        matches = [each for each in stored if each.fingerprint == exact[2]]
        return matches[0]._replace(name=exact[1]) if matches else None
    prints = _scored(canonical(spec), results, suite)
    matches = [each for each in stored if each.fingerprint in prints]
    if not prints and spec in BUILT:
        matches = [each for each in stored if each.name == spec]
    if prints and not matches:
        raise UserError(
            f"{spec}: {results} holds scores of {spec}@{min(prints)}, whose weights are gone; run "
            "the benchmark again"
        )
    names = sorted({f"{spec}@{each.fingerprint}" for each in matches})
    if len(names) > 1:
        listed = ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")
        raise UserError(f"{spec!r} stands for several upstreams in {results}; name one: {listed}")
    return matches[0]._replace(name=spec) if matches else None


def _scored(name: str, results: Path, suite: str | None) -> set[str]:
    """Fingerprints under which cells of a name were scored: in the suite, else anywhere."""
    from downstream.report.results import load_results

    cells = [each.cell for each in load_results(results) if each.cell.upstream == name]
    inside = {cell.fingerprint for cell in cells if cell.suite == suite}
    return inside or {cell.fingerprint for cell in cells}


def _stored(results: Path) -> list[Stored]:
    """All weights that were built in a results folder."""
    from upstream.checkpoints.containers import plain, read_json

    stored = []
    for name, record in BUILT.items():
        for path in sorted((results / "upstreams").glob(f"*/{record}")):
            try:
                content = read_json(path)
            except UserError:  # no record of ours: not built here
                continue
            fingerprint, options = content.get("fingerprint", ""), ""
            if name == "merged":
                fingerprint = plain(content.get("fingerprints")).get("merged", "")
                options = _base_options(plain(content.get("recipe")).get("base"))
            if isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{12}", fingerprint):
                stored.append(Stored(name, fingerprint, path.parent, options))
    return stored


def _base_options(base: object) -> str:
    """The options of a merge's base that are the merge's as well."""
    try:
        settings = parse(base)[1] if isinstance(base, str) else {}
    except UserError:
        return ""
    known = {"padding": ("exact", "s3prl"), "precision": ("float32", "bfloat16", "float16")}
    return "".join(
        f":{key}={settings[key]}" for key, values in known.items() if settings.get(key) in values
    )
