"""Training batches out of blocks of audio, which all heads of an upstream hear in one order.

Where frames do not fit on disk, a pass over the training audio feeds every head only if all want
the same audio at the same time: seeds and tasks differ within a block, and share the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from upstream.features.clips import Clip


class Block(NamedTuple):
    """What a head is about to train on. number: since the first epoch."""

    number: int
    clips: list[Clip]


class Blocks:
    """Training utterances dealt, anew in each epoch, to blocks of about `minutes` of audio.

    They are sorted by length, and dealt like cards: as many as there are blocks at a time, one to
    each, in an order that follows from the epoch alone. So blocks are alike: none is longer than
    their mean and the longest utterance together. Of an utterance in `windows` an epoch has one
    crop, the next epoch the next. Tasks with the same training audio have the same blocks.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        indices: Sequence[int],
        minutes: float,
        windows: Mapping[int, Sequence[int]] = {},
    ) -> None:
        self.clips = clips
        crops = [list(windows.get(i, [i])) for i in indices]
        by_length = lambda own: (-clips[own[0]].seconds, [clips[i].key for i in own])  # noqa: E731
        self.crops = sorted(crops, key=by_length)
        self.seconds = sum(clips[own[0]].seconds for own in crops)  # of an epoch
        self.count = min(len(crops), max(1, math.ceil(self.seconds / (60 * minutes))))
        self.most = self.seconds / self.count + clips[self.crops[0][0]].seconds  # of a block
        self.epoch, self.dealt = -1, list[list[int]]()

    def size(self, number: int) -> int:
        """Utterances of a block."""
        least, more = divmod(len(self.crops), self.count)
        return least + (number % self.count < more)

    def __getitem__(self, number: int) -> list[int]:
        """The utterances (or their crops) of a block, longest first."""
        epoch, place = divmod(number, self.count)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(epoch)
            self.epoch, self.dealt = epoch, [[] for _ in range(self.count)]
            for first in range(0, len(self.crops), self.count):
                round_ = self.crops[first : first + self.count]
                order = torch.randperm(len(round_), generator=generator).tolist()
                for block, other in zip(self.dealt, order):
                    block.append(round_[other][epoch % len(round_[other])])
        return self.dealt[place]

    def block(self, number: int) -> Block:
        """The same for whoever provides the audio."""
        return Block(number, [self.clips[i] for i in self[number]])

    @property
    def keys(self) -> list[str]:
        """Of all audio: who has the same keys, and as many blocks, has the same blocks."""
        return [self.clips[i].key for own in self.crops for i in own]


class Dealt:
    """Batches of a head as a pure function of (seed, number): the blocks in turn.

    A block is cut by length into batches of equal size, as near to `batch` as can be, in an order
    of the seed's own.
    """

    def __init__(self, blocks: Blocks, batch: int, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        cuts = [max(1, round(blocks.size(k) / batch)) for k in range(blocks.count)]
        self.places = [(block, part) for block, parts in enumerate(cuts) for part in range(parts)]
        self.cuts = cuts

    def block(self, number: int) -> int:
        """The block that a batch is out of."""
        epoch, place = divmod(number, len(self.places))
        return epoch * self.blocks.count + self.places[place][0]

    def __getitem__(self, number: int) -> list[int]:
        block = self.block(number)
        part = self.places[number % len(self.places)][1]
        parts = self.cuts[block % self.blocks.count]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        part = int(torch.randperm(parts, generator=generator)[part])
        chosen = self.blocks[block]
        return chosen[len(chosen) * part // parts : len(chosen) * (part + 1) // parts]
