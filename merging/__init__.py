"""A pre-trained upstream in, a new upstream out: stable fine-tuning and weight merging."""
