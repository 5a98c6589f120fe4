"""Every query of a split searched for in every document: normalisation around `dtw.py`.

Source: s3prl downstream/quesst14_dtw/expert.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from downstream.base import Item
from downstream.tasks import dtw, trials
from upstream.common.progress import progress

SHORTEST = 5  # frames: the score of a shorter query is 0 everywhere
SMALLEST = 1e-9  # standard deviation


def search(
    items: Sequence[Item], outputs: Sequence[Tensor], layer: int | None = None
) -> Iterator[list[dict[str, float]]]:
    """Of each layer (or the one asked for): of a query {document: score}, of a document {}.

    outputs: frames [L, T, D], read twice, one by one; only the queries' are held in memory. Each
    dimension is normalised over all frames of the split, each query's scores over its documents.
    """
    every = slice(None) if layer is None else slice(layer, layer + 1)
    asked = [trials.read(item.target) for item in items]
    queries = [i for i, pairs in enumerate(asked) if pairs]
    documents = [i for i, pairs in enumerate(asked) if pairs == []]
    mean, deviation = _moments(outputs, [*queries, *documents], every)

    def frames(i: int) -> Tensor:
        return (outputs[i][every] - mean) / deviation

    packed = dtw.packed([frames(i) for i in queries])
    columns = [dtw.scores(packed, frames(i)) for i in progress(documents, "searching documents")]
    scores = torch.stack(columns, -1).double().cpu()  # [L, queries, documents]
    short = [row for row, i in enumerate(queries) if outputs[i].shape[1] < SHORTEST]
    scores[:, short] = 0.0
    scores -= scores.mean(-1, keepdim=True)
    scores /= scores.std(-1, correction=0, keepdim=True).clamp(min=SMALLEST)
    for rows in scores.tolist():
        answers: list[dict[str, float]] = [{} for _ in items]
        for i, row in zip(queries, rows):
            # four digits, as s3prl writes them
            answers[i] = {items[j].id: round(score, 4) for j, score in zip(documents, row)}
        yield answers


def _moments(
    outputs: Sequence[Tensor], indices: Sequence[int], layers: slice
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over the frames of `indices`, each [L, 1, D]."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for i in progress(indices, "means of frames"):
        frames = outputs[i][layers].double()
        count += frames.shape[1]
        total = total.to(frames.device) + frames.sum(1, keepdim=True)
        squares = squares.to(frames.device) + frames.square().sum(1, keepdim=True)
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1)
    return mean.float(), variance.clamp(min=0).sqrt().clamp(min=SMALLEST).float()
