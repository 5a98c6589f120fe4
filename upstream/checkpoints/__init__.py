"""Weights on disk, in every format: reading them without trusting them, and writing them."""

FORMATS = ("hf", "s3prl", "fairseq")  # that `write` writes
HEARD = "heard.txt"  # beside weights: keys of the clips whose labels they saw, one a line
RECORDS = ("finetune.json", "merge.json")  # beside weights that were built here
