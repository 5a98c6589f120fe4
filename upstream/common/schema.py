"""A signature is the schema: checks the keys and types of a YAML mapping against a callable.

One function, `bind`, serves recipes (dataclasses), corpus readers, heads, merging methods and
upstream loaders: their typed parameters are the keys that a recipe may hold.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml

from upstream.common.errors import UserError, near_miss

T = TypeVar("T")


class Bound(NamedTuple):
    """What a number must be; part of a type, so that no recipe key can forget it."""

    low: float
    high: float
    open_low: bool = False  # `low` itself is not allowed
    open_high: bool = False

    def admits(self, value: float) -> bool:
        """False for NaN as well."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


LARGEST = 2**31 - 1
Positive = Annotated[int, Bound(1, LARGEST)]  # a size or a number of things
Natural = Annotated[int, Bound(0, LARGEST)]  # a number of things that may be none; a seed
Amount = Annotated[float, Bound(0, math.inf, open_low=True, open_high=True)]  # seconds, a rate
Share = Annotated[float, Bound(0, 1)]
Dropout = Annotated[float, Bound(0, 1, open_high=True)]


def bind(
    target: Callable[..., Any], data: Mapping[str, Any], where: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Keyword arguments for `target` from `data`; `given` names those the caller passes itself.

    Raises UserError for an unknown or missing key and for a wrong type, naming `where`.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a mapping of keys to values, not {_kind(data)}")
    inner = dataclasses.is_dataclass(target) or not inspect.isclass(target)
    hints = typing.get_type_hints(target if inner else target.__init__, include_extras=True)
    skipped = {"self", *given}
    keys = {k: p for k, p in inspect.signature(target).parameters.items() if k not in skipped}
    keys = {k: p for k, p in keys.items() if p.kind is not p.VAR_KEYWORD}
    for key in data:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{near_miss(str(key), keys)}")
    missing = [k for k, p in keys.items() if p.default is p.empty and k not in data]
    if missing:
        raise UserError(f"{where}: missing key {missing[0]!r}")
    return {k: convert(v, hints.get(k, Any), f"{where}: {k}") for k, v in data.items()}


def build(target: Callable[..., T], data: Mapping[str, Any], where: str) -> T:
    """`target(**bind(...))`: a strict dataclass from a mapping."""
    return target(**bind(target, data, where))


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or UserError. An int is a fine float; nothing else is guessed."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        number = convert(value, args[0], where)
        for bound in args[1:]:
            if not bound.admits(number):
                raise UserError(f"{where}: {number} must be {bound}")
        return number
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return convert(value, option, where)
            except UserError:
                continue
        return convert(value, options[-1], where)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: must be a list, not {_kind(value)}")
        items = [convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: must be a mapping, not {_kind(value)}")
        item = args[1] if args else Any
        return {str(k): convert(v, item, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(Callable[..., Any], hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        if hint in (float, int) and isinstance(value, str) and _number(value):
            mended = re.sub(r"^([-+]?\d+)e", r"\1.0e", value)
            raise UserError(
                f"{where}: YAML reads {value} as text; write {mended} (with a dot, without quotes)"
            )
        raise UserError(f"{where}: must be {hint.__name__}, not {_kind(value)} ({value!r})")
    return value


def read_yaml(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file as a mapping, with dotted `overrides` (`train.steps`) set in it. UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: {reason}{near_miss(path.name, siblings)}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(
            f"{path}:{line} not valid YAML ({getattr(error, 'problem', error)})"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, not {_kind(data)}")
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        place = data
        for key in parents:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UserError(f"{path}: --set {dotted}: {key!r} is not a mapping")
        place[last] = value
    return data


def expand(text: str, where: str, **variables: str) -> Path:
    """A path with `~`, `variables` and the environment's $VARIABLES expanded."""
    for name, value in variables.items():
        text = text.replace(f"${{{name}}}", value).replace(f"${name}", value)
    path = os.path.expandvars(os.path.expanduser(text))
    if "$" in path:
        name = re.findall(r"\$\{?(\w*)", path)[0]
        raise UserError(f"{where}: ${name} is not set; run: export {name}=/path/to/the/folder")
    return Path(path)


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", str: "text", type(None): "empty"}.get(
        type(value), type(value).__name__
    )


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
