"""ER as SUPERB does it: the head of SID on emotion labels, tested on each fold in turn.

Source: s3prl downstream/emotion. With `folds: true` in the recipe every split value of the corpus
(an IEMOCAP session) is the test set once; the score is the unweighted mean over folds.
"""

from __future__ import annotations

from dataclasses import replace

from downstream.tasks import sid

TASK = replace(sid.TASK, name="er")
