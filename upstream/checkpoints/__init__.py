"""Weights on disk, in every format: reading them without trusting them, and writing them."""

FORMATS = ("hf", "s3prl", "fairseq")  # that `write` writes
