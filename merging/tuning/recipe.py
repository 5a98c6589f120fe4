"""The recipe of stage 1, and where the upstream that it describes is built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

import upstream
from downstream import recipe as task_recipes
from downstream.recipe import named
from downstream.run.prepare import Prepared, prepare
from merging.tuning.collect import collectors
from upstream.checkpoints.read import Checkpoint
from upstream.common import user_code
from upstream.common.errors import UserError
from upstream.common.registry import Registry
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

if TYPE_CHECKING:
    from merging.tuning.strategies import Strategy

STRATEGIES: Registry[type[Strategy]] = Registry("fine-tuning strategy")
for _name, _place, _about in (
    (
        "stable",
        "strategies:Stable",
        "Speech-FT: the head alone at first, the CNN frozen throughout",
    ),
    ("regular", "strategies:Strategy", "all but the CNN from the first update, as s3prl does"),
    (
        "anchored",
        "strategies:Anchored",
        "stable, pulled to the pre-trained weights (L2-SP, L1, max)",
    ),
    ("lora", "lowrank:LoRA", "stable, but only low-rank changes of some layers learn"),
    ("dora", "lowrank:DoRA", "LoRA with the size of each row apart"),
):
    STRATEGIES.add(_name, f"merging.tuning.{_place}", _about)

# Keys that came later enter a build's key only where they are not left at their default.
LATER: dict[str, Any] = {
    "strategy": "stable", "dropout": None, "attention_dropout": None, "activation_dropout": None,
    "params": {}, "head_lr": None, "layer": None, "collect": [],
    "precision": "float32", "checkpointing": False, "batch_seconds": None,
}  # fmt: skip


@dataclass(frozen=True)
class TuningRecipe:
    """Everything about one stage-1 run."""

    kind: Literal["finetune"]
    upstream: str
    task: str  # a task recipe beside this file: its corpus, targets, metric
    steps: Positive
    batch: Positive | None = field(default=None, kw_only=True)  # utterances; or batch_seconds
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

    def facts(self) -> dict[str, Any]:
        """The recipe as plain values; LATER keys only where they were written."""
        values = dataclasses.asdict(self) | {"strategy": user_code.identity(self.strategy)}
        if "name" in self.head:
            values["head"]["name"] = user_code.identity(str(self.head["name"]))
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
    prepared: Prepared

    @property
    def key(self) -> str:
        """12 hex digits over all that the tuned weights depend on."""
        facts = [self.recipe.facts(), self.fingerprint, self.prepared.revision]
        if self.recipe.accumulate > 1:  # micro-batches of all sizes once counted alike
            facts.append("weighted")
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    @property
    def fold(self) -> str:
        """The fold to train on, the first if the recipe names none. Raises UserError."""
        folds = self.prepared.splits
        fold = self.recipe.fold or next(iter(folds))
        if fold not in folds:
            raise UserError(f"fold {fold!r}: the corpus has {', '.join(folds) or 'none'}")
        return fold

    @property
    def heard(self) -> frozenset[str]:
        """Keys of the clips whose labels the tuned weights have seen, on train and dev."""
        split = self.prepared.splits[self.fold]
        clips = self.prepared.audio([*split["train"], *split["dev"]])
        return self.encoder.heard | {clip.key for clip in clips}

    def folder(self, results: Path) -> Path:
        """Where its upstream is, or will be, built."""
        return results / "upstreams" / f"{self.recipe.name}@{self.key}"


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> TuningRecipe:
    """Read and check a fine-tuning recipe. Raises UserError."""
    recipe = build(TuningRecipe, read_yaml(path, overrides), str(path), name=path.stem)
    strategy = named(STRATEGIES, recipe.strategy, f"{path}: strategy")
    bind(strategy, recipe.params, f"{path}: params", ("model", "recipe"))
    collectors(recipe.collect, recipe.steps)
    if (recipe.batch is None) == (recipe.batch_seconds is None):
        raise UserError(f"{path}: needs either batch (utterances) or batch_seconds")
    task_recipes.load(path.parent / recipe.task).head_constructor(recipe.head, f"{path}: head")
    return recipe


def open_plan(path: Path, results: Path) -> Plan:
    """A recipe, its upstream with the recipe's dropouts, and its corpus. Raises UserError."""
    recipe = load_recipe(path)
    encoder = upstream.load(recipe.upstream)
    if not isinstance(encoder, Encoder):
        raise UserError(f"{path}: upstream {recipe.upstream} has no weights to fine-tune")
    if recipe.layer is not None and recipe.layer >= encoder.num_layers:
        most = encoder.num_layers - 1
        raise UserError(f"{path}: layer: {recipe.upstream} has hidden states 0 to {most}")
    fingerprint = encoder.fingerprint()
    dropouts, low = recipe.dropouts(), recipe.precision != "float32"
    if dropouts or low:
        weights, heard = checkpoint(encoder, encoder.model.state_dict(), **dropouts), encoder.heard
        precision = recipe.precision if low else encoder.precision
        encoder = Encoder(weights, encoder.padding, precision)
        encoder.heard = heard
    encoder.model.encoder.checkpointing = recipe.checkpointing
    prepared = prepare(task_recipes.load(path.parent / recipe.task), results)
    return Plan(recipe, encoder, fingerprint, prepared)


def checkpoint(encoder: Encoder, state: Mapping[str, Tensor], **config: Any) -> Checkpoint:
    """What a file of the encoder would hold with these weights and changes of config.json."""
    settings = {**encoder.config.to_dict(), **config}
    return Checkpoint(encoder.family, settings, state, encoder.normalize, encoder.source)


def tuned_folder(path: Path, results: Path) -> tuple[Path, TuningRecipe]:
    """Where the upstream of a fine-tuning recipe is or will be built, and the recipe."""
    plan = open_plan(path, results)
    return plan.folder(results), plan.recipe
