"""What every update did, as lines of JSON that outlive an interruption: `log.jsonl`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from upstream.common import disk

LOG = "log.jsonl"


class Log:
    """One line per update, in order and none twice, however often a run was interrupted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **facts: float) -> None:
        """Append a line. Raises UserError."""
        with disk.writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def cut(self, steps: int) -> None:
        """Forget what was done after `steps` updates: the run goes on from there. UserError."""
        kept = [line for line in self.lines() if line["step"] <= steps]
        disk.write(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, float]]:
        """What is there; a last line that was cut short is none."""
        lines = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for text in self.path.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(text))
        return lines
