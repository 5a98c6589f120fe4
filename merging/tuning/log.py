"""What every update did, as lines of JSON that outlive an interruption: `log.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upstream.common import disk

LOG = "log.jsonl"
BOARD = "tensorboard"
KEYS = {"step", "loss", "lr", "head_lr", "norm"}  # of a line


class Log:
    """One line per update, in order and none twice, however often a run was interrupted."""

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        """tensorboard: for TensorBoard as well, in a folder beside `path`."""
        self.path, self.tensorboard = path, tensorboard
        self.board: Any = None

    def add(self, **facts: float) -> None:
        """Append a line. Raises UserError."""
        disk.append(self.path, json.dumps(facts) + "\n")
        self._show(facts)

    def dev(self, step: int, scores: Mapping[str, float]) -> None:
        """Dev scores after `step` updates, for TensorBoard."""
        self._show({"step": step} | {f"dev/{name}": score for name, score in scores.items()})

    def cut(self, steps: int, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Forget what was done after `steps` updates: the run goes on from there. UserError.

        TensorBoard's folder is made anew, so that no point is in it twice; `history`: its dev
        scores.
        """
        kept = [line for line in self.lines() if line["step"] <= steps]
        disk.write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if not self.tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter  # only where its package is installed

        folder = self.path.with_name(BOARD)
        disk.remove_folder(folder)
        self.board = SummaryWriter(str(folder))
        for line in kept:
            self._show(line)
        for each in history:
            self.dev(each["step"], {"selects": each["dev"], **each.get("also", {})})

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self.board:
            self.board.close()

    def _show(self, facts: Mapping[str, float]) -> None:
        for name, value in facts.items():
            if self.board and name != "step":
                self.board.add_scalar(name, value, int(facts["step"]))

    def lines(self) -> list[dict[str, float]]:
        """What is there; a last line that was cut short is none."""
        if not os.path.lexists(self.path):
            return []
        lines = []
        for text in disk.read(self.path, disk.TABLE_BYTES).splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not isinstance(line, dict) or not all(map(_is_number, [*line.values()])):
                break
            if not line.keys() >= KEYS:
                break
            lines.append(line)
        return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
