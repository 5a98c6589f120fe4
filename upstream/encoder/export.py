"""Encoders written in another format and read back before that counts as done."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from upstream.checkpoints.tensor_names import MASK
from upstream.checkpoints.write import WEIGHTS, as_checkpoint, held_as, write
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.common.notice import notice
from upstream.encoder.encoder import FIELDS, Encoder, load

NEAR = 1e-4  # of hidden states, relative to the largest, where the same function is written anew


def export(encoder: Encoder, form: str, output: Path) -> Path:
    """Write an encoder as an `hf` folder or a file of `s3prl` or `fairseq`, and read it back.

    A file appears only once it is found to be the same encoder; a folder that is not loses its
    weights again. Raises UserError for what the format cannot hold.
    """
    source = as_checkpoint(encoder)
    held = held_as(source, form)
    if held is not source:
        notice(
            f"{encoder.source}: as CNN and model are equally wide, for which {form} has no "
            "projection, its last convolution is written twice over and the projection halved: "
            "the same function under another fingerprint"
        )
    expected = Encoder(held, encoder.padding, encoder.precision)
    if form == "hf":
        write(held, form, output)
        require_same(expected, output)
    else:
        with disk.writing(output), disk.whole(output) as part:
            write(held, form, part)
            require_same(expected, part, output)
            if held is not source:
                _require_near(_states(Encoder(source, encoder.padding)), _states(load(part)))
    return output


def require_same(expected: Encoder, path: Path, name: Path | None = None) -> Encoder:
    """What `path` holds, if it is this very encoder.

    Compared are the family, every field of the config, whether waves are normalised, every tensor,
    and the hidden states of a second of noise. `name`: what to call the file. Raises UserError for
    any difference, after the weights of a folder are removed.
    """
    again = _loaded(expected, path, name)
    faults = _facts(expected, again)
    ours, theirs = (dict(model.model.state_dict()) for model in (expected, again))
    if MASK not in ours:
        theirs.pop(MASK, None)  # fairseq's classes hold one, which is zero then
    faults += [f"{key} is missing" for key in ours.keys() - theirs.keys()]
    faults += [f"{key} is new" for key in theirs.keys() - ours.keys()]
    faults += [
        f"{key} has other values"
        for key in sorted(ours.keys() & theirs.keys())
        if not torch.equal(ours[key].float().cpu(), theirs[key])
    ]
    if not faults and not torch.equal(_states(expected.cpu()), _states(again)):
        faults = ["its hidden states are others"]
    if faults:
        _refuse(faults, path, name)
    return again


def require_fingerprint(expected: Encoder, fingerprint: str, folder: Path) -> None:
    """`require_same` for tensors that were hashed on their way to the folder: no second reading.

    `expected` has the same config; the fingerprint is over names and values of all tensors. Raises
    UserError for any difference, after the weights are removed.
    """
    again = _loaded(expected, folder, None)
    if faults := _facts(expected, again):
        _refuse(faults, folder, None)
    found = again.fingerprint()
    if found != fingerprint:  # what is on disk is not what was handed to it
        disk.remove_file(folder / WEIGHTS)
        raise UserError(f"{folder}: reads back as {found}, not {fingerprint}; check the disk")


def _loaded(expected: Encoder, path: Path, name: Path | None) -> Encoder:
    options: Any = {"padding": expected.padding, "precision": expected.precision}
    return load(path, name=str(name or path), **options)


def _refuse(faults: list[str], path: Path, name: Path | None) -> NoReturn:
    """Remove the weights of a folder and raise UserError."""
    if path.is_dir():
        disk.remove_file(path / WEIGHTS)
    listed = "; ".join(faults[:3])
    raise UserError(
        f"{name or path}: what was written reads back as another model ({listed}) and was "
        "removed; choose an empty place or another format"
    )


def _facts(first: Encoder, second: Encoder) -> list[str]:
    """What of family, config and normalisation differs, and how."""
    pairs: list[tuple[str, object, object]] = [
        (key, getattr(first.config, key), getattr(second.config, key))
        for key in FIELDS
        if key != "given"
    ]
    pairs += [(key, getattr(first, key), getattr(second, key)) for key in ("family", "normalize")]
    return [f"{key} is {theirs}, not {ours}" for key, ours, theirs in pairs if ours != theirs]


def _states(encoder: Encoder) -> Tensor:
    """Hidden states [L, 1, T, D] of a second of noise."""
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(1, 16_000, generator=generator)
    training = encoder.training
    with torch.inference_mode():
        layers = encoder.eval()(wave, torch.tensor([16_000])).layers
    encoder.train(training)
    return layers


def _require_near(first: Tensor, second: Tensor) -> None:
    gap, size = (first - second).abs().max(), first.abs().max()
    if not gap <= NEAR * size:
        raise UserError(f"the file's hidden states are {float(gap / size):.1e} apart; use hf")
