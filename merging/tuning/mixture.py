"""Several objectives in one run: multitask learning, and replay of what must not be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor, nn

from merging.tuning.masked import MaskedObjective
from merging.tuning.objectives import Objective, TaskObjective
from merging.tuning.recipe import Plan
from upstream.encoder.encoder import Encoder
from upstream.features.store import Store


def objective_of(plan: Plan, store: Store) -> Objective:
    """What a recipe asks for. Raises UserError."""
    kinds = [MaskedObjective if aim.masked else TaskObjective for aim in plan.recipe.aims]
    parts = [kind(plan, store, number) for number, kind in enumerate(kinds)]
    if len(parts) == 1:
        return parts[0]
    also = plan.recipe.also
    return Mixture(parts, [aim.share for aim in also], [aim.weight for aim in plan.recipe.aims])


class Mixture:
    """Objectives in turn, micro-batch by micro-batch, evenly; the first one's dev score selects."""

    def __init__(
        self, parts: Sequence[Objective], shares: Sequence[float], weights: Sequence[float]
    ) -> None:
        """shares: of all objectives but the first; weights: of the losses of all."""
        self.parts, self.factors, self.metric = parts, weights, parts[0].metric
        # as they are written: 0.1 is one in ten, whatever the nearest float is
        self.shares = [Fraction(str(share)) for share in shares]
        self.head = nn.ModuleList(part.head for part in parts)
        self.heard = frozenset[str]().union(*(part.heard for part in parts))

    def before(self, number: int) -> list[int]:
        """How many of the micro-batches before `number` each objective has.

        Each takes its share of what those after it in the list left, as evenly as whole numbers
        can be; the first has the rest.
        """
        left, counts = Fraction(1), list[int]()
        for share in reversed(self.shares):
            counts.append(int(number * share / left))
            number, left = number - counts[-1], left - share
        return [number, *reversed(counts)]

    def turn(self, number: int) -> tuple[int, int]:
        """Which objective has micro-batch `number`, and how many it had before."""
        now, then = self.before(number), self.before(number + 1)
        which = next(k for k, count in enumerate(then) if count > now[k])
        return which, now[which]

    def loss(self, encoder: Encoder, number: int) -> Tensor:
        which, turn = self.turn(number)
        return self.factors[which] * self.parts[which].loss(encoder, turn)

    def weights(self, numbers: Sequence[int]) -> list[float]:
        """Micro-batches of one objective by their sizes; an objective by how many it has."""
        turns = [self.turn(number) for number in numbers]
        each = []
        for which, part in enumerate(self.parts):
            own = [turn for who, turn in turns if who == which]
            share = len(own) / len(numbers)
            each.append(iter([share * weight for weight in part.weights(own)] if own else []))
        return [next(each[which]) for which, _ in turns]

    def names(self, number: int) -> list[str]:
        which, turn = self.turn(number)
        return self.parts[which].names(turn)

    def dev(self, encoder: Encoder) -> dict[str, float]:
        return {name: dev for part in self.parts for name, dev in part.dev(encoder).items()}

    def complete(self, first: int, end: int) -> bool:
        pairs = zip(self.before(first), self.before(end))
        return all(before < after for before, after in pairs)
