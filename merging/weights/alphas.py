"""How far each tensor goes: alpha as a number, as a list over depth, or by part of the encoder.

| form | what |
|---|---|
| `0.25` | the same for every tensor |
| `[0, 0.5]` | over the transformer layers from the first to the last, linearly in between; `cnn`, |
| | `projection`, `pos_conv` and `other` take the first value, `norm` and `head` the last |
| `{cnn: 0, attention: 0.5, default: 0.25}` | by filter, see below |

A filter is a module (`cnn`, `layer 3`, ...), a part (`attention`, `ffn`, ...) or any piece of a
tensor's name (`k_proj`). The narrowest that fits decides: a piece of a name (the longest), then the
module, then the part, then `default`; the order in which they are written does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from upstream.checkpoints.tensor_names import Place
from upstream.common.errors import UserError, near_miss
from upstream.common.schema import Bound, convert, parse

Alpha = float | list[float] | dict[str, float]

MODULES = ("cnn", "projection", "pos_conv", "norm", "head", "other")  # and "layer 1", ...
PARTS = ("conv", "projection", "pos_conv", "attention", "ffn", "layer_norm", "head", "other")
ABOVE = ("norm", "head")  # modules that a list over depth gives its last value
DEFAULT = "default"
Number = Annotated[float, Bound(-100, 100)]  # beyond, there is no encoder left


def read(value: Any, where: str) -> Alpha:
    """`value` (from YAML or Python) as an alpha. Raises UserError naming `where`."""
    forms: dict[type, Any] = {dict: dict[str, Number], list: list[Number], tuple: list[Number]}
    alpha: Alpha = convert(value, forms.get(type(value), Number), where)
    if alpha in ([], {}):
        raise UserError(f"{where}: {value!r} must hold at least one number")
    return alpha


def from_text(text: str, where: str) -> Alpha:
    """`"0.5"` -> 0.5; `"0.1/0.5"` -> [0.1, 0.5]: in a name, commas part upstreams. UserError."""
    values: list[float] = [parse(part, Number, where) for part in text.split("/")]
    return values if len(values) > 1 else values[0]


def to_text(values: Sequence[float]) -> str:
    """Values over depth as text; if all are the same, it is one alpha."""
    return "/".join(f"{value:g}" for value in (values if len({*values}) > 1 else values[:1]))


def depth_of(places: Mapping[str, Place]) -> int:
    """The number of transformer layers that tensors at these places make up."""
    return max((place.layer or 0 for place in places.values()), default=0)


def check(
    alpha: Alpha, only: Sequence[str] | None, places: Mapping[str, Place], where: str
) -> None:
    """UserError, with the near match, for what does not fit an encoder's tensors at `places`."""
    depth = depth_of(places)
    if isinstance(alpha, list) and len(alpha) > max(1, depth):
        raise UserError(f"{where}: alpha: {len(alpha)} values for {depth} transformer layers")
    if only is not None and not only:
        raise UserError(f"{where}: only: name at least one module, part or piece of a tensor name")
    known = {*MODULES, *PARTS, *(f"layer {number}" for number in range(1, depth + 1))}
    filters = [key for key in alpha if key != DEFAULT] if isinstance(alpha, dict) else []
    for key in [*filters, *(only or ())]:
        if key not in known and not any(_rank(key, place, n) for n, place in places.items()):
            hint = near_miss(key, known)
            raise UserError(f"{where}: no module, part or tensor name is like {key!r}{hint}")
    for name, place in places.items():
        if place.module != "head" and selected(only, place, name):
            resolve(alpha, place, depth, name)


def resolve(alpha: Alpha, place: Place, depth: int, name: str = "") -> float:
    """The alpha of one tensor of a model with `depth` layers.

    Raises UserError if filters without a `default` leave it out.
    """
    if isinstance(alpha, dict):
        fitting = [key for key in alpha if _rank(key, place, name)]
        best = max(fitting, key=lambda key: _rank(key, place, name) or (), default=DEFAULT)
        if best not in alpha:
            raise UserError(f"alpha: nothing is said of {name or place.module}; add default: 0")
        return alpha[best]
    if not isinstance(alpha, list):
        return alpha
    if place.layer is None:
        return alpha[-1] if place.module in ABOVE else alpha[0]
    steps = max(1, depth - 1)
    # in whole numbers, so that a list of one value a layer is taken as it is written
    low, rest = divmod((place.layer - 1) * (len(alpha) - 1), steps)
    if not rest:
        return alpha[low]
    return alpha[low] + (alpha[low + 1] - alpha[low]) * rest / steps


def selected(only: Sequence[str] | None, place: Place, name: str) -> bool:
    """Whether `only` lets a tensor be merged; None lets all."""
    return only is None or any(_rank(key, place, name) for key in only)


def _rank(key: str, place: Place, name: str) -> tuple[int, int] | None:
    """How narrowly a filter fits a tensor; None if it does not."""
    if key == place.module:
        return (2, 0)
    if key == place.part:
        return (1, 0)
    # `norm` is a module: that `layer_norm` contains the word does not make it a piece of a name
    word = key in MODULES or key in PARTS or key == DEFAULT
    return (3, len(key)) if not word and key and key in name else None
