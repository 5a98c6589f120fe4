"""QbE as SUPERB does it: which documents a spoken query is in; nothing is trained, MTWV.

Source: s3prl downstream/quesst14_dtw. Every query of a split (an item with trials) is searched for
in every document of it (one without), on the hidden states of the layer that is best on dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from downstream.base import AND, Calibration, Item, Labels, Metric, Part, Record, Task, Trial
from downstream.tasks import trials
from downstream.tasks.search import search


class Search(Task):
    """What `search` finds is what records are made of."""

    def admits(self, metric: Metric) -> bool:
        return metric.count is None

    def check(self, items: Sequence[Item]) -> None:
        trials.require(items, documents=True)

    def calibrate(self, part: Any, labels: Labels) -> Calibration:
        """The layer of the best dev score; `chosen` also has the dev score of every layer."""
        dev: Part = part("dev")
        scores, best, chosen = [], float("nan"), 0
        for layer, found in enumerate(search(*dev)):
            scores.append(self.score(self.records(dev.items, found, labels))[self.metrics[0]])
            if self.metric.improves(scores[-1], best):
                best, chosen = scores[-1], layer
        return Calibration(
            {"layer": chosen, self.metrics[0]: [round(score, 4) for score in scores]},
            lambda items, outputs: next(search(items, outputs, chosen)),
        )

    def records(
        self, items: Sequence[Item], outputs: Sequence[dict[str, float]], labels: Labels
    ) -> list[Record]:
        """A Trial per query and document, of their speakers; of a document's where it is named:
        QUESST 2014 names none, the cluster is the query there, what TWV averages over."""
        named = {item.id: item.speaker for item in items if item.speaker != item.id}
        found: list[Record] = []
        for item, scores in zip(items, outputs, strict=True):
            true = {other for label, other in trials.read(item.target) or () if label}
            for name, score in scores.items():
                who = AND.join(sorted({item.speaker, named.get(name, item.speaker)}))
                said = Trial(f"{item.id} {name}", item.id, name, score, int(name in true), who)
                found.append(said._replace(group=item.group))
        return found


def labels(_tokens: str, _targets: Sequence[str]) -> Labels:
    """None: there are no classes."""
    return Labels((), split=lambda target: [])


TASK = Search("qbe", "frames", None, ("mtwv",), labels, needs=("dev", "test"))
