"""Hidden states of utterances: computed once, kept by content, read in batches."""
