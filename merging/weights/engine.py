"""The merge itself, tensor by tensor: every tensor of every model is read once and let go."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merging.methods.dense import slerp_falls_back
from merging.weights.compatibility import require_alike, require_names, spare_names
from merging.weights.movement import EffectiveAlpha
from merging.weights.rule import PIECE, MergeOptions, PosConv, Rule, Several, Weights, rule_for
from upstream.common.errors import UserError
from upstream.common.schema import build

# Weight norm's two factors under the names of fairseq, s3prl and transformers.
FACTORS = re.compile(r"(.*pos_conv.*)(weight_g|original0)")
PARTNER = {"weight_g": "weight_v", "original0": "original1"}


@dataclass
class Report:
    """What one pass over the tensors finds out."""

    effective: EffectiveAlpha = field(default_factory=EffectiveAlpha)
    # relative difference between the kernels that merging factors and merging kernels gives
    pos_conv: float | None = None
    tensors: int = 0  # that were merged, not just kept
    slerp_fallbacks: int | None = None  # of these, merged linearly by slerp

    def record(self) -> dict[str, Any]:
        """For merge.json."""
        return {
            "effective_alpha": self.effective.result(),
            "moved": self.effective.moved(),
            "pos_conv_difference": self.pos_conv,
            "tensors": self.tensors,
            "slerp_fallbacks": self.slerp_fallbacks,
        }


def merge(
    base: Weights,
    tuned: Sequence[Weights],
    method: str = "linear",
    *,
    only: Sequence[str] | None = None,
    pos_conv: PosConv = "factors",
    several: Several = "mean",
    stats: Sequence[Weights] | None = None,
    report: Report | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    """Merged weights, float32, as new tensors; the inputs may be lazy mappings."""
    given = {"only": only, "pos_conv": pos_conv, "several": several}
    options = build(MergeOptions, given, "merge")
    return dict(merge_tensors(base, tuned, method, params, options, stats, report))


def merge_tensors(
    base: Weights,
    tuned: Sequence[Weights],
    method: str,
    params: Mapping[str, Any],
    options: MergeOptions,
    stats: Sequence[Weights] | None = None,
    report: Report | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged tensor), one by one; each input tensor is indexed once.

    `params` are the method's keys (`alpha`: see `alphas.py`). Integer tensors, the pre-training
    head, what `only` leaves out, and what no forward needs where a tuned model lacks it or has it
    in another shape are the base's. `stats` holds one mapping for each of [base, *tuned] for the
    methods in STATISTICS. `report` is filled on the way.

    Raises UserError for models that do not match (showing the first differences), a parameter or
    filter that there is not, and, when it is reached, a result that is not finite.
    """
    if not tuned:
        raise UserError("nothing to merge: give at least one fine-tuned upstream")
    absent: set[str] = set()
    for number, other in enumerate(tuned, 1):
        absent |= require_names(base, other, f"tuned model {number}")
    spare = spare_names(base)
    rule, report = rule_for(list(base), method, params, options, stats), report or Report()
    names = set(base)  # to ask a lazy mapping whether it has a name may read the tensor
    gains = (match for name in base if (match := FACTORS.fullmatch(name)))
    pairs = {m[0]: v for m in gains if (v := m[1] + PARTNER[m[2]]) in names}
    if method == "slerp":
        report.slerp_fallbacks = 0
    for name in base:
        if name in pairs.values():
            continue  # came with its partner
        group = [name, pairs[name]] if name in pairs else [name]
        others = [] if name in absent else tuned
        read = [_read(base, others, member, member in spare) for member in group]
        if len(read[0]) == 1 or not rule.moves(name, read[0][0]):
            merged = [tensors[0] for tensors in read]
            for member, same in zip(group, merged):
                if same.is_floating_point():
                    report.effective.keep(rule.places[member].module, same)
        elif name in pairs:
            merged = _weight_normed(group, read, rule, report)
        else:
            merged = [_merged(name, read[0], rule, report)]
        for member, tensors, result in zip(group, read, merged):
            if member not in spare:
                _require_finite(member, tensors, result)
            alias = any(result.data_ptr() == tensor.data_ptr() for tensor in tensors)
            yield member, result.clone() if alias else result


def ahead(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, each one made in another thread while the one before is used."""
    source = iter(tensors)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, None)
        while item := coming.result():
            coming = pool.submit(next, source, None)
            yield item


def _read(base: Weights, tuned: Sequence[Weights], name: str, spare: bool) -> list[Tensor]:
    """One tensor of [base, *tuned], float32 if they are of floating point.

    spare: no forward needs it, so that the base's alone comes where one has none that fits.
    """
    tensors = [base[name]]
    for number, other in enumerate(tuned, 1):
        tensors.append(other[name])
        if spare and not _fit(*tensors[-2:]):
            tensors = tensors[:1]
            break
        require_alike(tensors[0], tensors[-1], (base, other), f"tuned model {number}")
    return [t.detach().float() if t.is_floating_point() else t for t in tensors]


def _fit(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one name can be merged."""
    alike = first.shape == second.shape and first.dtype.is_floating_point
    return alike and bool(first.isfinite().all() and second.isfinite().all())


def _merged(name: str, tensors: Sequence[Tensor], rule: Rule, report: Report) -> Tensor:
    """Merge one tensor of [base, *tuned] and note how far it went."""
    base, *tuned = tensors
    look = partial(report.effective.add, rule.places[name].module)
    report.tensors += 1
    if report.slerp_fallbacks is not None:
        report.slerp_fallbacks += slerp_falls_back(base, tuned[0])
    return rule(name, base, tuned, look=look)


def _weight_normed(
    names: Sequence[str], tensors: Sequence[Sequence[Tensor]], rule: Rule, report: Report
) -> list[Tensor]:
    """g and v of a weight-normed kernel, merged as factors or as the kernel; and the difference.

    Interpolating g and v is not interpolating g v / |v|. Re-factored, v is the kernel and g its
    norm. No statistics are gathered of kernels.
    """
    sides = tuple(d for d, size in enumerate(tensors[0][0].shape) if size == 1)
    base, *tuned = kernels = [g * v / _norm(v, sides) for g, v in zip(*tensors)]
    if rule.options.pos_conv == "factors":
        merged = [_merged(name, each, rule, report) for name, each in zip(names, tensors)]
        direct = rule(names[1], base, tuned, gathered=False)
        report.pos_conv = _difference(merged[0] * merged[1] / _norm(merged[1], sides), direct)
        return merged
    factors = [rule(name, each[0], each[1:]) for name, each in zip(names, tensors)]
    direct = _merged(names[1], kernels, rule, report)
    report.pos_conv = _difference(factors[0] * factors[1] / _norm(factors[1], sides), direct)
    return [each[0] for each in tensors] if direct is base else [_norm(direct, sides), direct]


def _norm(kernel: Tensor, sides: tuple[int, ...]) -> Tensor:
    """|v| over all but the dimension that g runs along, shaped like g."""
    return torch.linalg.vector_norm(kernel, dim=sides, keepdim=True)


def _difference(kernel: Tensor, other: Tensor) -> float:
    """|kernel - other| / |other|."""
    return float(torch.dist(kernel, other) / torch.linalg.vector_norm(other))


def _require_finite(name: str, tensors: Sequence[Tensor], merged: Tensor) -> None:
    # finite sums have finite terms, and are quick; large finite terms may overflow them
    sums = (float(piece.sum()) for piece in merged.reshape(-1).split(PIECE))
    if all(map(math.isfinite, sums)) or merged.isfinite().all():
        return
    faults = [i for i, tensor in enumerate(tensors) if not tensor.isfinite().all()]
    who = ", ".join(f"tuned model {i}" if i else "the base" for i in faults)
    blame = ""
    if faults:
        blame = f"; {who} holds NaN or infinite values there; take another checkpoint of that run"
    raise UserError(f"the merge of {name} is not finite{blame}")
