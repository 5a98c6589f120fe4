"""A table of strings as aligned text, Markdown or LaTeX. The first row is the header."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

from upstream.common.text import escaped

TextTable: TypeAlias = Sequence[Sequence[str]]

# how a formula begins, in wide characters as well
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
LATEX = {
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "±": r"$\pm$", "<": "$<$", "_": r"\_", "%": r"\%",
    "#": r"\#", "&": r"\&", "†": r"$\dagger$", "$": r"\$", "{": r"\{", "}": r"\}", ">": "$>$",
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": "$|$",
    "…": r"\dots{}", "\n": " ", "[": "{[}",  # after a row's end [ would be an argument
}  # fmt: skip


def text(table: TextTable, width: int = 100) -> str:
    """Aligned columns. A cell may hold several lines; a long first column is cut at its left,
    because the end of a name tells more (`merged:alpha=0.25`)."""
    lines: list[list[str]] = []
    for row in ([escaped(cell) for cell in row] for row in table):
        lines += map(list, zip_longest(*(cell.split("\n") for cell in row), fillvalue=""))
    widths = [max(map(len, column)) for column in zip(*lines)]
    widths[0] = min(widths[0], max(12, width - sum(w + 2 for w in widths[1:])))
    for line in lines:
        if len(line[0]) > widths[0]:
            line[0] = "…" + line[0][1 - widths[0] :]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths)).rstrip() for x in lines)


def wrapped(notes: Iterable[str], width: int = 100) -> str:
    """One note below the other, long ones on several lines."""
    plain = (escaped(note, "\n") for note in notes)
    return "\n".join(textwrap.fill(note, width, subsequent_indent="   ") for note in plain)


def markdown(table: TextTable) -> str:
    """A Markdown table; a second line of a cell follows `<br>`."""
    safe = [[plain(cell).replace("|", r"\|") for cell in row] for row in table]
    lines = [f"| {' | '.join(row).replace(chr(10), '<br>')} |" for row in safe]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def plain(text: str) -> str:
    """Text for Markdown: no HTML, link or picture comes out of it, and numbers stay as they are."""
    safe = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped(text))
    return re.sub(r"\](?=[(\[:])", r"\\]", safe)


def latex(table: TextTable, notes: Iterable[str] = ()) -> str:
    """A LaTeX tabular that needs no package, and notes as comments.

    It compiles whatever the cells hold: what pdflatex's fonts lack is shown by its code point.
    """
    lines = [" & ".join("".join(map(_latex, cell)) for cell in row) for row in table]
    body = [line + r" \\" for line in lines]
    head = rf"\begin{{tabular}}{{{'l' * len(table[0])}}}"
    parts = [head, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"]
    return "\n".join([*parts, *(f"% {escaped(' '.join(note.split()))}" for note in notes)])


def noted(table: TextTable, notes: Iterable[str], form: str, width: int = 100) -> str:
    """A table and what must be said of it as `text`, `md` or `latex`."""
    if form == "text":
        return f"{text(table, width)}\n\n{wrapped(notes)}"
    if form == "md":
        return "\n".join([markdown(table), "", *(f"- {plain(note)}" for note in notes)])
    return latex(table, notes)


def _latex(character: str) -> str:
    if character in LATEX:
        return LATEX[character]
    if " " <= character <= "~" or "À" <= character <= "ÿ":
        return character
    return f"(U+{ord(character):04X})"


def _value(value: Any) -> Any:
    """A value as spreadsheets take it: a text that they would take for a formula is marked."""
    if not isinstance(value, str):
        return "" if value != value else value  # NaN
    text = escaped(value)
    if text[:1] in FORMULA and not NUMBER.fullmatch(text):
        return f"'{text}"
    return text


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A header and rows of values; NaN is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_value(x) for x in row] for row in rows)
    return file.getvalue()
