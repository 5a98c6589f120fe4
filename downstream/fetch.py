"""The corpora of a suite from where their makers keep them, as `fetch.yaml` in the suite says."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from downstream import recipe
from upstream.common import disk
from upstream.common.download import Source, download, forget
from upstream.common.errors import UserError
from upstream.common.schema import Bound, build, read_yaml
from upstream.common.unpack import unpack

NAME = "fetch.yaml"
MEGABYTE = 1_000_000
BLOCK = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """Where an archive is and what is known of it."""

    url: str
    licence: str
    cite: str
    megabytes: Annotated[float, Bound(0, 1e6, open_low=True)]  # packed or unpacked, at the most
    sha256: str | None = None  # None: noted at the first download, and due at any later one
    hosts: list[str] = field(default_factory=list)  # to which the url's may send us on


@dataclass(frozen=True)
class Corpora:
    """`fetch.yaml` of a suite."""

    kind: Literal["fetch"]
    variable: str  # of the environment, in the `root` of the suite's recipes
    corpora: dict[str, Corpus]  # by the folder that each is unpacked to


def load(suite: str) -> Corpora:
    """What a suite says of its corpora. Raises UserError where it says nothing."""
    path = recipe.suite_folder(suite) / NAME
    if not path.exists():
        raise UserError(f"suite {suite}: its corpora cannot be fetched (it has no {NAME})")
    corpora = build(Corpora, read_yaml(path), str(path))
    for name in corpora.corpora:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{path}: corpora: {name!r} is no name of a folder")
    return corpora


def fetch(suite: str, output: Path | None) -> None:
    """Download and unpack what is not there yet, then count what the suite's recipes read.

    output: the folder of all corpora; None: the one that the suite's variable names. Interrupted,
    the same call goes on. Raises UserError, after the other corpora, if one could not be had.
    """
    corpora = load(suite)
    named = os.environ.get(corpora.variable)
    if output is None and not named:
        raise UserError(
            f"say where the corpora shall be: --output FOLDER, or export {corpora.variable}=FOLDER"
        )
    folder = (output or Path(named or "")).absolute()
    faults = []
    with disk.lease(folder, wait=False) as ours:
        if not ours:
            raise UserError(f"{folder}: another process fetches into it")
        for name, corpus in corpora.corpora.items():
            try:
                _fetch(name, corpus, folder)
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                faults.append(f"{name}: {error}")
    if faults:
        others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{others}")
    os.environ[corpora.variable] = str(folder)
    for name, path in recipe.suite(suite).items():
        print(f"{name}: {_count(path, folder)}")
    print(f"run: export {corpora.variable}={folder}")


def _count(path: Path, folder: Path) -> str:
    examples = recipe.examples(recipe.load(path), folder)
    return f"{len(examples)} utterances of {len({e.speaker for e in examples})} speakers"


def _fetch(name: str, corpus: Corpus, folder: Path) -> None:
    """One corpus into `folder / name`. Raises UserError."""
    place = folder / name
    if os.path.lexists(place):
        print(f"{name}: is there already ({place})")
        return
    print(f"{name}: {corpus.licence}\n  cite: {corpus.cite}\n  from: {corpus.url}", flush=True)
    archive, record = folder / f"{name}.archive", folder / f"{name}.fetched.json"
    largest = round(corpus.megabytes * MEGABYTE)
    download(Source(corpus.url, largest, corpus.hosts), archive, name)
    _require_digest(corpus, archive, record)
    unpacked = folder / f"{name}.unpacking"
    if unpacked.exists():  # of a call that was interrupted
        shutil.rmtree(unpacked)
    try:
        unpack(archive, unpacked, largest)
    except UserError:
        shutil.rmtree(unpacked, ignore_errors=True)
        forget(archive)  # or the next call would not get another one
        raise
    os.replace(_inner(unpacked), place)
    shutil.rmtree(unpacked, ignore_errors=True)
    forget(archive)


def _require_digest(corpus: Corpus, archive: Path, record: Path) -> None:
    """Note the SHA-256 of the archive, or compare it with what is due. Raises UserError."""
    with archive.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
    noted = disk.read_checked(record)
    known = noted if isinstance(noted, dict) and noted.get("url") == corpus.url else {}
    due = corpus.sha256 or known.get("sha256")
    if due and due != digest.hexdigest():
        where = NAME if corpus.sha256 else record
        forget(archive)
        raise UserError(
            f"{corpus.url}: is not the file it was: SHA-256 {digest.hexdigest()}, "
            f"{due} in {where}; what came was removed"
        )
    if not due:
        print(f"  SHA-256: {digest.hexdigest()}, noted in {record}: no other was known")
    facts = {"url": corpus.url, "sha256": digest.hexdigest(), "bytes": archive.stat().st_size}
    disk.write_checked(record, facts)


def _inner(folder: Path) -> Path:
    """The only folder in `folder`, if that is all it holds: archives differ in this."""
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
