"""The featurizer's layer weights, which are kept with the trained heads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from downstream.report.groups import Labels, grouped, name, version
from downstream.report.results import Result
from upstream.common import disk

MOST = 1000  # hidden states


class LayerWeights(NamedTuple):
    """The shares of an upstream's hidden states in the features of a task's heads."""

    upstream: str
    task: str
    heads: int  # seeds and folds
    shares: list[tuple[float, float, float]]  # mean, smallest, largest; each sums to 1 in a head


def layer_weights(results: Iterable[Result], called: Labels) -> list[LayerWeights]:
    """Of upstreams with several hidden states; heads that cannot be read are left out."""
    found = []
    for (upstream, task), mine in grouped(results, lambda r: (name(r), version(r))).items():
        heads = [shares for result in mine for shares in _shares(result)]
        heads = [shares for shares in heads if len(shares) == len(heads[0])]
        if not heads or len(heads[0]) < 2:
            continue
        each = np.stack(heads)
        rows = zip(each.mean(0).tolist(), each.min(0).tolist(), each.max(0).tolist())
        found.append(LayerWeights(called[upstream], called[task], len(heads), list(rows)))
    return found


def _shares(result: Result) -> Iterable[np.ndarray]:
    """[L] of each head of a cell."""
    for path in sorted(result.folder.glob("head*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError, TypeError):
            disk.require_file(path)
            with safe_open(path, "numpy") as kept:
                weights = np.asarray(kept.get_tensor("layer_weights"), dtype=np.float64)
            powers = np.exp(weights - weights.max())
            if weights.ndim == 1 and len(weights) <= MOST and np.isfinite(powers).all():
                yield powers / powers.sum()
