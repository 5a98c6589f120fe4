"""ER as SUPERB does it: the head of SID on emotion labels, tested on each fold in turn.

Source: s3prl downstream/emotion. With `folds: true` in the recipe every split value of the corpus
(an IEMOCAP session) is the test set once; the score is the unweighted mean over folds.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from downstream.base import Example
from downstream.tasks import sid

TASK = replace(sid.TASK, name="er")


def folds(examples: list[Example]) -> dict[str, dict[str, list[int]]]:
    """fold -> {train, dev, test} indices: test on the fold, 80/20 of the rest train/dev.

    The random 80/20 split is drawn with seed 0 in every fold, as in s3prl (speakers overlap).
    """
    result = {}
    for fold in sorted({e.split for e in examples}):
        pool = [i for i, e in enumerate(examples) if e.split != fold]
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
        cut = int(0.8 * len(pool))
        result[fold] = {
            "train": [pool[i] for i in order[:cut]],
            "dev": [pool[i] for i in order[cut:]],
            "test": [i for i, e in enumerate(examples) if e.split == fold],
        }
    return result
