"""The merge itself, over whole models."""
