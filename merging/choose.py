"""Choosing alpha on held-out dev scores, and what Speech-FT's fixed 0.25 would have cost."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from downstream import evaluate, jobs, results, survey
from downstream.evaluate import Identity, Prepared
from downstream.metrics import METRICS, Metric
from downstream.results import Cell, Score
from downstream.survey import Load, Request, Settings
from upstream.errors import UserError

DEFAULT = 0.25  # Speech-FT's, for every task and model
VERSION = 1  # of the rule below: another number, and alphas are chosen again
TIE = 1e-9


@dataclass(frozen=True)
class Choose:
    """The recipe's key: candidates, and the tasks (of the recipe's suite) that decide."""

    tasks: list[str]
    alpha: list[float] = field(default_factory=lambda: [0.0, 0.1, DEFAULT, 0.5, 0.75, 1.0])


@dataclass(frozen=True)
class Choice:
    """What was chosen and why. Alphas are keys as text (`"0.25"`), as JSON wants them."""

    alpha: float
    gain: dict[str, float]  # alpha -> mean relative reduction of dev errors against alpha = 0
    dev: dict[str, dict[str, float]]  # task -> alpha -> dev score, per cent
    metric: dict[str, str]  # task -> a name in METRICS
    regret: dict[str, float]  # task -> points that 0.25 is worse by than the chosen alpha, on dev

    @property
    def mean_regret(self) -> float:
        """Over the tasks, in points."""
        return sum(self.regret.values()) / len(self.regret)

    def lines(self) -> list[str]:
        """A table to print: alpha by task."""
        rows = [f"alpha chosen on dev scores of {', '.join(self.dev)}: {self.alpha:g}"]
        for alpha, gain in self.gain.items():
            scores = "  ".join(
                f"{task} {METRICS[self.metric[task]].label} {dev[alpha]:.2f}"
                for task, dev in self.dev.items()
            )
            rows.append(f"  alpha {alpha:<5} {scores}  relative gain {100 * gain:+.1f} %")
        parts = ", ".join(f"{task} {points:.2f}" for task, points in self.regret.items())
        rows.append(
            f"  {DEFAULT} instead: {self.mean_regret:.2f} points worse on average ({parts})"
        )
        return rows


def pick(
    dev: Mapping[str, Mapping[float, float]],
    metrics: Mapping[str, str],
    candidates: Sequence[float],
) -> Choice:
    """The candidate with the greatest mean gain on `dev`: task -> alpha -> score in per cent.

    The gain of an alpha on a task is the share of alpha 0's dev errors that it removes,
    (e(0) - e(alpha)) / e(0), with e the score of an error rate and 100 - score of an accuracy, so
    that tasks of all metrics weigh alike. An e(0) below one point counts as one: there a share says
    nothing. Ties go to the alpha nearest to 0.25. `dev` must hold alphas 0 and 0.25 as well.
    Raises UserError if alpha 0 has no score to compare with.
    """
    errors = {
        task: {alpha: _errors(METRICS[metrics[task]], score) for alpha, score in scores.items()}
        for task, scores in dev.items()
    }
    shares = {
        alpha: sum((e[0.0] - e[alpha]) / max(e[0.0], 1.0) for e in errors.values()) / len(errors)
        for alpha in next(iter(errors.values()))
    }
    for task, e in errors.items():
        if math.isnan(e[0.0]):
            raise UserError(
                f"choose: no head of alpha 0 learned {task}; look at its learning rates"
            )
    # a candidate without a score is out
    shares = {alpha: -math.inf if math.isnan(v) else v for alpha, v in shares.items()}
    best = max(shares[alpha] for alpha in candidates)
    level = [alpha for alpha in candidates if shares[alpha] >= best - TIE]
    chosen = min(level, key=lambda alpha: (abs(alpha - DEFAULT), alpha))
    return Choice(
        alpha=chosen,
        gain={f"{alpha:g}": share for alpha, share in shares.items()},
        dev={t: {f"{a:g}": score for a, score in scores.items()} for t, scores in dev.items()},
        metric=dict(metrics),
        regret={task: e[DEFAULT] - e[chosen] for task, e in errors.items()},
    )


def _errors(metric: Metric, score: float) -> float:
    return score if metric.better == "lower" else 100 - score


def wanted(choose: Choose, where: str) -> list[float]:
    """The alphas to score: the candidates, and 0 and 0.25 to compare them with. UserError."""
    if not choose.alpha or not choose.tasks:
        raise UserError(f"{where}: choose: give at least one alpha and one task")
    if len({f"{alpha:g}" for alpha in choose.alpha}) != len(choose.alpha):
        raise UserError(f"{where}: choose: alpha: a value is given twice")
    return sorted({0.0, DEFAULT, *choose.alpha})


def require_held_out(choose: Choose, tuned_on: Sequence[str], where: str) -> None:
    """UserError if alpha would be chosen on a task that the upstream was fine-tuned on."""
    for task in choose.tasks:
        if task in tuned_on:
            raise UserError(
                f"{where}: choose: tasks: the upstream was fine-tuned on {task}, where a larger "
                "alpha always looks better; name other tasks"
            )


def score(
    requests: Mapping[float, Request], tasks: Sequence[Prepared], load: Load, settings: Settings
) -> dict[str, dict[float, float]]:
    """Dev scores, task -> alpha -> per cent; cells that are not finished are computed.

    The mean over folds and the recipe's seeds of the dev score at each head's chosen learning rate.
    """
    work = survey.survey(list(requests.values()), load, tasks, None, settings)
    jobs.run_all(work, load, settings)
    scores = {one.cell: one.score for one in results.load(settings.results)}
    return {
        prepared.recipe.name: {
            alpha: _dev(identity, prepared, scores)
            for alpha, identity in zip(requests, work.identities)
        }
        for prepared in tasks
    }


def _dev(identity: Identity, prepared: Prepared, scores: Mapping[Cell, Score]) -> float:
    found = []
    for seed in range(prepared.recipe.train.seeds):
        one = scores[evaluate.cell(identity, prepared, seed)]
        metric = METRICS[one.metric]
        for tried in one.dev.values():
            best = float("nan")
            for value in tried.values():
                best = value if metric.improves(value, best) else best
            found.append(best)
    return sum(found) / len(found)


def key(facts: Any, tasks: Sequence[Prepared]) -> str:
    """12 hex digits over all that a choice depends on: weights, method, candidates, tasks."""
    seeds = [(prepared.revision, prepared.recipe.train.seeds) for prepared in tasks]
    text = json.dumps([VERSION, facts, seeds], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place(root: Path, digest: str) -> Path:
    """Where a choice is kept below the results folder."""
    return root / "chosen" / f"{digest}.json"


def save(path: Path, choice: Choice) -> None:
    """Keep a choice for the next run and for worker processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_atomic(path, json.dumps(asdict(choice), indent=1) + "\n")


def read(path: Path) -> Choice:
    """A kept choice. Raises UserError if the file cannot be understood."""
    try:
        return Choice(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run again") from error
