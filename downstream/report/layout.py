"""A grid of strings as aligned text, Markdown or LaTeX. The first row is the header."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Grid: TypeAlias = Sequence[Sequence[str]]

LATEX = {
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "±": r"$\pm$", "<": "$<$", "_": r"\_", "%": r"\%",
    "#": r"\#", "&": r"\&",
}  # fmt: skip


def text(grid: Grid, width: int = 100) -> str:
    """Aligned columns. A cell may hold several lines; a long first column is cut at its left,
    because the end of a name tells more (`merged:alpha=0.25`)."""
    lines: list[list[str]] = []
    for row in grid:
        cells = [cell.split("\n") for cell in row]
        depth = max(map(len, cells))
        lines += [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(depth)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    widths[0] = min(widths[0], max(12, width - sum(w + 2 for w in widths[1:])))
    for line in lines:
        if len(line[0]) > widths[0]:
            line[0] = "…" + line[0][1 - widths[0] :]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths)).rstrip() for x in lines)


def markdown(grid: Grid) -> str:
    """A Markdown table; a second line of a cell follows `<br>`."""
    safe = [[cell.replace("|", r"\|").replace("\n", "<br>") for cell in row] for row in grid]
    lines = [f"| {' | '.join(row)} |" for row in safe]
    return "\n".join([lines[0], "|" + " --- |" * len(grid[0]), *lines[1:]])


def latex(grid: Grid) -> str:
    """A LaTeX tabular that needs no package."""
    lines = [" & ".join("".join(LATEX.get(c, c) for c in cell) for cell in row) for row in grid]
    body = [line + r" \\" for line in lines]
    head = rf"\begin{{tabular}}{{{'l' * len(grid[0])}}}"
    return "\n".join([head, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"])
