"""Weights on disk, in every format: reading them without trusting them, and writing them."""
