"""One converter: what YAML, JSON and command lines may say, and one clear line for all else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from upstream.common.errors import UserError
from upstream.common.schema import (
    DEEPEST,
    LARGEST_YAML,
    Amount,
    Bound,
    Dropout,
    Natural,
    Positive,
    Share,
    bind,
    build,
    convert,
    parse,
    read_value,
    read_yaml,
)


def refused(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one line that the call ends in."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 300
    return line


@dataclass(frozen=True)
class Part:
    rate: Amount


@dataclass(frozen=True)
class Plan:
    steps: Positive
    seed: Natural = 0
    parts: list[Part] = field(default_factory=list)
    name: str = ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", {"a": 1}),
        ("[1e-4, 1E5, -.5, +3, 3., 1.0e-4]", [1e-4, 1e5, -0.5, 3, 3.0, 1e-4]),
        ("[no, yes, on, off, y, n, NO]", ["no", "yes", "on", "off", "y", "n", "NO"]),
        ("[true, False, null, ~, TRUE]", [True, False, None, None, True]),
        ("[1:30, 2024-01-01, 1_000, 0x10, 0o17, 0, 0.5]", None),
        ("['010', \"1\", 'true']", ["010", "1", "true"]),
        ("", None),
        ("# only a remark", None),
        ("|\n 1\n", "1\n"),
        ("{'': 1, 2: b}", {"": 1, 2: "b"}),
    ],
)
def test_yaml_is_the_core_of_1_2(text: str, value: Any) -> None:
    if value is None and text.startswith("["):
        value = ["1:30", "2024-01-01", "1_000", "0x10", "0o17", 0, 0.5]
    read = read_value(text, "here")
    assert read == value
    if isinstance(read, list):
        assert [type(item) for item in read] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML (a is there twice"),
        ("a: {b: 1, b: 1}", "b is there twice"),
        ("a: 010", "line 1: not valid YAML (010: write 10, or '010' if it is text)"),
        ("a: -007.5", "write -7.5"),
        ("a: " + "9" * 5_000, "5000 digits"),
        ("[" * 10_000, f"nested more than {DEEPEST} levels deep"),
        ("- " * 10_000 + "a", f"nested more than {DEEPEST} levels deep"),
        ("{a: " * 10_000, f"nested more than {DEEPEST} levels deep"),
        ("a: &x [1]\nb: [*x, *x]", "line 2: not valid YAML (*x: write the value again"),
        ("&x [*x]", "aliases are not read"),
        ("a: !!python/object:os.system x", "tags are not read"),
        ("!!set {a}", "tags are not read"),
        ("a: !mine 3", "tags are not read"),
        ("[a]: 1", "a key must be one word"),
        ("? {a: 1}\n: 1", "a key must be one word"),
        ("<<: {a: 1}\n<<: 2", "<< is there twice"),
        ("a: \0", "character 0x0"),
        ('a: "\\0"', "NUL"),
        ('a: "\\ud800"', "half a character"),
        ("a: \ud800", "character 0xd800"),
        ("a: [", "line 1: not valid YAML"),
        ("a: 1\n--- \nb: 2", "not valid YAML (but found another document)"),
    ],
    ids=lambda text: text[:12].encode("ascii", "backslashreplace").decode(),
)
def test_what_yaml_may_not_hold_is_one_line(text: str, words: str) -> None:
    line = refused(read_value, text, "here")
    assert line.startswith("here: ") and words in line


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("steps: 1")
    assert read_yaml(path) == {"steps": 1}
    assert "no such file; did you mean a.yaml?" in refused(read_yaml, tmp_path / "b.yaml")
    assert "is a folder" in refused(read_yaml, tmp_path)
    path.write_bytes(b"a: \xff")
    assert "not a text file" in refused(read_yaml, path)
    path.write_text("- 1")
    assert "must be a mapping" in refused(read_yaml, path)
    os.truncate(path, LARGEST_YAML + 1)
    assert "too large" in refused(read_yaml, path)
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe" in refused(read_yaml, path)
    assert "cannot be a file's name" in refused(read_yaml, Path("a\0.yaml"))


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Positive, [1, 2**31 - 1], [0, -1, 2**31, True, "1", 1.0]),
        (Natural, [0], [-1, 10**30]),
        (Amount, [1e-9, 3], [0, -1.0, math.nan, math.inf, "much"]),
        (Share, [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        (Dropout, [0.0, 0.99], [1, 2]),
        (float, [-1e300, 0], [math.nan, math.inf, -math.inf, 10**400, False, None]),
        (int, [-5, 2**40], [2**64, 10**5000, 1.5]),
        (Annotated[float, Bound(0, math.inf)], [math.inf, 0], [math.nan, -1]),
        (Positive | None, [None, 3], [0, "a"]),
        (bool, [True], ["no", 1, 0]),
        (str, ["no"], [1, None, True]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
        (list[Share], [[0.5]], [0.5, [2.0], [math.nan]]),
        (tuple[Positive, ...], [[1, 2]], [[0], "ab"]),
        (dict[str, float], [{"a": 1}], [{"a": math.nan}, [1]]),
        (Mapping[str, int], [{"a": 1}], [{"a": "b"}]),
        (Part, [{"rate": 1.0}], [{"rate": 0}, {}, {"rate": 1.0, "rat": 1}, 3]),
        (Callable[..., int], [], ["a"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_bounds_live_in_the_type(hint: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        converted = convert(value, hint, "here")
        expected = Part(1.0) if hint is Part else value
        assert converted == (tuple(value) if isinstance(converted, tuple) else expected)
    for value in bad:
        assert refused(convert, value, hint, "here").startswith("here")


def test_a_wrong_number_is_told_how_to_be_right() -> None:
    assert "0 must be at least 1 and at most 2147483647" in refused(convert, 0, Positive, "seed")
    assert "nan must be a finite number" in refused(convert, math.nan, float, "alpha")
    line = refused(convert, read_value("1:30", "x"), Amount, "seconds")
    assert line == (
        "seconds: must be float, not text ('1:30'); write a plain decimal number without quotes"
    )
    assert "must be true or false, not text ('yes')" in refused(convert, "yes", bool, "x")


def test_what_is_given_is_not_the_files_to_say() -> None:
    assert build(Plan, {"steps": 3}, "here", name="a") == Plan(3, name="a")
    assert "unknown key 'name'" in refused(build, Plan, {"steps": 3, "name": "b"}, "x", name="a")
    assert "did you mean steps?" in refused(build, Plan, {"stesp": 3}, "x")
    assert "missing key 'steps'" in refused(build, Plan, {}, "x")
    line = refused(build, Plan, {"steps": 1, "parts": [{"rate": 1}, {"rate": 0}]}, "x")
    assert line == "x: parts[1]: rate: 0.0 must be above 0 and at most 1000000000"


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", str, "3"),
        ("010", str, "010"),
        ("[", str, "["),
        ("a: b", str, "a: b"),
        ("a/b", Path, Path("a/b")),
        ("1e-4", float, 1e-4),
        ("5", int | str, 5),
        ("none", str | None, None),
        ("None", int | None, None),
        ("none", str, "none"),
        ("true", bool, True),
        ("False", bool, False),
        ("s3prl", Literal["exact", "s3prl"], "s3prl"),
        ("", str, ""),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("0.5", Any, 0.5),
    ],
)
def test_command_line_text(text: str, hint: Any, value: Any) -> None:
    read = parse(text, hint, "here")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("010", int), ("maybe", bool), ("1", bool), ("nan", float), (".nan", float),
        ("-1", Natural), ("fast", Literal["exact", "s3prl"]), ("2", Share), ("none", int),
        ("x", Callable[..., int]),
    ],
)  # fmt: skip
def test_wrong_command_line_text(text: str, hint: Any) -> None:
    assert refused(parse, text, hint, "here").startswith("here")


def test_options_of_a_callable_by_their_text() -> None:
    def make(repo: str, *, alpha: Share = 0.5, layers: Positive | None = None) -> None: ...

    texts = {"alpha": "0.25", "layers": "none"}
    assert bind(make, texts, "x", ("repo",), parse) == {"alpha": 0.25, "layers": None}
    assert "did you mean alpha?" in refused(bind, make, {"alhpa": "1"}, "x", ("repo",), parse)
    make.__annotations__["alpha"] = "NoSuchType"
    assert "cannot be read" in refused(bind, make, texts, "x", ("repo",), parse)
