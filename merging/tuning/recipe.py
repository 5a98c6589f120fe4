"""The recipe of stage 1, and where the upstream that it describes is built."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

import upstream
from downstream.recipe import named
from downstream.run.prepare import Prepared
from merging.built import BUILT, find, is_built
from merging.strategies import STRATEGIES
from merging.tuning.aims import Aim, Masked
from merging.tuning.collect import collectors
from merging.tuning.ranks import ALL, Portion
from upstream.base import Upstream
from upstream.checkpoints.read import Checkpoint
from upstream.common import user_code
from upstream.common.errors import UserError
from upstream.common.packages import install_command
from upstream.common.schema import (
    Amount,
    Dropout,
    Natural,
    Positive,
    Share,
    bind,
    build,
    read_yaml,
)
from upstream.encoder.encoder import Encoder
from upstream.resolve import RECIPES, beside, parse

# Keys that came later enter a build's key only where they are not left at their default.
LATER: dict[str, Any] = {
    "strategy": "stable", "dropout": None, "attention_dropout": None, "activation_dropout": None,
    "params": {}, "head_lr": None, "layer": None, "collect": [],
    "precision": "float32", "checkpointing": False, "batch_seconds": None,
    "masked": None, "also": [],
}  # fmt: skip


@dataclass(frozen=True)
class TuningRecipe:
    """Everything about one stage-1 run."""

    kind: Literal["finetune"]
    upstream: str  # or a merge recipe beside this file, whose upstream is then the base
    _: dataclasses.KW_ONLY
    task: str = ""  # a task recipe beside this file: its corpus, targets, metric
    steps: Positive
    batch: Positive | None = None  # utterances; or batch_seconds
    eval_every: Positive
    lr: Amount = 1e-4
    accumulate: Positive = 1
    clip: Amount = 1.0
    head_only: Share = 0.1  # of the steps; strategy `stable`: the upstream is frozen altogether
    warmup: Share = 0.1
    hold: Share = 0.4
    specaug: bool = False
    seed: Natural = 0
    fold: str | None = None  # of a task with folds
    head: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    strategy: str = "stable"
    dropout: Dropout | None = None  # None: the upstream's own, as in its config.json
    attention_dropout: Dropout | None = None
    activation_dropout: Dropout | None = None
    params: dict[str, Any] = field(default_factory=dict)  # of the strategy
    head_lr: Amount | None = None  # None: that of the upstream
    layer: Natural | None = None  # the hidden state that feeds the head; None: the last
    collect: list[str] = field(default_factory=list)  # further upstreams of the run: collect.py
    precision: Literal["float32", "bfloat16"] = "float32"  # of the encoder's products; weights stay
    checkpointing: bool = False  # compute a layer again in the backward pass: slower, less memory
    batch_seconds: Amount | None = None  # of audio with its padding, in place of `batch`
    masked: Masked | None = None  # in place of a task
    also: list[Aim] = field(default_factory=list)  # further objectives, in turn with the first
    tensorboard: bool = False  # the log for TensorBoard as well; not in a build's key

    @property
    def aims(self) -> list[Aim]:
        """All objectives, the recipe's own first."""
        own = ("task", "masked", "head", "specaug", "fold", "layer")
        first = Aim(1 - sum(aim.share for aim in self.also), **{k: getattr(self, k) for k in own})
        return [first, *self.also]

    @property
    def highest(self) -> int | None:
        """The highest hidden state that an objective hears of; None: the last."""
        layers = [aim.layer for aim in self.aims]
        return None if None in layers else max(filter(None, layers), default=0)

    def facts(self) -> dict[str, Any]:
        """All that the weights depend on, as plain values; LATER keys only where written."""
        values = dataclasses.asdict(self) | {"strategy": user_code.identity(self.strategy)}
        del values["tensorboard"]
        for aim in (values, *values["also"]):
            corpus = aim["masked"]["corpus"] if aim["masked"] else {}
            corpus.pop("root", None)  # its audio is in the key
            for part in (aim["head"], corpus):
                if "name" in part:
                    part["name"] = user_code.identity(str(part["name"]))
        return {k: v for k, v in values.items() if k not in LATER or v != LATER[k]}

    def dropouts(self) -> dict[str, float]:
        """The fields of config.json that the recipe overrides."""
        kinds = ("attention_dropout", "activation_dropout")
        rates = {"hidden_dropout": self.dropout, **{kind: getattr(self, kind) for kind in kinds}}
        return {kind: rate for kind, rate in rates.items() if rate is not None}


class Plan(NamedTuple):
    """A recipe with all that it names loaded."""

    recipe: TuningRecipe
    encoder: Encoder
    fingerprint: str  # of the encoder before it is tuned
    corpora: tuple[Prepared, ...]  # of each of the recipe's aims
    share: Portion = ALL  # of every micro-batch: what this process trains on

    @property
    def key(self) -> str:
        """12 hex digits over all that the tuned weights depend on."""
        revisions = [prepared.revision for prepared in self.corpora]
        facts = [self.recipe.facts(), self.fingerprint, *revisions]
        if self.recipe.accumulate > 1:  # micro-batches of all sizes once counted alike
            facts.append("weighted")
        if any(aim.masked and aim.masked.unmasked_weight for aim in self.recipe.aims):
            facts.append("by frames")  # seen and hidden ones once had a mean each
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    @property
    def prepared(self) -> Prepared:
        """The corpus of the first objective, which selects."""
        return self.corpora[0]

    @property
    def heard(self) -> frozenset[str]:
        """Keys of the clips whose labels the tuned weights have seen, on train and dev."""
        pairs = zip(self.recipe.aims, self.corpora)
        return self.encoder.heard.union(*(aim.heard(prepared) for aim, prepared in pairs))

    def folder(self, results: Path) -> Path:
        """Where its upstream is, or will be, built."""
        return results / "upstreams" / f"{self.recipe.name}@{self.key}"


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> TuningRecipe:
    """Read and check a fine-tuning recipe. Raises UserError."""
    recipe = build(TuningRecipe, read_yaml(path, overrides), str(path), name=path.stem)
    strategy = named(STRATEGIES, recipe.strategy, f"{path}: strategy")
    bind(strategy, recipe.params, f"{path}: params", ("model", "recipe"))
    collectors(recipe.collect, recipe.steps)
    if recipe.tensorboard and find_spec("tensorboard") is None:
        raise UserError(f"{path}: tensorboard: is not installed: {install_command('tensorboard')}")
    if (recipe.batch is None) == (recipe.batch_seconds is None):
        raise UserError(f"{path}: needs either batch (utterances) or batch_seconds")
    if sum(aim.share for aim in recipe.also) >= 1:
        raise UserError(f"{path}: also: the shares leave nothing for the first objective")
    names = [aim.name for aim in recipe.aims]
    for number, aim in enumerate(recipe.aims):
        aim.check(path.parent, f"{path}: also[{number - 1}]" if number else str(path))
        if aim.share * recipe.steps * recipe.accumulate < 1:
            fault = f"share {aim.share:g} of {recipe.steps * recipe.accumulate} micro-batches"
            raise UserError(f"{path}: also: {aim.name}: {fault} is none at all")
        if aim.name in names[:number]:
            raise UserError(f"{path}: also: two objectives are called {aim.name!r}; rename a file")
    return recipe


def open_plan(path: Path, results: Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """A recipe with some keys changed, its upstream and its corpora. Raises UserError."""
    recipe = load_recipe(path, changes)
    with opening(path):
        encoder = load_base(beside(recipe.upstream, path.parent), results, path.parent)
    if not isinstance(encoder, Encoder):
        raise UserError(f"{path}: upstream {recipe.upstream} has no weights to fine-tune")
    for aim in recipe.aims:
        aim.fits(encoder, str(path))
    fingerprint = encoder.fingerprint()
    dropouts, low = recipe.dropouts(), recipe.precision != "float32"
    if dropouts or low:
        weights, heard = checkpoint(encoder, encoder.model.state_dict(), **dropouts), encoder.heard
        precision = recipe.precision if low else encoder.precision
        encoder = Encoder(weights, encoder.padding, precision)
        encoder.heard = heard
    encoder.model.encoder.checkpointing = recipe.checkpointing
    corpora = tuple(aim.prepared(path, results) for aim in recipe.aims)
    return Plan(recipe, encoder, fingerprint, corpora)


def load_base(spec: str, results: Path, folder: Path | None) -> Upstream:
    """The upstream of that name in a recipe that lies in `folder`.

    It is what the name means on the command line: `merged` and `finetuned` are those of the merge
    recipe beside it, built in `results` if they are not there, and without one those that `results`
    holds; a merge recipe's is built in `results`. Raises UserError.
    """
    name, options = parse(spec)
    given = {}
    if is_built(spec) and not name.endswith(RECIPES):
        recipe = folder / "merged.yaml" if folder else None
        if name not in BUILT or recipe is None or not recipe.is_file():
            return upstream.load(find(spec, results).spec)
        given["recipe"] = str(recipe)
    if (name in BUILT or name.endswith(RECIPES)) and "results" not in options:
        given["results"] = str(results)
    return upstream.load(spec, **given)


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """Raises UserError if this recipe is what the one that is being opened within it rests on."""
    if path.resolve() in _open:
        raise UserError(f"{path}: its upstream is made from itself; name an earlier one")
    _open.append(path.resolve())
    try:
        yield
    finally:
        _open.pop()


_open: list[Path] = []  # recipes whose upstreams are being made, each for the one before


def checkpoint(encoder: Encoder, state: Mapping[str, Tensor], **config: Any) -> Checkpoint:
    """What a file of the encoder would hold with these weights and changes of config.json."""
    settings = {**encoder.config.to_dict(), **config}
    return Checkpoint(encoder.family, settings, state, encoder.normalize, encoder.source)


def tuned_folder(path: Path, results: Path) -> tuple[Path, TuningRecipe]:
    """Where the upstream of a fine-tuning recipe is or will be built, and the recipe."""
    plan = open_plan(path, results)
    return plan.folder(results), plan.recipe
