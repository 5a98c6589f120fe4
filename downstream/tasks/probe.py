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
from typing import Any

from downstream.base import Calibration, Item, Labels, Part, Task
from downstream.tasks.closed_form import Fit, Said, discriminants, fitted, neighbours
from downstream.tasks.sid import labels
from upstream.common.progress import progress


@dataclass(frozen=True)
class Probe(Task):
    """A classifier fitted to the means of one layer, each dimension normalised on train."""

    fit: Fit = discriminants
    setting: str = "shrinkage"  # what `fit` gives several of

    def calibrate(self, part: Callable[[str], Part], labels: Labels) -> Calibration:
        """Fit every layer on train; of its settings, and of all layers, the best on dev.

        chosen: the layer, the setting, and the best dev score of every layer.
        """
        train, dev = part("train"), part("dev")
        layers, best, calibration = list[float](), float("nan"), Calibration()
        for layer in progress(range(len(train.outputs[0])), "layers"):
            y = [labels.encode(item.target)[0] for item in train.items]
            said = fitted(self.fit, train.outputs, layer, y, labels.size)
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


def _use(said: Said, setting: float, _items: Sequence[Item], outputs: Sequence[Any]) -> Any:
    return said(outputs)[setting]


TASK = Probe("probe", "mean", None, ("accuracy",), labels)
KNN = replace(TASK, name="knn", fit=neighbours, setting="k")
