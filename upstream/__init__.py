"""Audio to hidden states. Knows nothing of tasks or of merging."""
