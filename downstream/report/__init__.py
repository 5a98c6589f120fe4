"""From finished cells to statements: results on disk, statistics, comparison, tables."""
