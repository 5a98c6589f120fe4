"""Checkpoint containers: what holds the weights, read as tensors under canonical names and written
back with other weights and everything else as it was.

Needs no architecture: a model that is no `Encoder` here (DeCoAR 2.0, which hears filter banks) can
be read, merged and put back for s3prl to run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upstream.checkpoints import foreign
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints.tensor_names import MARKERS, Slot, State, fold, gain_of, slots
from upstream.common import disk
from upstream.common.errors import UserError

WEIGHTS = "model.safetensors"
WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin")  # of an HF folder, the first that is there


class Container(NamedTuple):
    """An opened file or folder. Its tensors are mapped: none is read before it is used."""

    path: Path
    tensors: State  # under their stored names, in their stored dtype
    slots: dict[str, Slot]  # canonical name -> stored name; other models' names stay their own
    settings: dict[str, Any]  # of the architecture, flat; fairseq's and s3prl's names
    clue: str  # what the file says of its architecture besides; no names of tensors

    @property
    def state(self) -> State:
        """The tensors under canonical names, pre-training heads included."""
        return {name: slot.take(self.tensors) for name, slot in self.slots.items()}


def open_container(path: str | Path) -> Container:
    """Open a checkpoint file or an HF folder. Runs no code of it.

    Files: of s3prl (converted, or the `Upstream` of a run), fairseq, WavLM, DeCoAR 2.0, Lightning
    (SPIN), torchaudio, transformers, and bare state dicts, as torch's format or as safetensors,
    also where they lie below other entries (`model_state_dict`) or are wrapped (torch.compile,
    DataParallel). Raises UserError for whatever is damaged, dangerous, quantised, an adapter, a
    shard of a training run or of another library, or holds no weights.
    """
    path = Path(path)
    tensors: State = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        foreign.require_known(file)
        content, _ = files.load(file)
        with files.guarded(file, "its entries are not what their names say"):
            weights, settings, clue = _find(content, file)
            shard = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
        for name in shard:
            if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 500:
                raise UserError(f"{file}: {str(name)[:40]!r} is no name of a tensor")
        foreign.require_plain_weights(shard, file)
        for name, tensor in shard.items():
            strided = tensor.dtype in files.DTYPES and tensor.layout == torch.strided
            if not strided or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise UserError(f"{file}: {name} is not a plain tensor that the file holds in full")
            if name in tensors:
                raise UserError(f"{file}: {name} is in another shard as well")
        tensors |= shard
    return Container(path, tensors, slots(tensors, str(path)), settings, clue)


def write(source: str | Path, state: Mapping[str, Tensor], output: str | Path) -> None:
    """Write the container `source` to `output` with the tensors of `state` (canonical names).

    All else is as in `source`: tensors that `state` lacks (a pre-training head), configuration,
    dictionaries, optimizer, stored names; of a folder also its .json and .txt files. A tensor keeps
    its stored dtype if that holds the new values exactly, and becomes float32 if not. Torch's
    format before 1.6 becomes today's. All is read back before this returns. Raises UserError for a
    name or shape that `source` lacks, and for what reads back as something else.
    """
    source, output = Path(source), Path(output)
    changed = _changed(open_container(source), state)
    if source.is_dir():
        for file in sorted(source.iterdir()):
            if file.suffix in (".json", ".txt") and file.is_file():
                disk.write(output / file.name, disk.read(file))
        for file in weight_files(source):
            _write_file(file, changed, output / file.name)
    else:
        _write_file(source, changed, output)
    _require_written(changed, output)


def _require_written(changed: State, output: Path) -> None:
    """Raises UserError unless the container at `output` holds these tensors."""
    stored = open_container(output).tensors
    for name, tensor in changed.items():
        again = stored.get(name)
        if again is None or not _are_same(again, tensor):
            raise UserError(f"{output}: {name} reads back as something else; check the disk")


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit: NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of an HF folder, all shards. Raises UserError if one lacks."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"  # the weights are in shards
        if index.is_file():
            places = plain(read_json(index).get("weight_map")).values()
            shards = sorted({str(name) for name in places})
            if not shards:
                raise UserError(f"{index}: has no weight_map")
            for name in shards:
                if "/" in name or not (folder / name).is_file():
                    raise UserError(f"{index}: names {name!r:.80}, which is not there; copy it")
            return [folder / name for name in shards]
    names = " or ".join(WEIGHT_FILES)
    if shards := sorted(path.name for path in folder.glob("*-of-*")):
        raise UserError(f"{folder}: {shards[0]} is a shard, and there is no index; copy that too")
    fault = foreign.explain_folder(folder)
    raise UserError(f"{folder}: {fault or f'no {names} beside a config.json in it'}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: not there; a model folder holds config.json and weights")
    with files.guarded(path, "not JSON, or not an object"):
        return dict(json.loads(disk.read(path, disk.RECORD_BYTES)).items())


def plain(value: Any) -> dict[str, Any]:
    """The entries of a dict or Namespace; none of anything else."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _find(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A file's content -> (its dict of weights, flat settings, hints at the architecture)."""
    settings: dict[str, Any] = {}
    weights: Any = content
    clues: list[Any] = []
    if "model_weight" in content:  # s3prl-converted
        weights = content["model_weight"]
        settings = {**plain(content.get("task_cfg")), **plain(content.get("model_cfg"))}
    elif "Upstream" in content:  # a run of s3prl's run_downstream.py: holds no architecture
        weights = content["Upstream"]
        clues.append(plain(content.get("Args")).get("upstream"))
    elif "state_dict" in content:  # Lightning
        weights = content["state_dict"]
        clues.append(str(content.get("hyper_parameters")).lower())
    elif isinstance(content.get("model"), dict):
        # fairseq (nested cfg, or flat args), WavLM, DeCoAR
        weights = content["model"]
        cfg = plain(content.get("cfg")) or plain(content.get("args"))
        settings = {**cfg, **plain(cfg.get("task")), **plain(cfg.get("model"))}
    if inner := plain(settings.get("w2v_args")):  # fine-tuned with CTC: the encoder's own settings
        settings = {**inner, **plain(inner.get("task")), **plain(inner.get("model"))}
    if not any(isinstance(value, Tensor) for value in plain(weights).values()):
        weights = _inside(content, path)
    if weights is not content:
        clues += content
    clues += [settings.get("_name"), settings.get("arch")]
    return weights, settings, " ".join(str(clue) for clue in clues)


ENCODER = re.compile("|".join(MARKERS))  # in a tensor's name


def _inside(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The one dict of weights that some entry of a file holds. Raises UserError."""
    places = foreign.encoders_in(content, ENCODER)
    if len(places) > 1:
        listed = ", ".join(map(repr, list(places)[:4]))
        raise UserError(f"{path}: holds several encoders (entries {listed:.200}); save one alone")
    if not places:
        listed = ", ".join(repr(name)[:40] for name in list(content)[:6])
        raise UserError(f"{path}: no weights in it; its entries are {listed}")
    return next(iter(places.values()))


def _changed(container: Container, state: Mapping[str, Tensor]) -> State:
    """Stored names -> new tensors, in the dtype to store."""
    path, tensors, slots = container.path, container.tensors, container.slots
    for name, tensor in state.items():
        if name not in slots:
            raise UserError(f"{path}: has no tensor {name} to replace")
        old, new = slots[name].take(tensors).shape, tensor.shape
        if old != new:
            raise UserError(f"{path}: {name} is {tuple(old)}, not {tuple(new)}")
    parts: dict[str, list[str]] = {}  # stored name -> the canonical tensors it is made of
    for name, slot in slots.items():
        parts.setdefault(slot.name, []).append(name)
    changed: State = {}
    for stored, names in parts.items():
        if state.keys() & names:
            members = [state.get(name, slots[name].take(tensors)).detach().cpu() for name in names]
            whole = _joined(members, slots[names[0]], tensors[stored])
            cast = whole.to(tensors[stored].dtype)
            exact = cast is whole or torch.equal(cast.to(whole.dtype), whole)
            changed[stored] = cast if exact else whole.float()
    return changed


def _joined(tensors: list[Tensor], slot: Slot, stored: Tensor) -> Tensor:
    """The stored tensor that several canonical ones, the first of which is `slot`, are parts of."""
    if not slot.factor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    gain, direction = tensors
    same = torch.equal(direction.float(), stored.float()) and torch.equal(gain, gain_of(stored))
    return stored if same else fold(gain, direction)


def _write_file(source: Path, changed: State, output: Path) -> None:
    content, metadata = files.load(source)
    weights = _find(content, source)[0]
    for name in weights.keys() & changed.keys():
        tensor, old = changed[name], weights[name]
        if isinstance(old, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        weights[name] = tensor
    if source.suffix == ".safetensors":
        return files.save_tensors(weights, output, metadata)
    return files.save_torch(content, output)
