"""Cells of one upstream that train on the same blocks of audio: a pass an epoch feeds them all."""

from __future__ import annotations

from collections.abc import Sequence

from downstream.report.results import Score
from downstream.run import cell as cells
from downstream.run.prepare import Prepared
from downstream.run.schedule import CellJob, RunOptions
from downstream.run.window import Block
from upstream.base import Upstream
from upstream.common.errors import UserError
from upstream.features.extract import bytes_of
from upstream.features.provide import provide
from upstream.features.window import Window, free_memory

ROOM = 0.8  # of the free memory: heads and the encoder's batches need some
Member = tuple[CellJob, Prepared]


def compute(
    members: Sequence[Member], upstream: Upstream, options: RunOptions
) -> list[Score | Exception]:
    """The score of each cell, or its error, which leaves the others alone.

    The members share their blocks (`Prepared.sharing`). Frames of a block are computed once, and
    are in memory while every cell that is as far trains on them; one that is further waits.
    Raises UserError where a block does not fit in memory or its audio cannot be read.
    """
    if not members:
        return []
    window = _window(members[0][1], upstream, options)
    store, batch_seconds = options.store, options.batch_seconds
    steps = [
        cells.running(
            job.identity,
            task,
            job.seed,
            provide(upstream, task.clips, task.kind, store, where="recompute"),
            options.results,
            options.device,
            job.seen,
            window,
        )
        for job, task in members
    ]
    waiting: dict[int, Block] = {}
    ended: dict[int, Score | Exception] = {}

    def advance(place: int) -> None:
        try:
            waiting[place] = next(steps[place])
        except StopIteration as end:
            ended[place] = end.value
        except Exception as error:
            ended[place] = error
        if place in ended:
            waiting.pop(place, None)

    for place in range(len(steps)):
        advance(place)
    while waiting:
        block = min(waiting.values(), key=lambda block: block.number)
        window.fill(block.clips, batch_seconds)
        for place in [place for place, own in waiting.items() if own.number == block.number]:
            advance(place)
    return [ended[place] for place in range(len(steps))]


def _window(task: Prepared, upstream: Upstream, options: RunOptions) -> Window:
    blocks, minutes = task.blocks, task.recipe.window
    assert blocks and minutes
    need = bytes_of(upstream, task.kind, blocks.most)
    room = ROOM * free_memory(options.device)
    if need > room:
        raise UserError(
            f"{task.recipe.path}: train: window: frames of {minutes:g} minutes take "
            f"{need / 1e9:.2f} GB of memory, of which {room / 1e9:.2f} GB are free; a window of "
            f"{minutes * room / need:.2g} fits, with scores of its own"
        )
    (split,) = task.splits.values()
    return Window(upstream, task.audio(split["train"]), task.kind, options.store)
