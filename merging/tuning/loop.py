"""The loop of stage 1: updates, schedule, evaluation and exact resumption.

The defaults are those of Speech-FT (arXiv 2502.12672) and its release's configs: Adam, one learning
rate for upstream and head, warm-up 10 % / hold 40 % / linear decay, gradient norm clipped at 1, the
last hidden state (no weighted sum) to the head, the weights that are best on dev.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merging.cost import begin_peak, peak_bytes
from merging.tuning.collect import collectors
from merging.tuning.log import LOG, Log
from merging.tuning.objectives import Objective
from merging.tuning.ranks import ALONE, Ranks
from merging.tuning.recipe import STRATEGIES, Plan
from upstream.checkpoints.tensor_files import load_state, save_state
from upstream.checkpoints.tensor_names import State, module_of
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.common.schema import bind
from upstream.encoder.encoder import Encoder

SAVE_SECONDS = 300.0  # at most this much training is lost when the process is killed
KEPT = "key best weights history learned felt seconds peak skipped".split()  # in a Loop's state
# The share of updates that may be skipped because their gradient is not finite. Low precision loses
# a few at its start; where one in ten is lost, schedule and number of updates are no longer those
# of the recipe, and what is left is mostly what came before the training went wrong.
MOST_SKIPPED = 0.1


REMEDY = "take a smaller lr, a longer warmup or precision: float32, or look at the utterances"


def schedule(step: int, steps: int, warmup: float = 0.1, hold: float = 0.4) -> float:
    """Learning-rate factor at `step`: up to 1, constant, then linearly to 0 at `steps`.

    Integer truncation as in the release's schedulers.py.
    """
    rise = int(warmup * steps)
    fall = rise + int(hold * steps)
    up = step / rise if step < rise else 1.0
    return min(up, max(0.0, (steps - step) / max(1, steps - fall)))


class Loop:
    """The updates of one run, each a function of its number: a resumed run is exact."""

    def __init__(self, plan: Plan, objective: Objective, place: Path, ranks: Ranks = ALONE) -> None:
        """`place`: the file with the state of an interrupted run."""
        self.ranks, (self.mine, _) = ranks, ranks.shares(plan.recipe.accumulate)
        self.recipe, self.encoder, self.objective = plan.recipe, plan.encoder, objective
        self.place, self.key = place, plan.key
        self.log = Log(place.with_name(LOG), plan.recipe.tensorboard)
        model = plan.encoder.model
        self.base: State = {name: t.detach().clone() for name, t in model.state_dict().items()}
        recipe = plan.recipe
        strategy = STRATEGIES.named(recipe.strategy)
        options = bind(strategy, recipe.params, "params", ("model", "recipe"))
        self.strategy = strategy(model, recipe, **options)
        model.to(next(iter(self.base.values())).device)  # with what the strategy put into it
        self.strategy.unheard = _above(plan.encoder, recipe.highest)
        self.collected = collectors(recipe.collect, recipe.steps)
        # Parameters without a gradient keep Adam's state empty, so one group serves all phases.
        encoder, head = list(model.parameters()), list(objective.head.parameters())
        self.parameters = [*encoder, *head]
        rates = (recipe.lr, recipe.head_lr or recipe.lr)
        groups = [{"params": p, "initial_lr": lr} for p, lr in zip((encoder, head), rates)]
        self.optimizer = torch.optim.Adam(groups, lr=recipe.lr)
        parts = {"encoder": model, "head": objective.head, "optimizer": self.optimizer}
        self.parts: dict[str, Any] = parts  # with a state of their own
        self.best, self.weights = math.nan, self.base
        self.history: list[dict[str, Any]] = []
        self.training: set[str] | None = None  # names of what learns at this step
        self.since = 0  # the update from which these learn
        self.learned: set[str] = set()  # of what ever had a gradient
        self.felt: set[str] = set()  # and one that is not zero
        self.seconds, self.peak = 0.0, 0
        self.skipped = 0  # updates whose gradient was not finite

    def run(self, what: str) -> None:
        """Train from where the last process was; then `weights` are the best on dev."""
        steps, first = self.recipe.steps, self._restore()
        if self.ranks.tell(first) != first:
            raise UserError(f"{self.place}: all hosts must share this folder")
        self.ranks.align(self.parameters)
        if self.ranks.first:
            self.log.cut(first, self.history)
        begin_peak()
        begun = saved = time.monotonic()
        before = self.seconds
        for step in progress(range(first, steps), what, steps, first):
            self._update(step)
            if (step + 1) % self.recipe.eval_every == 0 or step + 1 == steps:
                self._evaluate(step + 1)
            now = time.monotonic()
            self.seconds, self.peak = before + now - begun, max(self.peak, peak_bytes())
            if now - saved > SAVE_SECONDS and self.ranks.first:
                self._save(step + 1)
                saved = now
        self.log.close()
        if math.isnan(self.best):
            raise UserError(
                f"{self.recipe.name}: no dev score was ever a number, so that there is no best one "
                f"to keep; {REMEDY}"
            )
        if idle := sorted(self.learned - self.felt):
            raise RuntimeError(f"{self.recipe.strategy}: the gradient of {idle[0]} was always 0")

    def _update(self, step: int) -> None:
        recipe = self.recipe
        self._choose(step)
        factor = schedule(step, recipe.steps, recipe.warmup, recipe.hold)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        # above all of these numbers, each process has dropout of its own
        torch.manual_seed(recipe.seed * 1_000_003 + step + (self.ranks.rank << 52))
        self.encoder.train()
        self.objective.head.train()
        self.optimizer.zero_grad()
        numbers = range(step * recipe.accumulate, (step + 1) * recipe.accumulate)
        total = 0.0
        for number, weight in self.mine.of([*zip(numbers, self.objective.weights(numbers))]):
            if not weight:
                continue
            loss = self.objective.loss(self.encoder, number)
            if not torch.isfinite(loss):
                names = ", ".join(self.objective.names(number))
                raise UserError(
                    f"update {step + 1}: the loss is {float(loss)} for {names}: look at these "
                    "utterances, or take a smaller lr; what was trained before is kept"
                )
            (weight * loss).backward()
            total += weight * loss.item()
        total = self.ranks.add_up(self.parameters, total)
        if (penalty := self.strategy.penalty()) is not None:
            penalty.backward()
        given = {name: p.grad for name, p in self._named() if p.grad is not None}
        self.learned |= given.keys()
        self.felt |= {name for name in given.keys() - self.felt if given[name].any()}
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        facts = {"loss": total, "lr": rates[0], "head_lr": rates[1], "norm": norm.item()}
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1
            facts["skipped"] = self.skipped
        if self.ranks.first:
            self.log.add(step=step + 1, **facts)
        if self.skipped > MOST_SKIPPED * recipe.steps:
            raise UserError(
                f"{recipe.name}: diverged: the gradient of {self.skipped} of the {step + 1} updates"
                f" so far was not finite, and they were skipped (at most {MOST_SKIPPED:.0%} of all "
                f"{recipe.steps} may be); {REMEDY}"
            )
        self.strategy.after_step(step)
        if wanted := [each for each in self.collected if each.wants(step + 1)]:
            weights = self.strategy.weights()
            for each in wanted:
                each.add(step + 1, weights)

    def frozen(self) -> list[str]:
        """The modules of which the strategy let nothing learn, in any update."""
        learned = {module_of(name) for name in self.learned if not name.startswith("head.")}
        return [m for m in dict.fromkeys(map(module_of, self.base)) if m not in learned]

    def size(self) -> int:
        """How many of the encoder's values have learnt, those of adapters among them."""
        named = self.encoder.model.named_parameters()
        return sum(p.numel() for name, p in named if name in self.learned)

    def _choose(self, step: int) -> None:
        """Let the strategy say what learns."""
        names = dict(self.encoder.model.named_parameters())
        training = {name for name in names if self.strategy.trains(name, step)}
        if training != self.training:
            if self.training is not None:
                self._require_sound(step)
            for name, parameter in names.items():
                parameter.requires_grad = name in training
            self.training, self.since = training, step

    def _require_sound(self, done: int) -> None:
        """What is frozen has stayed, what learns has had a gradient: a strategy keeps its word."""
        numbers = (update * self.recipe.accumulate for update in (self.since, done))
        complete = self.objective.complete(*numbers)
        for name, parameter in self._named():
            if name in self.learned:
                continue
            if parameter.requires_grad and complete:
                raise RuntimeError(f"{self.recipe.strategy}: {name} never had a gradient")
            frozen = not parameter.requires_grad and name in self.base
            if frozen and not torch.equal(parameter, self.base[name]):
                raise RuntimeError(f"{self.recipe.strategy}: {name} is frozen, but moved")

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.encoder.model.named_parameters()
        yield from self.objective.head.named_parameters(prefix="head")

    def _evaluate(self, step: int) -> None:
        """Score dev; strictly better weights are kept."""
        self._require_sound(step)
        self.encoder.eval()
        self.objective.head.eval()
        metric = self.objective.metric
        with torch.no_grad():
            scores = self.objective.dev(self.encoder) if self.ranks.first else {}
        scores = self.ranks.tell(scores)
        dev, *others = scores.values()
        if metric.improves(dev, self.best):
            self.best, self.weights = dev, self.strategy.weights()
        also = dict(zip([*scores][1:], others))
        self.log.dev(step, {"selects": dev, **also})
        self.history.append({"step": step, "dev": dev} | ({"also": also} if also else {}))
        said = "".join(f"; {name} {score:.2f}" for name, score in also.items())
        print(
            f"  step {step}: dev {metric.name} {dev:.2f} (best {self.best:.2f}){said}", flush=True
        )

    def _save(self, step: int) -> None:
        content = {key: getattr(self, key) for key in KEPT}
        content |= {key: part.state_dict() for key, part in self.parts.items()}
        content |= {"step": step, "strategy": self.strategy.state}
        content["collected"] = {each.name: each.weights for each in self.collected}
        newest, older = states(self.place)
        try:
            save_state(content, newest, older)
        except UserError as error:  # a convenience: the training goes on
            print(f"  no state is kept, an interruption would lose more: {error}", flush=True)

    def _restore(self) -> int:
        """The step to go on from: that of the newest state that is whole, or 0.

        Raises UserError for the state of another run.
        """
        for place in states(self.place):
            if os.path.lexists(place):
                try:
                    content = load_state(place, self.parameters[0].device)
                except disk.Unreadable:
                    raise
                except UserError as error:
                    print(f"  {error}: going on from an earlier state, or else from the start")
                else:
                    return self._go_on(content, place)
        return 0

    def _go_on(self, content: dict[str, Any], place: Path) -> int:
        if not isinstance(content, dict) or content.get("key") != self.key:
            raise UserError(f"{place}: is of another recipe; choose an empty folder")
        content.setdefault("skipped", 0)  # which states were once without
        try:
            for key in KEPT:
                setattr(self, key, content[key])
            for key, part in self.parts.items():
                part.load_state_dict(content[key])
            self.strategy.state = content["strategy"]
            for each in self.collected:
                each.weights = content["collected"][each.name]
            return int(content["step"])
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise UserError(f"{place}: is no state of this run; remove it") from error


def states(place: Path) -> tuple[Path, Path]:
    """Where the newest state is and the one before it, which stays should the newest be torn."""
    return place, place.with_suffix(f".before{place.suffix}")


def _above(encoder: Encoder, layer: int | None) -> list[str]:
    """The modules that hidden state `layer` does not hear of."""
    if layer is None or layer == encoder.num_layers - 1:
        return []
    final = ["norm"] if encoder.stable else []  # of pre-norm layers it comes after the last one
    return [*(f"layer {k}" for k in range(layer + 1, encoder.num_layers)), *final]
