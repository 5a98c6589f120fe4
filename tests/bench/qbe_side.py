"""Query by example: s3prl's own match of a pair, with dtw-python, and the search here."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any

import numpy as np
import torch

from downstream.tasks import dtw
from tests.bench.machine import clock
from tests.bench.subject import Setup

# SUPERB's QbE: the English part of QUESST 2014, hidden states of a Base model
QUERIES, DOCUMENTS, LAYERS, DIM = 138, 2438, 13, 768
LENGTHS = (25, 75)  # frames of a query, about; of a document on average:
FRAMES = 330
PAIRS, SEARCHED = 60, 4  # what is timed
OPTIONS = {
    "step_pattern": "asymmetric", "keep_internals": False, "distance_only": False,
    "open_begin": True, "open_end": True,
}  # fmt: skip


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds of matching all pairs in all layers; {} without dtw-python.

    Features are random: the time does not depend on them. On a CPU both have one core. Beside a GPU
    s3prl's time is divided by the number of cores, as if its pool of processes scaled perfectly.
    """
    if importlib.util.find_spec("dtw") is None:
        return {}
    # what its module imports to read and write files
    sys.modules.setdefault("lxml", types.SimpleNamespace(etree=None))  # type: ignore[arg-type]
    sox = types.SimpleNamespace(apply_effects_file=None)
    sys.modules.setdefault("torchaudio.sox_effects", sox)  # type: ignore[arg-type]
    from s3prl.downstream.quesst14_dtw.expert import cosine_exp, match

    torch.set_num_threads(1)
    queries, layers, dim = (5, 2, 16) if setup.quick else (QUERIES, LAYERS, DIM)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*LENGTHS, (queries,), generator=generator).tolist()
    asked = [torch.randn(layers, n, dim, generator=generator) for n in lengths]
    document = torch.randn(layers, FRAMES, dim, generator=generator)
    drawn = np.random.default_rng(0).permutation(queries * layers)[:PAIRS]
    pairs = [(int(k) % queries, int(k) // queries) for k in drawn]
    match(asked[0][0].numpy(), document[0].numpy(), "", "", cosine_exp, True, OPTIONS)
    begun = clock("cpu")
    theirs = [
        match(asked[q][layer].numpy(), document[layer].numpy(), "", "", cosine_exp, True, OPTIONS)[
            2
        ]
        for q, layer in pairs
    ]
    cores = 1 if setup.device == "cpu" else os.cpu_count() or 1
    each = (clock("cpu") - begun) / len(pairs) / cores
    packed = dtw.packed([query.to(setup.device) for query in asked])
    searched = document.to(setup.device)
    scores = dtw.scores(packed, searched).cpu()
    begun = clock(setup.device)
    for _ in range(SEARCHED):
        dtw.scores(packed, searched)
    ours = (clock(setup.device) - begun) / SEARCHED
    differences = [abs(float(scores[layer, q]) - s) for (q, layer), s in zip(pairs, theirs)]
    return {
        "s3prl_seconds": each * queries * layers * DOCUMENTS,
        "our_seconds": ours * DOCUMENTS,
        "difference": max(differences),
    }
