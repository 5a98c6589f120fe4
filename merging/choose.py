"""Choosing alpha, one or several over depth, or the members of a soup, on held-out dev scores.

And what not choosing costs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from downstream.base import METRICS
from downstream.report import results
from downstream.run import execute, schedule
from downstream.run.cell import Identity, cell
from downstream.run.prepare import Prepared
from downstream.run.schedule import Request, RunOptions
from merging.weights import alphas
from upstream.base import Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.schema import Bound
from upstream.features.clips import overlapping

What = Literal["alpha", "members"]
Dev = dict[str, dict[str, float]]  # task -> candidate -> dev score, per cent
Score = Callable[[Sequence[str]], Dev]  # of candidates; asked for several at once where it can be

DEFAULT = 0.25  # Speech-FT's alpha, for every task and model
ALPHAS = (0.0, 0.1, DEFAULT, 0.5, 0.75, 1.0)
BASE = "base"  # the candidate that members are compared with
VERSION = 2  # of the rules below: another number, and everything is chosen again
TIE = 1e-9


@dataclass(frozen=True)
class Choose:
    """The recipe's key: the tasks (of its suite) that decide, and either alphas or members."""

    tasks: list[str]
    alpha: list[float] | None = None  # candidates; ALPHAS if neither key is given
    members: Literal["greedy"] | None = None  # which of the tuned models to merge
    depths: Annotated[int, Bound(2, 100)] | None = None  # an alpha for each of so many, see `deep`

    @property
    def what(self) -> What:
        return "members" if self.members else "alpha"

    def check(self, where: str) -> None:
        """UserError for keys that do not go together."""
        if self.members and not (self.alpha is None and self.depths is None):
            key = "depths" if self.alpha is None else "alpha"
            raise UserError(f"{where}: choose: give {key} or members, not both")
        if self.alpha == [] or not self.tasks:
            raise UserError(f"{where}: choose: give at least one alpha and one task")
        if len(set(self.candidates)) != len(self.candidates):
            raise UserError(f"{where}: choose: alpha: a value is given twice")

    @property
    def candidates(self) -> list[str]:
        """The alphas to choose from."""
        return [f"{alpha:g}" for alpha in (ALPHAS if self.alpha is None else self.alpha)]

    @property
    def scored(self) -> list[str]:
        """The same with 0 and 0.25, to compare them with."""
        return sorted({"0", f"{DEFAULT:g}", *self.candidates}, key=float)

    @property
    def count(self) -> int:
        """How many alphas are scored, at most."""
        return len(self.scored) + (self.depths or 0) * (len(self.candidates) - 1)


@dataclass(frozen=True)
class Choice:
    """What was chosen and why.

    A candidate is text: an alpha (`"0.25"`), alphas over depth (`"0/0.5"`) or members (`"0+2"`).
    """

    what: What
    chosen: str
    usual: str  # the candidate that nobody has to choose: alpha 0.25, all members
    gain: dict[str, float]  # candidate -> mean relative reduction of dev errors against the base
    dev: Dev
    metric: dict[str, str]  # task -> a name in METRICS
    regret: dict[str, float]  # task -> points that `usual` is worse by than `chosen`, on dev

    def lines(self) -> list[str]:
        """A table to print: candidate by task."""
        rows = [f"{self.what} chosen on dev scores of {', '.join(self.dev)}: {self.chosen}"]
        width = max(5, *map(len, self.gain))
        labels = {task: f"{task} {METRICS[metric].label}" for task, metric in self.metric.items()}
        for candidate, gain in self.gain.items():
            scores = (f"{labels[task]} {dev[candidate]:.2f}  " for task, dev in self.dev.items())
            name = f"{self.what} {candidate:<{width}}"
            rows.append(f"  {name} {''.join(scores)}relative gain {100 * gain:+.1f} %")
        mean_regret = sum(self.regret.values()) / len(self.regret)
        parts = ", ".join(f"{task} {points:.2f}" for task, points in self.regret.items())
        rows.append(f"  {self.usual} instead: {mean_regret:.2f} points worse on average ({parts})")
        return rows


def pick(dev: Dev, metrics: Mapping[str, str], candidates: Sequence[str]) -> Choice:
    """The alpha of `candidates` with the greatest mean gain (see `gains`) over alpha 0.

    Ties go to the alpha nearest to 0.25. `dev` must hold alphas 0 and 0.25 as well. Raises
    UserError if alpha 0 has no score to compare with.
    """
    gain = gains(dev, metrics, "0")
    best = max(gain[alpha] for alpha in candidates)
    level = [float(alpha) for alpha in candidates if gain[alpha] >= best - TIE]
    chosen = min(level, key=lambda alpha: (abs(alpha - DEFAULT), alpha))
    return _choice("alpha", f"{chosen:g}", f"{DEFAULT:g}", "0", dev, metrics)


def deep(score: Score, metrics: Mapping[str, str], choose: Choose) -> Choice:
    """Alphas at `choose.depths` depths, as `alphas.resolve` reads a list over depth, by mean gain.

    A coordinate search: from the best single alpha on, the alpha of each depth in turn, the last
    layers' first, becomes the candidate with the greatest gain, and stays where none gains more.
    The more that are scored, the more of the winner's gain is luck: believe the test sets.
    """
    depths, candidates = choose.depths or 1, choose.candidates
    dev = score(choose.scored)
    best = [float(pick(dev, metrics, candidates).chosen)] * depths
    for depth in reversed(range(depths)):
        options = [[*best[:depth], float(one), *best[depth + 1 :]] for one in candidates]
        names = [alphas.to_text(option) for option in options]
        _complete(dev, score, names)
        gain = gains(dev, metrics, "0")
        leader = max(names, key=lambda name: gain[name])
        if gain[leader] > gain[alphas.to_text(best)] + TIE:
            best = options[names.index(leader)]
    return _choice("alpha", alphas.to_text(best), f"{DEFAULT:g}", "0", dev, metrics)


def greedy(score: Score, metrics: Mapping[str, str], count: int) -> Choice:
    """The members of the greedy soup of `count` tuned models, by mean gain.

    Raises UserError if the base has no score to compare with.
    """
    everyone = together(range(count))
    dev = score([BASE, *map(str, range(count)), everyone])

    def gain(members: Sequence[int]) -> float:
        candidate = together(members)
        _complete(dev, score, [candidate])
        return gains(dev, metrics, BASE)[candidate]

    return _choice("members", together(greedy_soup(gain, count)), everyone, BASE, dev, metrics)


def _complete(dev: Dev, score: Score, candidates: Sequence[str]) -> None:
    """Score what `dev` does not hold yet."""
    known = next(iter(dev.values()))
    if missing := [one for one in dict.fromkeys(candidates) if one not in known]:
        for task, scores in score(missing).items():
            dev[task] |= scores


def greedy_soup(score: Callable[[Sequence[int]], float], count: int) -> list[int]:
    """Members of the greedy soup, best first (Wortsman et al., arXiv 2203.05482, recipe 1).

    `score(members)` rates the mean of these of the `count` models on held-out data, higher being
    better. The best model starts; each next one joins if the score does not fall.
    """
    alone = [score([member]) for member in range(count)]
    first, *others = sorted(range(count), key=lambda member: -alone[member])
    chosen, best = [first], alone[first]
    for member in others:
        if (joined := score([*chosen, member])) >= best:
            chosen, best = [*chosen, member], joined
    return chosen


def together(members: Iterable[int]) -> str:
    """Members as text: `[2, 0]` -> `"0+2"` (a comma would part upstreams)."""
    return "+".join(map(str, sorted(members)))


def apart(text: str, count: int, where: str) -> list[int]:
    """`"0+2"` -> `[0, 2]`. Raises UserError for what are no members of `count`."""
    known, members = list(map(str, range(count))), text.split("+")
    if not set(members) <= set(known) or len(set(members)) < len(members):
        raise UserError(
            f"{where}: members={text}: its tuned models are {', '.join(known)}; name some of them, "
            "each once, as in members=0+1"
        )
    return sorted(map(int, members))


def gains(dev: Dev, metrics: Mapping[str, str], origin: str) -> dict[str, float]:
    """Candidate -> mean share of the dev errors of `origin` that it removes; no score: -infinity.

    (e(origin) - e) / e(origin), with e the score of an error rate and 100 - score of an accuracy,
    so that tasks of all metrics weigh alike. An e(origin) below one point counts as one: there a
    share says nothing. Raises UserError if `origin` has no score.
    """
    errors = _errors(dev, metrics)
    for task, e in errors.items():
        if math.isnan(e[origin]):
            raise UserError(
                f"choose: no head of alpha 0 (the base) learned {task}; look at its learning rates"
            )

    def gain(candidate: str) -> float:
        shares = [(e[origin] - e[candidate]) / max(e[origin], 1.0) for e in errors.values()]
        return -math.inf if math.isnan(mean := sum(shares) / len(shares)) else mean

    return {candidate: gain(candidate) for candidate in next(iter(errors.values()))}


def _errors(dev: Dev, metrics: Mapping[str, str]) -> Dev:
    """The scores as error rates."""
    better = {task: METRICS[metrics[task]].better for task in dev}
    return {
        task: {c: s if better[task] == "lower" else 100 - s for c, s in scores.items()}
        for task, scores in dev.items()
    }


def _choice(
    what: What, chosen: str, usual: str, origin: str, dev: Dev, metrics: Mapping[str, str]
) -> Choice:
    gain = gains(dev, metrics, origin)
    regret = {task: e[usual] - e[chosen] for task, e in _errors(dev, metrics).items()}
    return Choice(what, chosen, usual, gain, dev, dict(metrics), regret)


def require_held_out(tasks: Sequence[Prepared], tuned: Sequence[Upstream], where: str) -> None:
    """UserError if a choice would be made on audio whose labels a tuned upstream was trained on.

    There, what is nearer to that upstream always looks better.
    """
    for task in tasks:
        indices = {i for split in task.splits.values() for i in split["dev"]}
        clips = [task.clips[i] for i in indices]
        for model in tuned:
            if shared := overlapping(model.heard, clips):
                raise UserError(
                    f"{where}: choose: tasks: {model.source} was fine-tuned on {len(shared)} of "
                    f"the {len(clips)} dev utterances of {task.recipe.name}; name other tasks"
                )


def score(requests: Mapping[str, Request], tasks: Sequence[Prepared], options: RunOptions) -> Dev:
    """Dev scores of candidates; cells that are not finished are computed.

    The mean over folds and the recipe's seeds of the dev score of the chosen head.
    """
    work = schedule.survey(list(requests.values()), tasks, None, options)
    execute.run(work, options)
    scores = {result.cell: result.score for result in results.load_results(options.results)}

    def mean(identity: Identity, task: Prepared) -> float:
        cells = [scores[cell(identity, task, seed)] for seed in range(task.recipe.seeds())]
        chosen = [score.dev[fold][f"{lr:g}"] for score in cells for fold, lr in score.lr.items()]
        return sum(chosen) / len(chosen)

    named = dict(zip(requests, work.identities))
    return {
        task.recipe.name: {name: mean(identity, task) for name, identity in named.items()}
        for task in tasks
    }


def key(facts: Any, tasks: Sequence[Prepared]) -> str:
    """12 hex digits over all that a choice depends on: weights, method, candidates, tasks."""
    seeds = [(prepared.revision, prepared.recipe.seeds()) for prepared in tasks]
    text = json.dumps([VERSION, facts, seeds], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path) -> Choice:
    """A kept choice. Raises UserError if the file cannot be understood."""
    try:
        choice = Choice(**disk.read_record(path))
        _require_whole(choice)
        return choice
    except disk.Unreadable:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and run again") from error


def _require_whole(choice: Choice) -> None:
    """Raises ValueError, TypeError or AttributeError for parts that do not fit each other."""
    texts = (choice.what, choice.chosen, choice.usual)
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise TypeError("a candidate is no text")
    candidates = choice.gain.keys()
    rows = [choice.gain, choice.regret, *choice.dev.values()]
    if not all(isinstance(x, (int, float)) for row in rows for x in row.values()):
        raise TypeError("a score is no number")
    known = all(name in METRICS and task.isprintable() for task, name in choice.metric.items())
    same = choice.dev.keys() == choice.metric.keys() == choice.regret.keys()
    if not (known and same and choice.dev and candidates):
        raise ValueError("its tasks do not fit each other")
    if not all(candidates <= row.keys() for row in choice.dev.values()):
        raise ValueError("its candidates do not fit each other")
