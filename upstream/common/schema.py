"""A signature is the schema: YAML, JSON and command-line text to the typed arguments of a callable.

One function, `bind`, serves recipes (dataclasses), corpus readers, heads, merging methods and
upstream loaders: their typed parameters are the keys that a recipe may hold. YAML here is the core
of YAML 1.2 without aliases and tags: only true and false are booleans, and 1e-4 is a number.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml

from upstream.common import disk, user_code
from upstream.common.errors import UserError, near_miss

T = TypeVar("T")
LARGEST_YAML = 1 << 20  # bytes
DEEPEST = 50  # levels of lists and mappings in YAML


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
        low = f"{'above' if self.open_low else 'at least'} {self.low:.10g}"
        high = f"{'below' if self.open_high else 'at most'} {self.high:.10g}"
        ends = [end for end, at in ((low, self.low), (high, self.high)) if math.isfinite(at)]
        return " and ".join(ends) or "a finite number"


LARGEST = 2**31 - 1
Positive = Annotated[int, Bound(1, LARGEST)]  # a size or a number of things
Natural = Annotated[int, Bound(0, LARGEST)]  # a number of things that may be none; a seed
Amount = Annotated[float, Bound(0, 1e9, open_low=True)]  # seconds, a gradient norm
Share = Annotated[float, Bound(0, 1)]
Dropout = Annotated[float, Bound(0, 1, open_high=True)]
# what a number without a bound of its own must be
UNBOUND = {float: Bound(-math.inf, math.inf, True, True), int: Bound(-(2**63), 2**63 - 1)}


def bind(
    target: Callable[..., Any],
    data: Mapping[str, Any],
    where: str,
    given: Iterable[str] = (),
    read: Callable[[Any, Any, str], Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `target` from `data`; `given` names those the caller passes itself.

    read: makes a value of a type, `convert` (the default) or, for command-line text, `parse`.
    Raises UserError for an unknown or missing key and for a wrong type, naming `where`.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a mapping of keys to values, not {_kind(data)}")
    target = inspect.unwrap(target)
    inner = dataclasses.is_dataclass(target) or not inspect.isclass(target)
    try:
        hints = typing.get_type_hints(target if inner else target.__init__, include_extras=True)
        parameters = inspect.signature(target).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"{where}: the types of its options cannot be read ({error})") from error
    skipped = {"self", *given}
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    keys = {k: p for k, p in parameters.items() if k not in skipped and p.kind not in loose}
    for key in data:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{near_miss(str(key), keys)}")
    missing = [k for k, p in keys.items() if p.default is p.empty and k not in data]
    if missing:
        raise UserError(f"{where}: missing key {missing[0]!r}")
    read = read or convert
    return {k: read(v, hints.get(k, Any), f"{where}: {k}") for k, v in data.items()}


def build(target: Callable[..., T], data: Mapping[str, Any], where: str, /, **given: Any) -> T:
    """A strict dataclass from a mapping; what is `given` is not the mapping's to say."""
    return target(**bind(target, data, where, given), **given)


def parse(text: str, hint: Any, where: str) -> Any:
    """Command-line text as the type `hint`, read as YAML unless text is due. Raises UserError."""
    try:
        value = None if text.lower() == "none" else text and read_value(text, where)
        return convert(value, hint, where)
    except UserError as refused:
        with contextlib.suppress(UserError):
            return convert(text, hint, where)
        raise refused from None


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or UserError. An int is a fine float; nothing else is guessed.

    A number without a bound in its type must be finite, a whole one fit 64 bits.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _number(value, args[0], args[1:], where)
    if hint in UNBOUND:
        return _number(value, hint, (UNBOUND[hint],), where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            with contextlib.suppress(UserError):
                return convert(value, option, where)
        return convert(value, options[-1], where)
    if origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple, collections.abc.Sequence):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: must be a list, not {_kind(value)}")
        items = [convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if dict in (origin, hint) or origin is collections.abc.Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: must be a mapping, not {_kind(value)}")
        item = args[1] if args else Any
        return {str(k): convert(v, item, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(Callable[..., Any], hint), value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(hint, type):
        raise UserError(f"{where}: cannot be given as text; load it from Python")
    if not isinstance(value, hint):
        due = "true or false" if hint is bool else "text" if hint is str else hint.__name__
        raise UserError(f"{where}: must be {due}, not {_kind(value)} ({value!r:.80})")
    return value


def _number(value: Any, kind: type, bounds: Iterable[Bound], where: str) -> Any:
    if not isinstance(value, (int, kind)) or isinstance(value, bool):
        odd = isinstance(value, str) and re.match(r"[-+.]?[0-9]", value)  # 1:30, 1_000, 0x10, "3"
        hint = "; write a plain decimal number without quotes" if odd else ""
        raise UserError(
            f"{where}: must be {kind.__name__}, not {_kind(value)} ({value!r:.80}){hint}"
        )
    try:
        number = kind(value)
    except OverflowError:
        number = math.inf
    for bound in bounds:
        if not bound.admits(number):
            shown = "so large a number" if 1e15 < abs(number) < math.inf else number
            raise UserError(f"{where}: {shown} must be {bound}")
    return number


def read_yaml(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A YAML file as a mapping, with dotted `overrides` (`train.steps`) set in it. UserError.

    A user's `mine.py:Thing` that lies beside the file becomes an absolute path.
    """
    try:
        text = disk.read(path, LARGEST_YAML).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file") from error
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        siblings = [sibling.name for sibling in path.parent.glob("*.yaml")]
        raise UserError(f"{error}{near_miss(path.name, siblings)}") from error
    data = read_value(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, not {_kind(data)}")
    return dict(user_code.beside(override(data, overrides or {}, str(path)), path.parent))


def override(data: dict[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`data` with `values` of dotted keys (`train.steps`) set in it. Raises UserError."""
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        place = data
        for key in parents:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UserError(f"{where}: --set {dotted}: {key!r} is not a mapping")
        place[last] = value
    return data


def overrides(items: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=500"]` as a mapping with YAML values. Raises UserError."""
    values = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"--set {item}: must be KEY=VALUE, for example train.steps=500")
        values[key] = read_value(value, f"--set {item}")
    return values


def read_value(text: str, where: str) -> Any:
    """YAML text as None, bool, int, float, str, and lists and dicts of them. Raises UserError."""
    try:
        node = yaml.compose(text, _Plain)
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{where}:{line} not valid YAML ({error.problem})") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{where}: character {error.character:#x} is not text") from error


class _Plain(yaml.BaseLoader):
    """A tree of nodes without a tag: aliases, which can blow up, and types by tag are refused."""

    depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        return ""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _fault(event, f"*{event.anchor}: write the value again, aliases are not read")
        if event.tag not in (None, "!"):
            raise _fault(event, f"{event.tag}: leave the tag out, tags are not read")
        if self.depth == DEEPEST:
            raise _fault(event, f"nested more than {DEEPEST} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _fault(place: Any, problem: str) -> yaml.MarkedYAMLError:
    """An error at a node or event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _value(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _value(key_node)
        if key is None or isinstance(key, (list, dict)):
            raise _fault(key_node, "a key must be one word")
        if key in mapping:
            raise _fault(key_node, f"{key} is there twice; leave one")
        mapping[key] = _value(value_node)
    return mapping


CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I)


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    if re.search("[\0\ud800-\udfff]", text):
        raise _fault(node, f"{text!r:.80} holds NUL or half a character")
    if node.style is not None:  # quoted or a block
        return text
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if not FLOAT.fullmatch(text):
        return text
    if re.match("[-+]?0[0-9]", text):
        plain = re.sub("^([-+]?)0+(?=[0-9])", r"\1", text)
        raise _fault(node, f"{text:.40}: write {plain:.40}, or '{text:.40}' if it is text")
    if not INTEGER.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if len(text) > 30:
        raise _fault(node, f"{text:.20}...: a number of {len(text)} digits")
    return int(text)


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
    words = {dict: "a mapping", list: "a list", str: "text", type(None): "empty"}
    return words.get(type(value), type(value).__name__)
