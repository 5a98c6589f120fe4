"""A merge on disk: weights, heard.txt, the card and, last, merge.json."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import upstream
from downstream.report.results import finite, provenance
from merging.card import effective_text, write_card
from merging.choose import Choice
from merging.cost import begin_peak, cost, peak_bytes
from merging.methods import STATISTICS
from merging.recipe import MergeRecipe, command, made
from merging.tuning.recipe import checkpoint
from merging.weights.calibration import calibrated
from merging.weights.compatibility import recorded_base, require_origin
from merging.weights.engine import Report, ahead, merge_tensors
from merging.weights.rule import Weights
from upstream.base import Digest, Upstream, fingerprint
from upstream.checkpoints import HEARD
from upstream.checkpoints import containers as container
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints import write as export
from upstream.checkpoints.tensor_names import without_pretraining
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.text import portable
from upstream.encoder.encoder import Encoder
from upstream.encoder.export import export as export_encoder
from upstream.encoder.export import require_fingerprint
from upstream.resolve import parse

RECORD = "merge.json"  # a folder that has it is finished


class Merge(NamedTuple):
    """A merge with nothing left open: its models are loaded, its alpha and members are known."""

    plan: MergeRecipe
    recipe: Path  # where the plan comes from; calibration tasks lie beside it
    results: Path
    base: Encoder
    tuned: list[Encoder]
    choice: Choice | None = None

    @property
    def models(self) -> list[Encoder]:
        return [self.base, *self.tuned]

    def fingerprints(self) -> list[str]:
        """Of base and tuned models; hashing them side by side takes as long as one of them."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(Encoder.fingerprint, self.models))

    def weights(self, report: Report) -> Iterator[tuple[str, Tensor]]:
        """The merged weights, sorted by name. Raises UserError for models that do not match."""
        plan, stats = self.plan, None
        _require_related(self.base, self.tuned, plan)
        if (kind := STATISTICS.get(plan.method)) and plan.calibrate:
            folders = (self.recipe.parent, self.results)
            stats = calibrated(kind, self.models, plan.calibrate, *folders)
        base, *tuned = (encoder.model.state_dict() for encoder in self.models)
        base = dict(sorted(base.items()))  # in the order in which they are hashed
        return merge_tensors(base, tuned, plan.method, plan.params, plan.options, stats, report)


class Written(NamedTuple):
    """What a merge wrote down about itself."""

    record: dict[str, Any]

    def lines(self) -> list[str]:
        """To print: the effective alpha per module and what else was measured."""
        effective = self.record["effective_alpha"].items()  # NaN: there was no way to go
        rows = [
            f"  {module:<12} {'' if alpha != alpha else 'effective alpha '}{effective_text(alpha)}"
            for module, alpha in effective
        ]
        if (moved := self.record["pos_conv_difference"]) is not None:
            rows.append(f"  kernel of pos_conv: factors or kernel, {100 * moved:.3g} % apart")
        if (count := self.record["slerp_fallbacks"]) is not None:
            rows.append(f"  slerp was linear in {count} of {self.record['tensors']} tensors")
        return rows


def write_merge(merge: Merge, output: Path, form: str = "hf") -> Written:
    """Merge encoders into an `hf` folder, or a `model.pt` of `s3prl` or `fairseq`. UserError."""
    base, report, begun = merge.base, Report(), time.monotonic()
    begin_peak()
    file = "" if form == "hf" else "model.pt"
    _begin(output)
    with ThreadPoolExecutor(1) as pool:  # digests do not wait for merging, nor merging for them
        digests = pool.submit(merge.fingerprints)
        stream = ahead(merge.weights(report))
        digest = Digest(base.identity())
        if form == "hf":
            export.to_folder(base, output, _hashed(stream, digest))
            state: Weights = files.load(output / export.WEIGHTS)[0]
            require_fingerprint(base, digest.text(), output)
        else:
            state = dict(_hashed(stream, digest))
            merged = Encoder(checkpoint(base, state), base.padding, base.precision)
            export_encoder(merged, form, output / file)
        first, *others = digests.result()
    if heard := frozenset().union(*(encoder.heard for encoder in merge.models)):
        disk.write(output / HEARD, "".join(f"{key}\n" for key in sorted(heard)))
    facts = {
        "base": base.source,
        "tuned": [encoder.source for encoder in merge.tuned],
        "family": base.family,
        "file": file,
        "licence": base.licence,
        "base_fingerprint": first,
        "fingerprints": {"base": first, "tuned": others, "merged": digest.text()},
        "choose": dataclasses.asdict(merge.choice) if merge.choice else None,
        **cost(time.monotonic() - begun, peak_bytes(), state),
    }
    return _finish(merge.plan, merge.recipe, output, form, report, facts)


def _hashed(tensors: Iterator[tuple[str, Tensor]], digest: Digest) -> Iterator[tuple[str, Tensor]]:
    """The same, as the fingerprint of an Encoder sees them."""
    for name, tensor in tensors:
        digest.add(f"model.{name}", tensor)
        yield name, tensor


def write_same(plan: MergeRecipe, recipe: Path, tuned: Sequence[str], output: Path) -> Written:
    """Merge files as they are: any architecture, if its tensors have the same names. UserError."""
    names, report, begun = [plan.base, *tuned], Report(), time.monotonic()
    begin_peak()
    states = [without_pretraining(container.open_container(name).state) for name in names]
    for name, state in zip(names, states):
        _require_own_config(Path(name), state)
    base, *others = states
    if plan.origin == "checked":
        for number, other in enumerate(others, 1):
            require_origin(base, other, f"tuned model {number} ({names[number]})", None, None)
    _begin(output)
    rule = (plan.method, plan.params, plan.options)
    weights = dict(merge_tensors(base, others, *rule, report=report))
    source = Path(plan.base)
    container.write(source, weights, output if source.is_dir() else output / source.name)
    with ThreadPoolExecutor() as pool:
        prints = list(pool.map(partial(fingerprint, {}), (*states, weights)))
    facts = {
        "base": plan.base,
        "tuned": names[1:],
        "file": "" if source.is_dir() else source.name,
        "fingerprints": {"base": prints[0], "tuned": prints[1:-1], "merged": prints[-1]},
        **cost(time.monotonic() - begun, peak_bytes(), weights),
    }
    return _finish(plan, recipe, output, "same", report, facts)


def as_encoder(model: Upstream, name: str) -> Encoder:
    """`model` if it has weights to merge. Raises UserError."""
    if not isinstance(model, Encoder):
        raise UserError(f"{name}: has no weights to merge; use a HuBERT, WavLM, ... encoder")
    return model


def _require_related(base: Encoder, tuned: Sequence[Encoder], plan: MergeRecipe) -> None:
    """UserError unless all are of one architecture and, if it is to be checked, of one origin."""
    ours = base.identity()
    names = [other.source if made(name) else name for name, other in zip(plan.tuned, tuned)]
    for number, (name, other) in enumerate(zip(names, tuned), 1):
        if other.identity() != ours:
            raise UserError(f"{name}: is not like {plan.base}: {_unlike(base, other, name)}")
        if plan.origin == "checked":
            # a later model of a sequence may have been fine-tuned from the merge before it
            first = plan.several != "sequential" or number == 1
            recorded = recorded_base(Path(other.source)) if first else None
            own = base.fingerprint() if recorded else None
            weights = (base.model.state_dict(), other.model.state_dict())
            require_origin(*weights, f"tuned model {number} ({name})", recorded, own)


OPTIONS = ("family", "normalize", "padding", "precision")  # of an upstream's name, and its identity


def _unlike(base: Encoder, other: Encoder, name: str) -> str:
    """What sets a tuned model apart from the base, and the way out: an option, or another model."""
    ours, theirs = ({"precision": "float32"} | model.identity() for model in (base, other))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    faults = [f"{key} {_typed(theirs.get(key))}, not {_typed(ours.get(key))}" for key in keys[:3]]
    options = [key for key in OPTIONS if key in keys]
    remedy = "merge it with the checkpoint that it was fine-tuned from"
    if set(keys) <= set(OPTIONS):
        bare, settings = parse(name)
        settings |= {key: _typed(ours[key]) for key in options}
        spelt = bare + "".join(f":{key}={value}" for key, value in settings.items())
        remedy = f"if that is no difference in what they were trained on, write {spelt}"
    return f"{'; '.join(faults)}; {remedy}"


def _typed(value: Any) -> str:
    """A value as one types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_own_config(folder: Path, state: Weights) -> None:
    """UserError if the config.json that would travel with a folder's weights is not theirs."""
    if (folder / "config.json").exists():
        container.read_json(folder / "config.json")
        if any(name.startswith("feature_extractor.") for name in state):  # it hears waveforms
            upstream.load(str(folder))


def _begin(output: Path) -> None:
    """An older record must not vouch for new weights, nor an older list of audio be theirs."""
    disk.make_folder(output)
    for name in (RECORD, HEARD):
        disk.remove_file(output / name)


def _finish(
    plan: MergeRecipe, recipe: Path, output: Path, form: str, report: Report, facts: dict[str, Any]
) -> Written:
    record = {
        "recipe": dataclasses.asdict(plan),
        "command": command(plan, recipe, output, form),
        "method": plan.method,
        "params": plan.params,
        **facts,
        **report.record(),
        **provenance(),
    }
    results = output.absolute().parents[1] if output.parent.name == "upstreams" else None
    sources = [beside(source, output) for source in record["tuned"]]
    kept = portable({**record, "tuned": sources}, results)
    write_card(output, kept)
    disk.write(output / RECORD, json.dumps(finite(kept), indent=1) + "\n")
    return Written(record)


def beside(source: str, output: Path) -> str:
    """An absolute path near `output`, as `../tuned`: where its record is looked for."""
    near = os.path.relpath(source, output) if os.path.isabs(source) else source
    return near if near.count("..") <= 2 and os.path.exists(source) else source
