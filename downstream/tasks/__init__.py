"""One file per task, and what tasks are made of: heads, labels, lexicon, metrics."""
