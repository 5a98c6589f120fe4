"""A task recipe: one YAML file that fixes everything about one task."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import downstream.corpora  # noqa: F401 - registers the readers
from downstream.base import CORPORA, HEADS, METRICS, TASKS, Example, Labels, Task
from downstream.corpora.common import require_texts
from downstream.tasks.lexicon import KNOWN, to_phones
from upstream.common import DATA, shipped, user_code
from upstream.common.errors import UserError, near_miss
from upstream.common.registry import Registry
from upstream.common.schema import (
    Amount,
    Bound,
    Natural,
    Positive,
    bind,
    build,
    expand,
    read_yaml,
)
from upstream.common.schema import overrides as overrides  # torch is not needed for it

if TYPE_CHECKING:  # a recipe is read without torch, which takes seconds to import
    from downstream.tasks.heads import Head
    from upstream.features.codec import Kind

T = TypeVar("T")
RECIPES = DATA / "recipes"
Rate = Annotated[float, Bound(0, 100, open_low=True, open_high=True)]  # a learning rate


@dataclass(frozen=True)
class Train:
    """How the heads are trained (s3prl's `config.runner` and `optimizer`)."""

    steps: Positive
    batch: Positive
    lr: list[Rate]  # every one is trained; the best on dev is tested
    eval_every: Positive
    accumulate: Positive = 1
    clip: Amount = 1.0
    seeds: Positive = 1
    balanced: bool = False  # every class is drawn as often, with replacement (SUPERB's KS)
    optimizer: Literal["Adam", "AdamW"] = "Adam"
    specaug: bool = False
    # minutes: batches come out of blocks of so much audio, in which all heads hear the training set
    # in one order (run/window.py); without it, out of the whole set
    window: Amount | None = None


@dataclass(frozen=True)
class Crop:
    """Training crops of long utterances: `per_utterance` windows at random places fixed by `seed`.

    An epoch sees one of them, each epoch the next. s3prl draws a new 8-second window each time
    (SID); a fixed set can be extracted once.
    """

    seconds: Amount
    per_utterance: Positive = 4
    seed: Natural = 0


@dataclass(frozen=True)
class Recipe:
    """One task of a suite, named like its file; `corpus` and `head` are checked by signature."""

    kind: Literal["task"]
    task: str
    corpus: dict[str, Any]
    train: Train | None = None  # of the head, if the task has one
    head: dict[str, Any] = field(default_factory=dict)  # `name`: another head than the task's
    metric: list[str] = field(default_factory=list)  # others than the task's; the first selects
    tokens: Literal["superb", "train"] = "train"
    lexicon: list[str] = field(default_factory=list)
    folds: bool = False
    crop: Crop | None = None
    frames: Literal["float16", "int8"] = "float16"  # how frames are kept (CTC tasks)
    expect: dict[str, float] = field(default_factory=dict)  # upstream -> the published score
    name: str = ""
    suite: str = ""
    path: str = ""

    @property
    def hash(self) -> str:
        """12 hex digits over all that can change a score; not the seeds, roots or file names."""
        data = dataclasses.asdict(self)
        for key in ("name", "suite", "path", "expect"):
            data.pop(key)
        train = data["train"] or {"seeds": 1, "balanced": True, "window": None}
        train.pop("seeds")
        # younger than the first cells
        for names, key in ((train, "balanced"), (train, "window"), (data, "metric")):
            if not names[key]:
                names.pop(key)
        data["corpus"].pop("root", None)
        for names in (data, data["corpus"], data["head"]):
            for key in {"task", "name"} & names.keys():
                names[key] = user_code.identity(str(names[key]))
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def window(self) -> float | None:
        """Minutes of audio that a batch is out of; None: all."""
        return self.train.window if self.train else None

    @property
    def features(self) -> Kind:
        """What the head needs of every utterance."""
        return "mean" if self.kind_of_task().features == "mean" else self.frames

    def seeds(self, asked: int | None = None) -> int:
        """How many heads differ in nothing but their seed: one where none is trained."""
        return (asked or self.train.seeds) if self.train else 1

    def kind_of_task(self) -> Task:
        """The task, with the recipe's metrics if it names some."""
        task = TASKS.named(self.task)
        return dataclasses.replace(task, metrics=tuple(self.metric)) if self.metric else task

    def head_constructor(
        self, options: Mapping[str, Any] | None = None, where: str = ""
    ) -> Callable[[int, int, int], Head]:
        """What makes a head from (layers, dim, classes), with `options` or the recipe's own.

        It is the task's usual one unless the option `name` asks for another. Raises UserError.
        """
        where = where or f"{self.path}: head"
        others = dict(self.head if options is None else options)
        name = others.pop("name", self.kind_of_task().head)
        head = named(HEADS, name, f"{where}: name")
        return functools.partial(head, **bind(head, others, where, ("layers", "dim", "classes")))

    def new_head(
        self, layers: int, dim: int, labels: Labels, options: Mapping[str, Any] | None = None
    ) -> Head:
        """A head with random weights, for hidden states of this shape and these classes."""
        head = self.head_constructor(options)(layers, dim, labels.size)
        head.sizes = labels.sizes
        return head

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for score.json."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "path"}


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a task recipe, its corpus options and head options. Raises UserError."""
    data = read_yaml(path, overrides)
    given = {"name": path.stem, "suite": path.parent.name, "path": str(path)}
    recipe = build(Recipe, data, str(path), **given)
    task = named(TASKS, recipe.task, f"{path}: task")
    options = dict(recipe.corpus)
    reader = named(CORPORA, options.pop("name", None), f"{path}: corpus: name")
    bind(reader, options, f"{path}: corpus", given=("results",))
    for name in recipe.metric:
        if not task.admits(named(METRICS, name, f"{path}: metric")):
            fault = f"{name!r} cannot score task {recipe.task!r}"
            raise UserError(f"{path}: metric: {fault}, which has {', '.join(task.metrics)}")
    if recipe.head or (task.head and not HEADS.is_unloaded(task.head)):
        recipe.head_constructor()  # with the options, of which the project's heads need none
    if bool(task.head) != bool(recipe.train):
        fault = "is missing" if task.head else f"nothing is trained in task {recipe.task!r}"
        raise UserError(f"{path}: train: {fault}")
    if recipe.train and recipe.train.window is not None:
        other = {"folds": recipe.folds, "train.balanced": recipe.train.balanced}
        faults = [f"does not go with {key}" for key, given in other.items() if given]
        if recipe.features == "mean":
            faults.append(f"task {recipe.task!r} takes time means, which always fit")
        if faults:
            raise UserError(f"{path}: train: window: {faults[0]}; leave it out")
    rates = recipe.train.lr if recipe.train else [1.0]
    if not rates or len(set(rates)) < len(rates):
        raise UserError(f"{path}: train: lr: must be a list of different numbers, at least one")
    return recipe


def named(registry: Registry[T], name: Any, where: str) -> T:
    """What a recipe names. Raises UserError naming `where`."""
    try:
        return registry.named(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def examples(recipe: Recipe, results: Path) -> list[Example]:
    """The recipe's corpus, phones as targets where a lexicon is given. Raises UserError.

    `$RESULTS` is the results folder, `$RECIPE` the recipe's own. A relative `root` or lexicon is
    looked for beside the recipe and where one stands; two that differ are a UserError. With
    `tokens: train` a lexicon may have any phones.
    """
    root = _located(recipe, recipe.corpus["root"], f"{recipe.path}: corpus: root", results)
    found = read_corpus(recipe.corpus, f"{recipe.path}: corpus", results, root)
    if not recipe.lexicon:
        return found
    where = f"{recipe.path}: lexicon"
    lexicons = [_located(recipe, path, where, results) for path in recipe.lexicon]
    return to_phones(found, lexicons, None if recipe.tokens == "train" else KNOWN)


def read_corpus(
    corpus: Mapping[str, Any], where: str, results: Path, root: Path | None = None
) -> list[Example]:
    """What the reader `name` finds in `root` with the other options. Raises UserError.

    root: where the corpus lies, if not at the path that `corpus` names.
    """
    for key in ("name", "root"):
        if key not in corpus:
            raise UserError(f"{where}: missing key {key!r}")
    options = {k: v for k, v in corpus.items() if k not in ("name", "root")}
    root = root or expand(corpus["root"], f"{where}: root", RESULTS=str(results))
    reader = named(CORPORA, corpus["name"], f"{where}: name")
    given = {"results": results} if "results" in inspect.signature(reader).parameters else {}
    options = bind(reader, options, where, given=("root", "results"))
    found = list(reader(root, **options, **given))
    if not found:
        raise UserError(f"{where}: no utterances in {root}")
    require_texts(found)
    return found


def _located(recipe: Recipe, text: str, where: str, results: Path) -> Path:
    """A path of a recipe; a relative one beside it, or else as it is. Raises UserError for both."""
    folder = Path(recipe.path).parent
    path = expand(text, where, RESULTS=str(results), RECIPE=str(folder))
    if path.is_absolute() or text.startswith(("$", "~")):
        return path
    beside = folder / path
    if not os.path.exists(beside):
        return path
    if os.path.exists(path) and not os.path.samefile(path, beside):
        fault = f"{text} is both {beside.absolute()} and {path.absolute()}"
        raise UserError(f"{where}: {fault}; write $RECIPE/{text} or an absolute path")
    return beside


def suites() -> list[Path]:
    """The folders under recipes/ that hold task recipes."""
    return sorted(p for p in RECIPES.iterdir() if p.is_dir() and _tasks(p))


def suite_folder(name: str) -> Path:
    """The folder of a suite: a name under recipes/, or any folder. Raises UserError."""
    folder = shipped(Path(name))
    if not folder.is_dir():
        folder = RECIPES / name
    if not folder.is_dir():
        raise UserError(f"unknown suite {name!r}{near_miss(name, [p.name for p in suites()])}")
    return folder


def suite(name: str) -> dict[str, Path]:
    """Task recipes of a suite: task name -> file. Raises UserError if it has none."""
    if recipes := _tasks(suite_folder(name)):
        return recipes
    raise UserError(f"suite {name}: holds no task recipe (a YAML file with kind: task)")


def _tasks(folder: Path) -> dict[str, Path]:
    paths = sorted(folder.glob("*.yaml"))
    return {p.stem: p for p in paths if read_yaml(p).get("kind", "task") == "task"}
