"""A method bound to a model: which tensors it merges, and with which alpha, seed and statistics."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from merging.methods import ELEMENTWISE, METHODS, RESERVED, STATISTICS, Method
from merging.weights import alphas
from merging.weights.alphas import Alpha
from upstream.checkpoints.tensor_names import Place, place_of, slots
from upstream.common.errors import UserError, near_miss
from upstream.common.schema import Natural, bind, convert

Weights = Mapping[str, Tensor]
PosConv = Literal["factors", "kernel"]
Several = Literal["mean", "sum", "sequential"]

# The pre-training head keeps the base's values, as in the released code (merge_utils.py).
HEAD = "head"
# Values that pass together: they stay in a core's cache, torch starts no threads for them, and
# below 128 KB malloc gives out the same pages again and again.
PIECE = 32_000
Look = Callable[[Tensor, Sequence[Tensor], Tensor], None]


@dataclass(frozen=True)
class MergeOptions:
    """What of a merge is not the method's: keys of a merge recipe.

    `several` tuned models: the method combines them all (`mean`), each is merged alone and the
    changes of the base are added (`sum`), or each is merged into the result of the one before.
    """

    only: list[str] | None = None  # filters; all that fits none of them is the base's
    pos_conv: PosConv = "factors"  # of a weight-normed kernel: g and v apart, or the kernel
    several: Several = "mean"


@dataclass(frozen=True)
class Rule:
    """A method with its parameters, ready for any tensor of one model."""

    method: str
    params: Mapping[str, Any]  # without alpha and seed
    alpha: Alpha
    seed: int
    options: MergeOptions
    places: Mapping[str, Place]
    stats: Sequence[Weights]  # one mapping for each of [base, *tuned], or none at all

    def moves(self, name: str, tensor: Tensor) -> bool:
        """Whether this tensor is merged at all."""
        place = self.places[name]
        learned = tensor.is_floating_point() and place.module != HEAD
        return learned and alphas.selected(self.options.only, place, name)

    def __call__(
        self,
        name: str,
        base: Tensor,
        tuned: Sequence[Tensor],
        gathered: bool = True,
        look: Look | None = None,
    ) -> Tensor:
        """The merged tensor, float32; `base` itself if nothing changes.

        gathered: whether statistics of this tensor may be used. `look` is shown all piece by piece.
        """
        stats = [model[name] for model in self.stats if gathered and name in model]
        method = self._method(name)
        merged, changed = torch.empty_like(base), False
        for origin, result, *models in zip(*_pieces((base, merged, *tuned), self.method)):
            result.copy_(self._several(method, origin, models, stats))
            changed = changed or not torch.equal(result, origin)
            if look:
                look(origin, models, result)
        # -0.0 + 0 * x is 0.0: what did not change keeps its bits, and the base its fingerprint
        return merged if changed else base

    def _method(self, name: str) -> Method:
        """The method with all that it asks for of the tensor `name`, but its statistics."""
        method, place = METHODS.named(self.method), self.places[name]
        depth, asked = alphas.depth_of(self.places), inspect.signature(method).parameters
        known = {"place": place, "depth": depth, "rng": _generator(self.seed, name)}
        reserved = {key: value for key, value in known.items() if key in asked}
        alpha = alphas.resolve(self.alpha, place, depth, name)
        return partial(method, alpha=alpha, **self.params, **reserved)

    def _several(
        self, method: Method, base: Tensor, tuned: Sequence[Tensor], stats: Sequence[Tensor]
    ) -> Tensor:
        """Merge one or several tuned models, together or one by one."""
        if self.options.several == "mean" or len(tuned) == 1:
            given = {"stats": stats} if self.method in STATISTICS else {}
            return method(base, tuned, **given)
        if self.options.several == "sequential":
            return reduce(lambda merged, model: method(merged, [model]), tuned, base)
        merged = base
        for number, model in enumerate(tuned, 1):
            pair = [stats[0], stats[number]] if stats else []
            merged = merged + (self._several(method, base, [model], pair) - base)
        return merged


def check_params(method: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The method's parameters with their types, `alpha` and `seed` among them. Raises UserError."""
    signature = inspect.signature(METHODS.named(method)).parameters
    known = set(signature) - set(RESERVED) | ({"seed"} if "rng" in signature else set())
    for key in params:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{near_miss(str(key), known)}")
    alpha = alphas.read(params.get("alpha", signature["alpha"].default), f"{where}: alpha")
    seed = convert(params.get("seed", 0), Natural, f"{where}: seed")
    others = {key: value for key, value in params.items() if key not in ("alpha", "seed")}
    bound = bind(METHODS.named(method), others, where, given=(*RESERVED, "alpha"))
    return {**bound, "alpha": alpha, "seed": seed}


def rule_for(
    names: Sequence[str],
    method: str,
    params: Mapping[str, Any],
    options: MergeOptions,
    stats: Sequence[Weights] | None = None,
) -> Rule:
    """Bind a method to a model with tensors `names`. Raises UserError for what does not fit."""
    where = f"merging method {method}"
    bound = check_params(method, params, where)
    alpha, seed = bound.pop("alpha"), bound.pop("seed")
    places = places_of(names)
    alphas.check(alpha, options.only, places, where)
    if method in STATISTICS and stats is None:
        raise UserError(f"{where}: needs {STATISTICS[method]} statistics; add calibrate: {{task: "
                        "FILE}} to the recipe, or give stats from Python")  # fmt: skip
    if method in STATISTICS and options.several == "sequential":
        raise UserError(f"{where}: several: sequential has models in between, without statistics")
    return Rule(method, bound, alpha, seed, options, places, stats or ())


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
