"""Stage 1 of Speech-FT: stable fine-tuning of an upstream on one task.

Paper arXiv 2502.12672 and its release's configs: Adam, one learning rate for upstream and head, the
head alone for the first 10 % of the updates, the CNN frozen throughout, warm-up 10 % / hold 40 % /
linear decay, the last hidden state (no weighted sum) to the head, gradient norm clipped at 1, the
checkpoint that is best on dev.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import upstream
from downstream import recipe as task_recipes
from downstream.base import Labels
from downstream.report.results import provenance, write_atomic
from downstream.run.cell import Prepared, prepare
from downstream.run.train import Stream, save_state
from downstream.tasks.heads import HEADS, Head
from downstream.tasks.metrics import METRICS, Metric, score
from downstream.tasks.specaug import specaug
from merging.card import write_card
from merging.weights.movement import movement
from upstream import audio
from upstream.base import SAMPLE_RATE
from upstream.checkpoints.tensor_names import module_of
from upstream.checkpoints.write import WEIGHTS
from upstream.common.errors import UserError
from upstream.common.progress import progress
from upstream.common.schema import bind, build, read_yaml
from upstream.encoder.encoder import Encoder
from upstream.features import extract as cache
from upstream.features.store import Store, free_bytes

SAVE_SECONDS = 300.0
FREE_SHARE = 0.5  # of the free disk that the outputs of the frozen CNN may take


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything about one stage-1 run."""

    kind: Literal["finetune"]
    upstream: str
    task: str  # a task recipe beside this file: its corpus, targets, metric
    steps: int
    batch: int
    eval_every: int
    lr: float = 1e-4
    accumulate: int = 1
    clip: float = 1.0
    head_only: float = 0.1  # share of the steps in which the upstream is frozen altogether
    warmup: float = 0.1
    hold: float = 0.4
    specaug: bool = False
    seed: int = 0
    fold: str | None = None  # of a task with folds
    head: dict[str, Any] = field(default_factory=dict)
    name: str = ""


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> FinetuneRecipe:
    """Read and check a fine-tuning recipe."""
    plan = build(FinetuneRecipe, read_yaml(path, overrides), str(path), name=path.stem)
    for key in ("steps", "batch", "eval_every", "accumulate"):
        if getattr(plan, key) < 1:
            raise UserError(f"{path}: {key} must be at least 1")
    for key in ("head_only", "warmup", "hold"):
        if not 0 <= getattr(plan, key) <= 1:
            raise UserError(f"{path}: {key} is a share of the steps, between 0 and 1")
    task = task_recipes.load(path.parent / plan.task)
    head = HEADS[task.kind_of_task().head]
    bind(head, plan.head, f"{path}: head", given=("layers", "dim", "classes"))
    return plan


def schedule(step: int, steps: int, warmup: float = 0.1, hold: float = 0.4) -> float:
    """Learning-rate factor at `step`: up to 1, constant, then linearly to 0 at `steps`.

    Integer truncation as in the release's schedulers.py: for 50,000 steps 2,500 -> 0.5,
    5,000..24,999 -> 1, 37,500 -> 0.5, 50,000 -> 0.
    """
    rise = int(warmup * steps)
    fall = rise + int(hold * steps)
    if step < rise:
        return step / rise
    if step < fall:
        return 1.0
    return max(0.0, (steps - step) / max(1, steps - fall))


def tuned_folder(path: Path, results: Path) -> tuple[Path, FinetuneRecipe]:
    """Where the upstream of a fine-tuning recipe is or will be built, and the recipe."""
    plan, encoder, prepared = _open(path, results)
    return results / "upstreams" / f"{plan.name}@{_key(plan, encoder, prepared)}", plan


def build_tuned(path: Path, results: Path, output: Path | None = None) -> Path:
    """The folder with the recipe's fine-tuned upstream; trained now if it is not there.

    Interrupted training goes on where it was. Raises UserError.
    """
    plan, encoder, prepared = _open(path, results)
    key = _key(plan, encoder, prepared)
    folder = output or results / "upstreams" / f"{plan.name}@{key}"
    if not (folder / WEIGHTS).exists():
        Tuning(plan, encoder, prepared, folder, key).run(Store(results / "cache"))
        return folder
    record = folder / "finetune.json"
    if not record.exists() or json.loads(record.read_text())["key"] != key:
        raise UserError(f"{folder}: holds another upstream; choose an empty folder")
    return folder


def _open(path: Path, results: Path) -> tuple[FinetuneRecipe, Encoder, Prepared]:
    plan = load_recipe(path)
    encoder = upstream.load(plan.upstream)
    if not isinstance(encoder, Encoder):
        raise UserError(f"{path}: upstream {plan.upstream} has no weights to fine-tune")
    return plan, encoder, prepare(task_recipes.load(path.parent / plan.task), results)


def _key(plan: FinetuneRecipe, encoder: Encoder, prepared: Prepared) -> str:
    text = json.dumps([dataclasses.asdict(plan), encoder.fingerprint(), prepared.revision])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Tuning:
    """One stage-1 run: an encoder, a head on its last hidden state, and their optimizer."""

    def __init__(
        self, plan: FinetuneRecipe, encoder: Encoder, prepared: Prepared, folder: Path, key: str
    ) -> None:
        self.plan, self.encoder, self.prepared = plan, encoder, prepared
        self.folder, self.key = folder, key
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder.to(self.device)
        recipe, task = prepared.recipe, prepared.recipe.kind_of_task()
        fold = plan.fold or next(iter(prepared.splits))
        if fold not in prepared.splits:
            raise UserError(f"fold {fold!r}: the corpus has {', '.join(prepared.splits) or 'none'}")
        self.split = prepared.splits[fold]
        self.metric: Metric = METRICS[task.metric]
        train = [prepared.targets[i] for i in self.split["train"]]
        self.labels: Labels = task.labels(recipe.tokens, train)
        torch.manual_seed(plan.seed)
        head = HEADS[task.head]
        self.head: Head = head(1, encoder.dim, self.labels.size, **plan.head).to(self.device)
        self.start = encoder.fingerprint()
        self.base = {k: v.detach().clone() for k, v in encoder.model.state_dict().items()}
        self.best, self.weights = float("nan"), self.base
        # Parameters without a gradient keep Adam's state empty, so one group serves both phases.
        self.parameters = [*encoder.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=plan.lr)
        self.history: list[dict[str, float]] = []

    def run(self, store: Store) -> None:
        """Train, check that what was frozen did not move, and write the folder."""
        plan, begun = self.plan, time.monotonic()
        self.outputs = self._outputs(store)
        seconds = torch.tensor([clip.seconds for clip in self.prepared.clips])
        frames = (seconds * SAMPLE_RATE / self.encoder.stride).long()
        stream = Stream(self.split["train"], frames, plan.batch, plan.seed, sort=True)
        first, alone = self._restore(), int(plan.head_only * plan.steps)
        saved = time.monotonic()
        what = f"fine-tuning {plan.upstream} on {self.prepared.recipe.name}"
        for step in progress(range(first, plan.steps), what, plan.steps, first):
            self._freeze(head_only=step < alone)
            self._update(stream, step)
            if step + 1 == alone:
                self._require_still(self.base, "the head-only phase")
            if (step + 1) % plan.eval_every == 0 or step + 1 == plan.steps:
                self._evaluate(step + 1)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(step + 1)
                    saved = time.monotonic()
        self.encoder.model.load_state_dict(self.weights)
        self._require_still(
            {k: v for k, v in self.base.items() if module_of(k) == "cnn"}, "fine-tuning (the CNN)"
        )
        self._write(time.monotonic() - begun)

    def _freeze(self, head_only: bool) -> None:
        for name, parameter in self.encoder.model.named_parameters():
            parameter.requires_grad = not head_only and module_of(name) != "cnn"

    def _update(self, stream: Stream, step: int) -> None:
        plan = self.plan
        factor = schedule(step, plan.steps, plan.warmup, plan.hold)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * factor
        torch.manual_seed(plan.seed * 1_000_003 + step)
        self.encoder.train()
        self.head.train()
        self.optimizer.zero_grad()
        for part in range(plan.accumulate):
            indices = stream[step * plan.accumulate + part]
            x, lens = self._last_hidden(indices)
            if plan.specaug:
                x = specaug(x, lens)
            targets = [self.labels.encode(self.prepared.targets[i]) for i in indices]
            loss = self.head.loss(self.head.body(x, lens), lens, targets)
            (loss / plan.accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip)
        if torch.isfinite(norm):
            self.optimizer.step()

    def _outputs(self, store: Store) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
        """Outputs of the frozen CNN: from disk, shared with scoring, if there is room for them."""
        clips, cnn = self.prepared.clips, self.encoder.cnn_fingerprint()
        size = cache.bytes_of(self.encoder, "cnn", self.prepared.seconds)
        if cnn is None or size > FREE_SHARE * free_bytes(store.root):
            return self._convolve
        missing = store.missing(cnn, "cnn", clips)
        cache.extract(self.encoder, missing, ["cnn"], store, name=self.plan.upstream)
        return store.open(cnn, "cnn", clips).batch

    def _convolve(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch, lens = audio.pad([self.prepared.clips[i].load() for i in indices])
        with torch.no_grad():
            x, kept, _ = self.encoder.convolve(batch.to(self.device), lens.to(self.device))
        return x[None], kept

    def _last_hidden(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, T, D] and lens."""
        x, lens = (t.to(self.device) for t in self.outputs(indices))
        return self.encoder.contextual(x[0], lens, lens).layers[-1], lens

    def _evaluate(self, step: int) -> None:
        """Score dev; strictly better weights are kept."""
        self.encoder.eval()
        self.head.eval()
        errors = total = 0.0
        order = sorted(self.split["dev"], key=lambda i: self.prepared.clips[i].seconds)
        with torch.no_grad():
            for first in range(0, len(order), self.plan.batch):
                indices = order[first : first + self.plan.batch]
                x, lens = self._last_hidden(indices)
                for i, ids in zip(indices, self.head.predict(self.head.body(x, lens), lens)):
                    hypothesis = self.labels.decode(ids)
                    count = self.metric.count(self.prepared.targets[i], hypothesis)
                    errors, total = errors + count.errors, total + count.total
        dev = score(self.metric, errors, total)
        if self.metric.improves(dev, self.best):
            self.best = dev
            state = self.encoder.model.state_dict()
            self.weights = {k: v.detach().clone() for k, v in state.items()}
        self.history.append({"step": step, "dev": dev})
        print(f"  step {step}: dev {self.metric.name} {dev:.2f} (best {self.best:.2f})", flush=True)

    def _require_still(self, before: Mapping[str, Tensor], phase: str) -> None:
        now = self.encoder.model.state_dict()
        moved = [k for k, v in before.items() if not torch.equal(now[k], v)]
        if moved:
            raise RuntimeError(f"{phase} changed {moved[0]} and {len(moved) - 1} more tensors")

    def _write(self, seconds: float) -> None:
        moved = movement(self.base, self.weights)
        for module, share in moved.items():
            print(f"  {module:<12} moved {100 * share:7.3f} %" + ("  (frozen)" * (share == 0)))
        record = {
            "key": self.key,
            "recipe": dataclasses.asdict(self.plan),
            "task": self.prepared.recipe.as_dict(),
            "base": self.encoder.source,
            "base_fingerprint": self.start,
            "family": self.encoder.family,
            "metric": self.metric.name,
            "best_dev": self.best,
            "history": self.history,
            "moved": moved,
            "seconds": seconds,
            **provenance(),
        }
        self.encoder.source = str(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "finetune.json", json.dumps(record, indent=1) + "\n")
        write_card(self.folder, record)
        self.encoder.save(self.folder)  # the weights last: they say that the folder is complete
        (self.folder / "state.pt").unlink(missing_ok=True)

    def _save(self, step: int) -> None:
        content = {
            "step": step,
            "encoder": self.encoder.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "weights": self.weights,
            "history": self.history,
        }
        save_state(self.folder / "state.pt", content)

    def _restore(self) -> int:
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        content = torch.load(path, weights_only=True, map_location=self.device)
        self.encoder.model.load_state_dict(content["encoder"])
        self.head.load_state_dict(content["head"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.best, self.weights = content["best"], content["weights"]
        self.history = content["history"]
        return int(content["step"])
