"""A method bound to a model: which tensors it merges, and with which alpha, seed and statistics."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from merging.methods.dense import ELEMENTWISE, METHODS, RESERVED, STATISTICS, Method
from merging.weights import alphas
from merging.weights.alphas import Alpha
from upstream.checkpoints.tensor_names import Place, place_of, slots
from upstream.common.errors import UserError, near_miss
from upstream.common.schema import bind, convert

Weights = Mapping[str, Tensor]
PosConv = Literal["factors", "kernel"]
Several = Literal["mean", "sum", "sequential"]

# The pre-training head keeps the base's values, as in the released code (merge_utils.py).
HEAD = "head"
# Values of a tensor that pass together: they stay in a core's cache, torch starts no threads for
# them, and below 128 KB malloc gives out the same pages again and again.
PIECE = 32_000
Look = Callable[[Tensor, Sequence[Tensor], Tensor], None]


@dataclass(frozen=True)
class Settings:
    """What of a merge is not the method's: keys of a merge recipe.

    `several` tuned models: `mean`: the method combines them all (`linear`: the mean of their task
    vectors); `sum`: each is merged alone and the changes of the base are added; `sequential`: each
    is merged into the result of the one before, in the order given.
    """

    only: list[str] | None = None  # filters; all that fits none of them is the base's
    pos_conv: PosConv = "factors"  # of a weight-normed kernel: g and v apart, or the kernel
    several: Several = "mean"


@dataclass(frozen=True)
class Rule:
    """A method with its parameters, ready for any tensor."""

    method: str
    combine: Method
    wanted: frozenset[str]  # RESERVED arguments in the method's signature
    params: Mapping[str, Any]
    alpha: Alpha
    settings: Settings
    places: Mapping[str, Place]
    depth: int
    seed: int
    stats: Sequence[Weights] | None

    def __call__(
        self,
        name: str,
        base: Tensor,
        tuned: Sequence[Tensor],
        gathered: bool = True,
        look: Look | None = None,
    ) -> Tensor:
        """The merged tensor, float32; `base` itself if nothing changes.

        `look` is shown all of base, tuned and merged, piece by piece.
        """
        stats = [s[name] for s in self.stats or () if gathered and name in s]
        step = self._step(name)
        merged, changed = torch.empty_like(base), False
        for origin, result, *models in zip(*_pieces((base, merged, *tuned), self.method)):
            result.copy_(self._all(step, origin, models, stats))
            changed = changed or not torch.equal(result, origin)
            if look:
                look(origin, models, result)
        # -0.0 + 0 * x is 0.0: what did not change keeps its bits, and the base its fingerprint
        return merged if changed else base

    def _all(
        self, step: Method, base: Tensor, tuned: Sequence[Tensor], stats: Sequence[Tensor]
    ) -> Tensor:
        """One, or several tuned models as the settings say."""
        merged = base
        if self.settings.several == "mean" or len(tuned) == 1:
            merged = step(base, tuned, stats)
        elif self.settings.several == "sum":
            for number, one in enumerate(tuned, 1):
                own = [stats[0], stats[number]] if stats else []
                merged = merged + (step(base, [one], own) - base)
        else:
            for one in tuned:
                merged = step(merged, [one], [])
        return merged

    def _step(self, name: str) -> Method:
        """The method for one tensor: a function of base, tuned and statistics."""
        place = self.places[name]
        known = {"place": place, "depth": self.depth}
        reserved = {key: known[key] for key in self.wanted & known.keys()}
        if "rng" in self.wanted:
            reserved["rng"] = _generator(self.seed, name)
        alpha = alphas.resolve(self.alpha, place, self.depth, name)
        act = partial(self.combine, alpha=alpha, **self.params, **reserved)
        if "stats" in self.wanted:
            return lambda base, tuned, stats: act(base, tuned, stats=stats)
        return lambda base, tuned, _: act(base, tuned)

    def moves(self, name: str, tensor: Tensor) -> bool:
        """Whether this tensor is merged at all."""
        place = self.places[name]
        if not tensor.is_floating_point() or place.module == HEAD:
            return False
        return alphas.selected(self.settings.only, place, name)


def check_params(method: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The method's parameters with their types, `alpha` and `seed` among them. Raises UserError."""
    combine = METHODS[method]
    signature = inspect.signature(combine).parameters
    known = set(signature) - set(RESERVED) | ({"seed"} if "rng" in signature else set())
    for key in params:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{near_miss(str(key), known)}")
    own = dict(params)
    alpha = alphas.read(own.pop("alpha", signature["alpha"].default), f"{where}: alpha")
    seed = convert(own.pop("seed", 0), int, f"{where}: seed")
    bound = bind(combine, own, where, given=(*RESERVED, "alpha"))
    return {**bound, "alpha": alpha, "seed": seed}


def rule_for(
    names: Sequence[str],
    method: str,
    params: Mapping[str, Any],
    settings: Settings,
    stats: Sequence[Weights] | None = None,
) -> Rule:
    """Bind a method to a model with tensors `names`. Raises UserError for what does not fit."""
    where = f"merging method {method}"
    bound = check_params(method, params, where)
    alpha, seed = bound.pop("alpha"), bound.pop("seed")
    places = places_of(names)
    alphas.check(alpha, settings.only, places, where)
    if method in STATISTICS and stats is None:
        raise UserError(f"{where}: needs {STATISTICS[method]} statistics; add calibrate: {{task: "
                        "FILE}} to the recipe, or give stats from Python")  # fmt: skip
    if method in STATISTICS and settings.several == "sequential":
        raise UserError(f"{where}: several: sequential has models in between, without statistics")
    signature = inspect.signature(METHODS[method]).parameters
    wanted = frozenset(signature) & frozenset(RESERVED)
    depth = alphas.depth_of(places)
    return Rule(method, METHODS[method], wanted, bound, alpha, settings, places, depth, seed, stats)


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """Where tensors lie, under transformers' names or under fairseq's and s3prl's."""
    names = list(names)
    known = {slot.name: place_of(own) for own, slot in slots(names, "merge").items()}
    return {name: known.get(name) or place_of(name) for name in names}


def _pieces(tensors: Sequence[Tensor], method: str) -> list[Sequence[Tensor]]:
    """Each tensor in rows of about PIECE values; whole if the method needs to see it whole."""
    first = tensors[0]
    if method not in ELEMENTWISE or first.numel() <= PIECE or first.ndim == 0:
        return [[tensor] for tensor in tensors]
    rows = max(1, PIECE * len(first) // first.numel())
    return [tensor.split(rows) for tensor in tensors]


def _generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one tensor: the same whichever others are merged, in whatever order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
