"""Stage 1 of Speech-FT: fine-tuning an upstream on a task.

A run is a loop over an objective (what is learnt, from which data) and a strategy (which weights
learn, and what becomes of them).
"""

from merging.tuning.loop import build_tuned
from merging.tuning.recipe import tuned_folder

__all__ = ["build_tuned", "tuned_folder"]
