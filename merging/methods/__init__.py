"""How weights are merged: one typed pure function of tensors per method.

A method takes one parameter tensor of the pre-trained upstream and the same tensor of each
fine-tuned one, all float32 and of one shape, and returns the merged tensor, float32; it changes
none of them. Its keyword-only arguments are the keys that a merge recipe may hold, save the
RESERVED ones, which the engine fills in. A new method is a function and a row below.

`alpha` is in all of them how far to go from the base along the task vector (tuned - base), or along
what the method makes of several: 0 is the base, 1 with one model the tuned one unless the method
says otherwise. The order of the tuned models does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from upstream.common.registry import Registry
from upstream.common.schema import Bound

if TYPE_CHECKING:
    from torch import Tensor

Method = Callable[..., "Tensor"]
Part = Annotated[float, Bound(0, 1, open_low=True)]  # the share of something that is left of it

METHODS: Registry[Method] = Registry("merging method")
for _name, _file, _about in (
    ("linear", "dense", "base + alpha * mean task vector: Speech-FT, WiSE-FT, SA Merge (only)"),
    ("task_arithmetic", "dense", "base + alpha * sum of task vectors"),
    ("soup", "dense", "uniform model soup: the mean of the tuned models"),
    ("slerp", "dense", "along the arc between base and one tuned model, tensor by tensor"),
    ("lines", "dense", "LiNeS: alpha grows linearly with depth, shallow layers stay near the base"),
    ("model_stock", "dense", "Model Stock: the more the task vectors agree, the farther"),
    ("low_rank", "spectral", "linear along the task vector's best low-rank approximation"),
    ("tsv_m", "spectral", "TSV-M: each model's largest singular directions, made orthogonal"),
    ("iso_c", "spectral", "Iso-C: the sum of task vectors with all its singular values equal"),
    ("ties", "sparse", "TIES: trim to the largest values, elect a sign, average what agrees"),
    ("dare", "sparse", "DARE: drop task-vector values at random and rescale the rest"),
    ("breadcrumbs", "sparse", "Model Breadcrumbs: leave out the largest and the smallest values"),
    ("della", "sparse", "DELLA: DARE that drops small values more often, then elects a sign"),
    ("fisher", "fitted", "mean weighted by each model's Fisher information"),
    ("regmean", "fitted", "RegMean: the linear layer whose outputs are nearest to all models'"),
    ("lot", "fitted", "LOT Merging: the task vector whose outputs drift least from all models'"),
):
    METHODS.add(_name, f"merging.methods.{_file}:{_name}", _about)

# Arguments that are no keys of a recipe. `rng` is seeded from the recipe's `seed` and the tensor's
# name; `stats` holds one statistic for each of [base, *tuned], or nothing where none was gathered.
RESERVED = ("base", "tuned", "place", "depth", "rng", "stats")
ELEMENTWISE = ("linear", "task_arithmetic", "soup")  # a value depends on no other of its tensor
STATISTICS: dict[str, Literal["fisher", "gram"]] = {
    "fisher": "fisher", "regmean": "gram", "lot": "gram",
}  # fmt: skip
