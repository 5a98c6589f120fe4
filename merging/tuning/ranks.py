"""Several processes that train one upstream, as torchrun starts them: who does what.

Every process holds all weights and takes the same steps. It computes the gradients of its share of
an update; these are summed, so that the update is what one process would make of the whole. The
first process alone scores dev and writes.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from upstream.common.errors import UserError
from upstream.common.progress import silent
from upstream.common.stop import end_now

T = TypeVar("T")
ENVIRONMENT = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}  # torchrun's, and without it
PATIENCE = timedelta(
    hours=12
)  # of those who wait for the first process: it scores dev, or extracts


class Portion(NamedTuple):
    """One of `parts` equal shares of any sequence: every so manieth, from `first` on."""

    first: int = 0
    parts: int = 1

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """What is in the share."""
        return items[self.first :: self.parts]


ALL = Portion()


class Ranks(NamedTuple):
    """One process among `world`; what it says to the others, they must all say."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that scores and writes."""
        return self.rank == 0

    def shares(self, accumulate: int) -> tuple[Portion, Portion]:
        """Of the micro-batches of an update, and of the utterances of each of these.

        As many processes as can take whole micro-batches; so many others split each of them.
        """
        whole = math.gcd(accumulate, self.world)
        micro = Portion(self.rank % whole, whole)
        return micro, Portion(self.rank // whole, self.world // whole)

    def tell(self, value: T) -> T:
        """The first one's value, whatever the others' is. Raises UserError if one has ended."""
        if self.world == 1:
            return value
        box = [value]
        with self._together():
            dist.broadcast_object_list(box)
        return box[0]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first one before all others, who find on disk what it made. Raises UserError."""
        if not self.first:
            self.tell(None)
        yield
        if self.first:
            self.tell(None)

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the first one's values. Raises UserError if one has ended."""
        if self.world > 1:
            with self._together(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def add_up(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Sum gradients in place, and the loss, over all processes; one that is None everywhere
        stays so. Raises UserError if a process has ended.
        """
        if self.world == 1:
            return loss
        learning = [p for p in parameters if p.requires_grad]
        known = [float(p.grad is not None) for p in learning]
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        flat = torch.cat([rows[0].new_tensor([loss, *known]), *(row.flatten() for row in rows)])
        with self._together():
            dist.all_reduce(flat)
        (total, *counts), sums = flat[: len(rows) + 1].tolist(), flat[len(rows) + 1 :]
        for p, count, row in zip(learning, counts, sums.split([p.numel() for p in learning])):
            p.grad = row.view_as(p) if count else None
        return total

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's, each with words of its own
            raise UserError(
                f"process {self.rank} of {self.world}: another one has ended, see what it said; "
                "the same command goes on from what was saved"
            ) from error


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started; without torchrun it is alone. UserError.

    The others' standard output and progress go nowhere: the first one speaks for all.
    """
    world, rank, local = (int(os.environ.get(k, d)) for k, d in ENVIRONMENT.items())
    if world == 1:
        yield Ranks()
        return
    cuda = torch.cuda.is_available()
    if cuda and local >= (count := torch.cuda.device_count()):
        raise UserError(f"torchrun: process {local} of this host has no GPU; there are {count}")
    if cuda:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"torchrun: the {world} processes did not meet ({error})") from error
    with contextlib.ExitStack() as stack:
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(silent())
        try:
            yield Ranks(rank, world)
        except UserError:
            # gloo's threads may abort a process that is taken apart while a peer is gone
            atexit.register(end_now, 2)
            raise
    dist.destroy_process_group()  # not after an error: NCCL would wait for the others
