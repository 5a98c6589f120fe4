"""One file per task, and what tasks are made of: heads, lexicon, metrics."""
