"""Stage 1 of Speech-FT: a loop over an objective (what is learnt) and a strategy (by what)."""

from merging.tuning.build import build_tuned
from merging.tuning.recipe import tuned_folder

__all__ = ["build_tuned", "tuned_folder"]
