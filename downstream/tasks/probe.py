"""Any one label per utterance without a trained head: seconds, no seeds, no learning rates.

A second opinion on every classification task, from the same time means (`closed_form.py`): `KNN`
asks the nearest training utterances, `TASK` is a linear classifier. Layer and setting are those of
the best dev score. Features are read layer by layer: of VoxCeleb1's 138,361 means one layer of 768
takes 0.4 GB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from downstream.base import Calibration, Item, Labels, Part, Task
from downstream.tasks.closed_form import Guess, discriminants, neighbours
from downstream.tasks.sid import labels
from upstream.common.progress import progress

# Means [L, D] of utterances -> of each setting the classes said of them.
Said: TypeAlias = Callable[[Sequence[Tensor]], dict[float, list[list[int]]]]
BLOCK = 512  # vectors compared with all training vectors at once


@dataclass(frozen=True)
class Probe(Task):
    """A classifier fitted to the means of one layer, each dimension normalised on train."""

    fit: Callable[[Tensor, Tensor, int], Guess] = discriminants
    setting: str = "shrinkage"  # what `fit` gives several of

    def calibrate(self, part: Callable[[str], Part], labels: Labels) -> Calibration:
        """Fit every layer on train; of its settings, and of all layers, the best on dev.

        chosen: the layer, the setting, and the best dev score of every layer.
        """
        train, dev = part("train"), part("dev")
        layers, best, calibration = list[float](), float("nan"), Calibration()
        for layer in progress(range(len(train.outputs[0])), "layers"):
            said = self._fitted(train, layer, labels)
            found = {
                setting: self.score(self.records(dev.items, outputs, labels))[self.metrics[0]]
                for setting, outputs in said(dev.outputs).items()
            }
            sign = 1 if self.metric.better == "higher" else -1
            setting = max(found, key=lambda each: sign * found[each])
            layers.append(round(found[setting], 4))
            if self.metric.improves(found[setting], best):
                best, chosen = found[setting], {"layer": layer, self.setting: setting}
                use = functools.partial(_use, said, setting)
                calibration = Calibration({**chosen, "dev": layers}, use)
        return calibration

    def _fitted(self, train: Part, layer: int, labels: Labels) -> Said:
        x = _layer(train.outputs, layer)
        y = torch.tensor([labels.encode(item.target)[0] for item in train.items], device=x.device)
        mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-9)
        guess = self.fit((x - mean) / deviation, y, labels.size)

        def said(outputs: Sequence[Tensor]) -> dict[float, list[list[int]]]:
            blocks = [guess((v - mean) / deviation) for v in _layer(outputs, layer).split(BLOCK)]
            return {s: torch.cat([b[s] for b in blocks])[:, None].tolist() for s in blocks[0]}

        return said


def _use(said: Said, setting: float, _items: Sequence[Item], outputs: Sequence[Tensor]) -> Any:
    return said(outputs)[setting]


def _layer(outputs: Sequence[Tensor], layer: int) -> Tensor:
    """[N, D] of means [L, D], read one by one."""
    return torch.stack([each[layer] for each in outputs])


TASK = Probe("probe", "mean", None, ("accuracy",), labels)
KNN = replace(TASK, name="knn", fit=neighbours, setting="k")
