"""How many frames utterances have that are not kept: batches are made by length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upstream.base import Upstream
from upstream.common import disk
from upstream.common.progress import progress
from upstream.features.ahead import ahead
from upstream.features.clips import Clip
from upstream.features.forward import Run, forward, whole
from upstream.features.store import Store

FOLDER = "lengths"  # of the store: a file for each entry


def frame_counts(
    upstream: Upstream, entry: str | None, clips: Sequence[Clip], store: Store, run: Run = whole
) -> Tensor:
    """[N] int64: the true number of frames of each clip, as it would be kept.

    From its decoded audio where the upstream says how many frames so many samples make, else from
    a forward; what was counted once is remembered in the store under `entry`. Raises UserError for
    audio that cannot be read.
    """
    file = store.root / FOLDER / f"{entry}.json"
    counts: dict[str, int] = (disk.read_checked(file) if entry else None) or {}
    wanted = {clip.key: clip for clip in clips if clip.key not in counts}
    if wanted:
        read = ahead(Clip.load, wanted.values())
        for clip, wav in progress(read, "frames of each utterance", len(wanted)):
            frames = upstream.frames(torch.tensor([len(wav)]))
            if frames is None or upstream.padding_matters:
                frames = forward(upstream, [wav], run).lens
            counts[clip.key] = int(frames[0])
        if entry:  # of two writers the last wins: a lost row is only counted again
            disk.write_checked(file, {**(disk.read_checked(file) or {}), **counts})
    return torch.tensor([counts[clip.key] for clip in clips])
