"""The result of one cell on disk: predictions, their summary, score (see results/README.md)."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from downstream.base import Direction, Record, record
from downstream.report.summary import Sample, Summary, summarise
from downstream.tasks.metrics import parted
from upstream.common import PROJECT, disk
from upstream.common.errors import UserError
from upstream.common.schema import bind, convert
from upstream.common.text import LONGEST_PATH, portable, read_name

FORMAT = 1  # of score.json; a later layout must raise it
SUMMARY = 3  # of summary.json; with another number it is made again from the predictions
ROUNDING = 1e-6  # per cent
SPOILT = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError,
)  # fmt: skip
PRINT = re.compile(r"[\w.-]{1,64}")  # a fingerprint or a revision: 12 hex digits


@dataclass(frozen=True)
class Cell:
    """What is computed, stored, resumed and compared as one unit."""

    upstream: str  # as the user names it: hubert_base, hf:org/model, merged:alpha=0.5
    fingerprint: str  # 12 hex digits
    suite: str
    task: str
    revision: str  # 12 hex digits: the recipe and the data it was used on
    seed: int

    def folder(self, root: Path) -> Path:
        """`<root>/<upstream>@<fingerprint>/<suite>/<task>@<revision>/seed<k>`."""
        upstream = f"{safe_name(self.upstream)}@{self.fingerprint}"
        task = f"{safe_name(self.task)}@{self.revision}"
        return root / upstream / safe_name(self.suite) / task / f"seed{self.seed}"


@dataclass(frozen=True)
class Score:
    """What score.json says about one cell."""

    metric: str  # a name in METRICS
    better: Direction
    score: float  # per cent; with folds, the unweighted mean of the folds' scores
    lr: dict[str, float]  # fold ("" if there are none) -> the head's chosen learning rate
    dev: dict[str, dict[str, float]]  # fold -> learning rate -> best dev score, of all tried
    n: int  # test utterances
    speakers: int
    steps: int
    seconds: float
    device: str
    versions: dict[str, str]
    git: dict[str, Any]  # revision ("unknown" outside a repository), dirty
    created: str  # ISO 8601, UTC
    recipe: dict[str, Any]  # the whole recipe
    source: str = ""  # where the upstream's weights came from
    warnings: list[str] = field(default_factory=list)
    features: str = ""  # kind and precision of what the head was trained on
    clusters: str = ""  # 12 hex digits over who speaks which utterance
    seen: int = 0  # test utterances whose audio and labels the upstream was fine-tuned on
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)  # fold -> settled on dev
    metrics: dict[str, Direction] = field(default_factory=dict)  # all, where there are several

    @property
    def directions(self) -> dict[str, Direction]:
        """Where better is, of every metric."""
        return {self.metric: self.better, **self.metrics}


@dataclass(frozen=True)
class Result:
    """A finished cell that was read back. Predictions are read when they are first asked for."""

    cell: Cell
    score: Score
    folder: Path

    @cached_property
    def predictions(self) -> list[Record]:
        """What the head said of the test set. Raises UserError if the file is spoilt."""
        path = self.folder / "predictions.jsonl"
        with reading(path, f"delete the folder {self.folder}"):
            lines = disk.read(path, disk.TABLE_BYTES).decode().split("\n")
            return [record(json.loads(line)) for line in lines if line]

    @cached_property
    def summary(self) -> Summary:
        """Of the predictions, which are read only if they changed since it was last made.

        Raises UserError naming the file if predictions and score do not belong together.
        """
        with reading(self.folder / "predictions.jsonl", f"delete the folder {self.folder}"):
            summary = _read_summary(self.folder)
            if summary is None:
                summary = summarise(self.predictions, self.score.metric, self.score.directions)
                with contextlib.suppress(UserError):  # somebody else's folder can still be read
                    _write_summary(self.folder, summary)
            score = float(summary.samples[self.score.metric].whole[0])
            if not abs(score - self.score.score) < ROUNDING:
                raise ValueError(f"it scores {score:g}, score.json says {self.score.score:g}")
            return summary


def save(root: Path, cell: Cell, result: Score, predictions: Sequence[Record]) -> Path:
    """Write the three files and return their folder. A cell is finished once score.json exists.

    An interruption at any point leaves either the whole result or an unfinished cell.
    Raises UserError if the folder cannot be written.
    """
    folder = cell.folder(root)
    names = asdict(cell)
    names["recipe"] = names.pop("revision")  # its name in format 1
    disk.guard(root)
    told = asdict(result)  # names stay what they are; of all else nobody needs this machine's paths
    told |= portable({key: told[key] for key in ("recipe", "source", "warnings")}, root)
    content = {"format": FORMAT, "cell": names, "result": told}
    lines = (json.dumps(line._asdict(), ensure_ascii=False) for line in predictions)
    disk.make_folder(folder)
    disk.remove_file(folder / "score.json")  # an older one must not vouch for new predictions
    disk.write(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    with disk.writing(folder):
        _write_summary(folder, summarise(predictions, result.metric, result.directions))
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    disk.write(folder / "score.json", text + "\n")
    return folder


def finished(root: Path, cell: Cell) -> bool:
    """Whether the cell needs no more work."""
    return (cell.folder(root) / "score.json").is_file()


def load_results(root: Path) -> list[Result]:
    """Every finished cell below `root`, in the order of their folders; none if there is no folder.

    Raises UserError naming the file if a score.json cannot be understood.
    """
    return [read_cell(path) for path in sorted(root.glob("*@*/*/*@*/seed*/score.json"))]


def results_in(folder: Path) -> list[Result]:
    """What a results folder, or one upstream's folder in it, holds of a single upstream.

    It is called like the folder, so that the same name may stand for other results elsewhere.
    None if the folder has no results; UserError if they are of several upstreams.
    """
    cells = sorted(folder.glob("*/*@*/seed*/score.json"))
    results = [read_cell(path) for path in cells] or load_results(folder)
    if len(found := sorted({str(r.folder.parents[2]) for r in results})) > 1:
        raise UserError(f"{folder} has results of several upstreams; say {' or '.join(found)}")
    return [replace(r, cell=replace(r.cell, upstream=str(folder))) for r in results]


def read_cell(path: Path) -> Result:
    """The cell of one score.json. Raises UserError naming the file if it cannot be understood."""
    with reading(path, "delete it"):
        content = json.loads(disk.read(path, disk.RECORD_BYTES))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r:.40}, this version reads {FORMAT}")
        json.dumps(content, ensure_ascii=False).encode()  # raises for half a character
        names, stored = content["cell"], content["result"]
        cell = _cell(**names)
        dev = {  # of a head that diverged it was NaN
            str(fold): {lr: _dev(value) for lr, value in scores.items()}
            for fold, scores in stored.pop("dev").items()
        }
        score = Score(**bind(Score, stored, "result", given=("dev",), read=_typed), dev=dev)
        score = _shown(score)
        if score.n < 1 or score.seen < 0 or score.seconds < 0:
            raise ValueError("its counts are not those of a test set")
        return Result(cell, score, path.parent)


def _cell(upstream: str, fingerprint: str, suite: str, task: str, recipe: str, seed: int) -> Cell:
    """The names of a record. Raises ValueError for what cannot be one."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r:.40}")
    for print_ in (fingerprint, recipe):
        if not isinstance(print_, str) or not PRINT.fullmatch(print_):
            raise ValueError(f"fingerprint or revision is {print_!r:.40}")
    upstream = read_name(upstream, "upstream", LONGEST_PATH)
    return Cell(
        upstream, fingerprint, read_name(suite, "suite"), read_name(task, "task"), recipe, seed
    )


def _shown(score: Score) -> Score:
    """With names that can be shown. Raises ValueError for what cannot be one."""
    made = {read_name(k, "versions"): read_name(v, "versions") for k, v in score.versions.items()}
    return replace(
        score,
        metric=read_name(score.metric, "metric", LONGEST_PATH),
        metrics={read_name(k, "metrics", LONGEST_PATH): v for k, v in score.metrics.items()},
        device=read_name(score.device, "device"),
        created=read_name(score.created, "created"),
        versions=made,
    )


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A field of Score. Raises ValueError for a value of another type."""
    try:
        return convert(value, hint, where)
    except UserError as error:
        raise ValueError(f"{where.removeprefix('result: ')} is {value!r:.40}") from error


def _dev(value: Any) -> float:
    """Raises TypeError for no number."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"dev is {value!r:.40}")
    return math.nan if value is None else float(value)


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """What is wrong with a file as one line that names it; a read that failed for now is none."""
    try:
        yield
    except disk.Unreadable:
        raise
    except SPOILT as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path} cannot be read ({reason}); {remedy} and run the benchmark again"
        ) from None


def provenance() -> dict[str, Any]:
    """The fields of `Score` that say what made it: versions, git, created."""
    packages = {"project": "speech-ft-bench", "torch": "torch", "transformers": "transformers"}
    versions = {name: _version(package) for name, package in packages.items()}
    return {
        "versions": {"python": sys.version.split()[0], **versions},
        "git": _git(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def safe_name(name: str) -> str:
    """A readable folder name: `hf:org/model` becomes `hf-org-model`. What distinguishes two
    upstreams is the fingerprint beside it."""
    safe = re.sub(r"[^\w.=+-]+", "-", name).strip("-.")
    return safe[-80:].lstrip("-.") or "unnamed"  # the end of a path says most


def finite(value: Any) -> Any:
    """JSON's view of the value, NaN and infinities as None: JSON has no word for them."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _stamp(folder: Path) -> list[int]:
    """What tells that predictions were written again."""
    facts = disk.require_file(folder / "predictions.jsonl")
    return [SUMMARY, facts.st_size, facts.st_mtime_ns]


def _write_summary(folder: Path, summary: Summary) -> None:
    samples = {
        metric: [float(sample.whole[0]), sample.without[:, 0].tolist()]
        for metric, sample in summary.samples.items()
    }
    content = {"stamp": _stamp(folder), **vars(summary), "samples": samples}
    disk.write_checked(folder / "summary.json", content)


def _read_summary(folder: Path) -> Summary | None:
    """None if there is none of these predictions. Raises UserError without predictions."""
    stamp = _stamp(folder)
    try:
        content = disk.read_checked(folder / "summary.json")
        if not content or content.pop("stamp") != stamp:
            return None
        samples = {
            metric: Sample(np.array([float(whole)]), np.array(without, float)[:, None])
            for metric, (whole, without) in content.pop("samples").items()
        }
        levels = {
            metric: (float(chance), float(majority))
            for metric, (chance, majority) in content.pop("baselines").items()
        }
        summary = Summary(**content, samples=samples, baselines=levels)
        return summary if _sound(summary) else None
    except SPOILT:  # it is made again
        return None


def _sound(summary: Summary) -> bool:
    """Whether the parts of a summary fit each other. Raises TypeError and the like."""
    views = [parted(metric) for metric in summary.samples]
    plain = {metric for metric, view in views if view}
    rows = [sample.without.shape for sample in summary.samples.values()]
    return (
        isinstance(summary.test, str)
        and type(summary.utterances) is int
        and summary.utterances > 0
        and summary.unit in ("speakers", "folds")
        and all(isinstance(name, str) for name in summary.clusters)
        and all(shape == (len(summary.clusters), 1) for shape in rows)
        and plain <= summary.groups.keys()
        and all(float(x) == x for scores in summary.groups.values() for x in scores.values())
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _git() -> dict[str, Any]:
    def ask(*words: str) -> str:
        command = ["git", "-C", str(PROJECT), *words]
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, timeout=20
        ).strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # an installed copy may lie inside somebody else's repository
        if Path(ask("rev-parse", "--show-toplevel")).resolve() == PROJECT:
            dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
            return {"revision": ask("rev-parse", "HEAD"), "dirty": dirty}
    return {"revision": "unknown", "dirty": None}
