"""What every room uses: errors, registry, schema, progress, files on disk."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # the clone
