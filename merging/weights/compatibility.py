"""Whether models belong together: the same tensors, and weights that grew from the same base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from upstream.checkpoints.tensor_names import needless, place_of, slots
from upstream.common import disk
from upstream.common.errors import UserError

Weights = Mapping[str, Tensor]

SAMPLED = 8  # matrices that the cosine is taken over: 5 million weights of a Base
UNRELATED = 0.1  # cosines of independently trained encoders are near 0, of fine-tuned ones near 1


def spare_names(weights: Weights) -> set[str]:
    """The names of tensors that no forward needs: pre-training's, heads."""
    names = list(weights)
    inside = {slot.name for name, slot in slots(names, "merge").items() if needless(name)}
    return inside | {name for name in names if needless(name)}


def require_names(base: Weights, tuned: Weights, which: str) -> set[str]:
    """The names of the base that `tuned` lacks: no forward needs them.

    Raises UserError with the first differences unless all other names are the same in both.
    """
    ours, theirs = set(base), set(tuned)  # lazy mappings may read a tensor to say if they have it
    if ours == theirs:
        return set()
    spare = spare_names(base) | spare_names(tuned)
    if ours - spare != theirs - spare:
        raise UserError(_refusal(base, tuned, which, spare))
    return ours - theirs


def require_alike(base: Tensor, tuned: Tensor, models: tuple[Weights, Weights], which: str) -> None:
    """The same for one tensor's shape and kind of number; `models`: to find the other faults."""
    if base.shape != tuned.shape or base.is_floating_point() != tuned.is_floating_point():
        raise UserError(_refusal(*models, which))


def _refusal(
    base: Weights, tuned: Weights, which: str, spare: Collection[str] = frozenset()
) -> str:
    faults = [f"{k} is missing" for k in base if k not in tuned and k not in spare]
    faults += [f"{k} is not in the base" for k in tuned if k not in base and k not in spare]
    for name in (name for name in base if name not in spare):
        if name in tuned and len(faults) <= 3:  # tensors are read only until there is enough to say
            due, tensor = base[name], tuned[name]
            if due.shape != tensor.shape:
                faults.append(f"{name} is {tuple(tensor.shape)}, not {tuple(due.shape)}")
            elif due.is_floating_point() != tensor.is_floating_point():
                kinds = (str(t.dtype).removeprefix("torch.") for t in (tensor, due))
                faults.append("{} is {}, not {}".format(name, *kinds))
    more = " and more" if len(faults) > 3 else ""
    remedy = "merge it with the checkpoint that it was fine-tuned from"
    return f"{which} does not match the base: {'; '.join(faults[:3])}{more}; {remedy}"


def recorded_base(tuned: Path) -> str | None:
    """The fingerprint of the base that a fine-tuned or merged folder says it was made from."""
    folder = tuned if tuned.is_dir() else tuned.parent
    for name in ("finetune.json", "merge.json"):
        path = folder / name
        if path.is_file():
            try:
                fingerprint = disk.read_record(path).get("base_fingerprint")
            except disk.Unreadable:
                raise
            except UserError as error:
                raise UserError(f"{path}: not a record of this project ({error})") from error
            return None if fingerprint is None else str(fingerprint)
    return None


def cosine(base: Weights, tuned: Weights) -> float:
    """Cosine similarity over a few of the transformer's weight matrices.

    1 for a copy, above 0.9 for a light fine-tuning, 0 +- 0.001 for another initialisation of a
    Base; NaN if there is no matrix. Biases and scales, alike in all models, say nothing.
    """
    names = [n for n in base if n.endswith("weight") and place_of(n).part in ("attention", "ffn")]
    names = names[:: max(1, len(names) // SAMPLED)]

    total = torch.zeros(3, dtype=torch.float64)
    for b, t in ((base[name].float().flatten(), tuned[name].float().flatten()) for name in names):
        total += torch.stack([b @ t, b @ b, t @ t])
    return float(total[0] / total[1:].prod().sqrt())


def require_origin(
    base: Weights, tuned: Weights, which: str, recorded: str | None, present: str | None
) -> None:
    """UserError unless a tuned model grew from the base, which is what gives a merge its sense.

    `recorded` is the fingerprint of the base it was made from, `present` that of this base; where
    either is not known, the cosine of the weights must tell.
    """
    remedy = "; merge it with its own base, or write origin: unchecked in the recipe"
    if recorded and present:
        if recorded != present:
            raise UserError(f"{which} was made from base {recorded}, not from {present}{remedy}")
        return
    if (alike := cosine(base, tuned)) < UNRELATED:
        raise UserError(
            f"{which} is no fine-tuned form of the base: the cosine of their weights is {alike:.3f}"
            f" (a fine-tuned one's is above 0.9){remedy}"
        )
