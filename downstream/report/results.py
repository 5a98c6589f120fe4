"""The result of one cell on disk: `score.json` and `predictions.jsonl` (see results/README.md)."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downstream.base import Count
from downstream.tasks.metrics import Direction
from upstream.common import PROJECT
from upstream.common.errors import UserError

if TYPE_CHECKING:
    from downstream.report.statistics import Rows

FORMAT = 1  # of score.json; a later layout must raise it


@dataclass(frozen=True)
class Cell:
    """What is computed, stored, resumed and compared as one unit."""

    upstream: str  # as the user names it: hubert_base, hf:org/model, merged:alpha=0.5
    fingerprint: str  # 12 hex digits
    suite: str
    task: str
    recipe: str  # 12 hex digits
    seed: int

    def folder(self, root: Path) -> Path:
        """`<root>/<upstream>@<fingerprint>/<suite>/<task>@<recipe>/seed<k>`."""
        upstream = f"{safe_name(self.upstream)}@{self.fingerprint}"
        task = f"{safe_name(self.task)}@{self.recipe}"
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


@dataclass(frozen=True)
class Result:
    """A finished cell that was read back. Predictions are read when they are first asked for."""

    cell: Cell
    score: Score
    folder: Path

    @cached_property
    def predictions(self) -> list[Count]:
        """One per test utterance. Raises UserError if the file is missing or spoilt."""
        path = self.folder / "predictions.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            return [Count(**json.loads(line)) for line in lines if line]
        except (OSError, ValueError, TypeError) as error:
            raise _spoilt(path, error, f"delete the folder {self.folder}") from None

    @cached_property
    def rows(self) -> Rows:
        """The predictions as `statistics.Rows`."""
        columns = ["id", "speaker", "errors", "total", "fold"]
        import pandas as pd  # a second; only tables need it

        table = pd.DataFrame(self.predictions, columns=Count._fields)[columns]
        return table.assign(seed=self.cell.seed)


def save(root: Path, cell: Cell, result: Score, predictions: Sequence[Count]) -> Path:
    """Write the two files and return their folder. A cell is finished once score.json exists.

    An interruption at any point leaves either the whole result or an unfinished cell.
    Raises UserError if the folder cannot be written.
    """
    folder = cell.folder(root)
    lines = (json.dumps(line._asdict(), ensure_ascii=False) for line in predictions)
    content = {"format": FORMAT, "cell": asdict(cell), "result": asdict(result)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # an older score must not vouch for new predictions
        (folder / "score.json").unlink(missing_ok=True)
        write_atomic(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(folder / "score.json", text + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; "
            "check its permissions and the free space, or choose another results folder"
        ) from None
    return folder


def finished(root: Path, cell: Cell) -> bool:
    """Whether the cell needs no more work."""
    return (cell.folder(root) / "score.json").is_file()


def load(root: Path) -> list[Result]:
    """Every finished cell below `root`, in the order of their folders; none if there is no folder.

    Raises UserError naming the file if a score.json cannot be understood.
    """
    return [read_cell(path) for path in sorted(root.glob("*@*/*/*@*/seed*/score.json"))]


def provenance() -> dict[str, Any]:
    """The fields of `Score` that say what made it: versions, git, created."""
    return {
        "versions": {
            "python": sys.version.split()[0],
            "project": _version("speech-ft-bench"),
            "torch": _version("torch"),
            "transformers": _version("transformers"),
        },
        "git": _git(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def safe_name(name: str) -> str:
    """A readable folder name: `hf:org/model` becomes `hf-org-model`, `merged:alpha=0.5`
    `merged-alpha=0.5`. What distinguishes two upstreams is the fingerprint beside it."""
    safe = re.sub(r"[^\w.=+-]+", "-", name).strip("-.")
    return safe[-80:].lstrip("-.") or "unnamed"  # the end of a path says most


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_cell(path: Path) -> Result:
    """The cell of one score.json. Raises UserError naming the file if it cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        stored = content["result"]
        # the dev score of a head that diverged was NaN
        dev = {
            fold: {lr: math.nan if value is None else value for lr, value in scores.items()}
            for fold, scores in stored["dev"].items()
        }
        result = Score(**{**stored, "dev": dev})
        if not isinstance(result.score, (int, float)):
            raise ValueError("no score")
        return Result(Cell(**content["cell"]), result, path.parent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _spoilt(path, error, "delete it") from None


def _spoilt(path: Path, error: Exception, remedy: str) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"{path} cannot be read ({reason}); {remedy} and run the benchmark again")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _git() -> dict[str, Any]:
    def ask(*words: str) -> str:
        command = ["git", "-C", str(PROJECT), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    unknown = {"revision": "unknown", "dirty": None}
    try:
        # an installed copy may lie inside somebody else's repository
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != PROJECT:
            return unknown
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"revision": ask("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return unknown
