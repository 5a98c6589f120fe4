"""Every key of every kind of recipe with every kind of nonsense: one line, or a sound recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from downstream import recipe as tasks
from merging import recipe as merges
from merging.tuning import recipe as tunings
from upstream.common.errors import UserError

VALUES = [
    None, True, False, -1, 0, 2, 10**12, 10**30, -0.5, 1.5, 1e300, math.inf, -math.inf, math.nan,
    "", "x", "1e-4", "0x10", "..", "/", "a/../../b", "$HOME", "\x00", "\ud800", "é" * 300, [], [[]],
    [None], [-1], [math.nan], [1, 1], [10**30], ["x", "x"], {}, {"x": {}}, {"name": "x"}, {"": 1},
]  # fmt: skip
TASK: dict[str, Any] = {
    "kind": "task",
    "task": "asr",
    "tokens": "superb",
    "corpus": {"name": "manifest", "root": "/data", "target": "text", "dev": 0.1, "test": 0.1,
               "split_by": "row", "file": "m.tsv", "speaker": "who", "folds": 2, "group": "lang",
               "trials": ["t.tsv"], "documents": True},
    "lexicon": [],
    "folds": False,
    "crop": {"seconds": 1.0, "per_utterance": 2, "seed": 0},
    "frames": "float16",
    "head": {"projector": 8, "hidden": 8, "depth": 1, "dropout": 0.1},
    "expect": {"hubert_base": 6.42},
    "train": {"steps": 2, "batch": 2, "lr": [1e-3, 1e-2], "eval_every": 1, "accumulate": 1,
              "clip": 1.0, "seeds": 2, "optimizer": "Adam", "specaug": False},
}  # fmt: skip
TUNING: dict[str, Any] = {
    "kind": "finetune", "upstream": "hubert_demo", "task": "task.yaml", "strategy": "stable",
    "steps": 4, "batch": 2, "eval_every": 2, "lr": 1e-4, "accumulate": 1, "clip": 1.0,
    "head_only": 0.1, "warmup": 0.1, "hold": 0.4, "specaug": False, "seed": 0, "fold": None,
    "head": {"projector": 8, "hidden": 8, "depth": 1, "dropout": 0.1},
    "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0,
}  # fmt: skip
MASKED: dict[str, Any] = {
    "kind": "finetune", "upstream": "hubert_demo", "steps": 4, "batch": 2, "eval_every": 2,
    "masked": {"corpus": {"name": "audio", "root": "/data", "dev": 0.1}, "clusters": 8, "layer": 2,
               "mask_start": 0.08, "mask_span": 10, "unmasked_weight": 0.0, "seconds": 16.0},
    "also": [{"task": "task.yaml", "share": 0.5}],
}  # fmt: skip
MERGE: dict[str, Any] = {
    "kind": "merge", "base": "hubert_demo", "tuned": ["a.yaml", "b.yaml"], "method": "della",
    "params": {"alpha": 0.5, "density": 0.5, "epsilon": 0.1, "elect": True, "seed": 0},
    "compare": ["fbank"], "only": ["attention"], "pos_conv": "factors", "several": "mean",
    "origin": "checked", "calibrate": {"task": "task.yaml", "utterances": 4, "seed": 0},
    "choose": {"tasks": ["task"], "members": "greedy"},
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "task": (TASK, tasks.load),
    "finetune": (TUNING, tunings.load_recipe),
    "masked": (MASKED, tunings.load_recipe),
    "merge": (MERGE, merges.load_recipe),
}


def places(content: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, those inside mappings included."""
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def changed(content: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = place
    inner = changed(content[first], tuple(rest), value) if rest else value
    return {**content, first: inner}


def numbers(value: Any) -> Iterator[float]:
    """Every number in a recipe that was read."""
    if isinstance(value, (bool, str)):
        return
    if isinstance(value, (int, float)):
        yield value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from numbers(item)


CASES = [(kind, place) for kind, (content, _) in KINDS.items() for place in places(content)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    return tmp_path


@pytest.mark.parametrize("kind, place", CASES, ids=[f"{k}-{'.'.join(p)}" for k, p in CASES])
def test_nonsense_is_refused_or_harmless(kind: str, place: tuple[str, ...], folder: Path) -> None:
    content, load = KINDS[kind]
    for value in VALUES:
        path = folder / f"{kind}.yaml"
        path.write_bytes(
            yaml.safe_dump(changed(content, place, value)).encode("utf-8", "surrogatepass")
        )
        try:
            loaded = load(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, value
            continue
        values = dataclasses.asdict(loaded)
        values.pop("expect", None)  # is only printed
        found = list(numbers(values))
        assert all(map(math.isfinite, found)), (value, found)
        assert all(abs(number) < 2**33 for number in found), (value, found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipes_that_are_spoilt_here_are_sound(kind: str, folder: Path) -> None:
    content, load = KINDS[kind]
    sound = {key: value for key, value in content.items() if key != "folds"}
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(sound))
    load(folder / f"{kind}.yaml")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["path", "name", "suite", "Kind", "", "kind "])
def test_keys_that_are_not_a_recipes_own(kind: str, key: str, folder: Path) -> None:
    content, load = KINDS[kind]
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump({**content, key: "x"}))
    with pytest.raises(UserError, match="unknown key"):
        load(folder / f"{kind}.yaml")
