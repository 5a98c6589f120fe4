"""Stage 1 of Speech-FT: fine-tuning an upstream on a task."""
