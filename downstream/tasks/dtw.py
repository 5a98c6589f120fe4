"""Where a query best fits into a document: subsequence dynamic time warping, all queries at once.

Source: s3prl downstream/quesst14_dtw, which gives each pair to dtw-python (open begin and end, step
pattern "asymmetric"). Every step of that pattern goes on by one query frame and by none, one or two
document frames, so a row of accumulated costs needs only the row above: no recursion along it, and
all layers, queries and positions of a row are computed together, on a CPU or a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

SMALLEST = 1e-9  # of a row's range, as in s3prl
FLOATS = 4e6  # of costs at once: few enough to stay near the processor, the matrix product rules


def packed(queries: Sequence[Tensor]) -> PackedSequence:
    """Queries of [L, M, D] each -> their frames of unit length, [F, L, D], the first ones first."""
    frames = [F.normalize(query.transpose(0, 1), dim=-1) for query in queries]
    return pack_sequence(frames, enforce_sorted=False)


def scores(queries: PackedSequence, document: Tensor) -> Tensor:
    """How well each of the `packed` queries fits into `document` [L, T, D]: [L, Q], highest 0.

    The distance of two frames is exp(1 - cosine) - 1, its range over the document made 0 to 1 for
    each query frame. A score is the cost of the best path, divided by the query's frames, negative.
    """
    document = F.normalize(document, dim=-1).transpose(1, 2)
    layers = max(1, int(FLOATS / (len(queries.data) * document.shape[2])))
    costs = [
        _lowest(queries, frames, part)
        for frames, part in zip(
            queries.data.transpose(0, 1).split(layers), document.split(layers), strict=True
        )
    ]
    lengths = _lengths(queries).to(document.device)
    return -(torch.cat(costs) / lengths)[:, queries.unsorted_indices]


def _lengths(queries: PackedSequence) -> Tensor:
    """[Q] frames of each query, the longest first."""
    longest = torch.arange(int(queries.batch_sizes[0]))
    return (queries.batch_sizes[:, None] > longest).sum(0)


def _lowest(queries: PackedSequence, frames: Tensor, document: Tensor) -> Tensor:
    """[L, F, D], [L, D, T] of unit length -> the costs of the best paths, [L, Q], longest first."""
    distance = (frames @ document).neg_().add_(1).expm1_()
    low, high = distance.aminmax(dim=-1, keepdim=True)
    distance.sub_(low).div_((high - low).clamp_(min=SMALLEST))
    first, *sizes = queries.batch_sizes.tolist()
    total = distance[:, :first].clone()
    begun = first
    for size in sizes:  # one frame on, of the queries that have one more
        above, row = total[:, :size], distance[:, begun : begun + size]
        best = above.clone()
        torch.minimum(best[..., 1:], above[..., :-1], out=best[..., 1:])
        torch.minimum(best[..., 2:], above[..., :-2], out=best[..., 2:])
        torch.add(best, row, out=above)
        begun += size
    return total.amin(-1)
