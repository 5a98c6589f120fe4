"""In which order utterances are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from downstream.base import Item


class Stream:
    """Training batches as a pure function of (seed, number), so that a resumed run sees the same.

    An epoch has every utterance once; of one in `windows`, a crop, and in the next epoch the next.
    With `sort` batches are of similar length (no padding waste, as s3prl's sorted buckets). With
    `weigh`, the class of each of `indices`, an epoch is as many draws with replacement in which
    every class is as likely (PyTorch's WeightedRandomSampler, s3prl downstream/speech_commands).
    With `most`, in place of `batch`, a batch takes at most so much, padding included: `bounded`.
    """

    def __init__(
        self,
        indices: Sequence[int],
        lens: Tensor,
        batch: int | None,
        seed: int,
        sort: bool,
        windows: Mapping[int, Sequence[int]] = {},
        weigh: Sequence[str] | None = None,
        most: float | None = None,
    ) -> None:
        sort = sort and weigh is None
        self.indices = sorted(indices, key=lambda i: (-int(lens[i]), i)) if sort else list(indices)
        self.weights = balanced(weigh) if weigh else None
        self.seed, self.sort, self.windows = seed, sort, windows
        if batch is None:
            assert sort and most is not None
            self.groups = bounded([float(lens[i]) for i in self.indices], most)
        else:
            count = len(self.indices)
            self.groups = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, number: int) -> list[int]:
        epoch, position = divmod(number, len(self.groups))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            size = len(self.groups) if self.sort else len(self.indices)
            self.order = (
                torch.randperm(size, generator=generator)
                if self.weights is None
                else torch.multinomial(self.weights, size, True, generator=generator)
            ).tolist()
            self.epoch = epoch
        places = self.groups[self.order[position] if self.sort else position]
        chosen = [self.indices[place if self.sort else self.order[place]] for place in places]
        crops = [self.windows.get(i, [i]) for i in chosen]
        return [crop[(self.seed + epoch) % len(crop)] for crop in crops]


def bounded(lens: Sequence[float], most: float) -> list[range]:
    """Places in `lens`, longest first: batches of at most `most` with padding, or of one."""
    groups, first = list[range](), 0
    for place in range(1, len(lens)):
        if (place + 1 - first) * lens[first] > most:
            groups.append(range(first, place))
            first = place
    return [*groups, range(first, len(lens))]


def balanced(classes: Sequence[str]) -> Tensor:
    """The weight of each utterance, by which every class is as likely to be drawn."""
    counts = Counter(classes)
    return torch.tensor([1 / counts[each] for each in classes], dtype=torch.float64)


def drawn(items: Sequence[Item], indices: Sequence[int]) -> list[int]:
    """As many of `indices`, with replacement, every class as likely; always the same draw.

    What s3prl downstream/speech_commands selects on: seeded again before each evaluation.
    """
    weights = balanced([items[i].target for i in indices])
    generator = torch.Generator().manual_seed(0)
    order = torch.multinomial(weights, len(indices), True, generator=generator)
    return [indices[place] for place in order.tolist()]
