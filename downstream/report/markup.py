"""Pieces of the page: text, tables and figures as HTML, whatever is in them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from downstream.report.compare import Row
from downstream.report.figures import Figure, printable
from downstream.report.table import HEARD, half_text, p_text
from upstream.common.errors import UserError
from upstream.common.notice import notice

MARKS = {  # SVG paths of vega's symbols
    "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "square": "M-4,-4h8v8h-8Z",
    "triangle-up": "M0,-5L5,5H-5Z", "triangle-down": "M0,5L5,-5H-5Z",
    "triangle-left": "M-5,0L5,-5V5Z", "triangle-right": "M5,0L-5,-5V5Z",
    "diamond": "M0,-6L4,0L0,6L-4,0Z",
    "cross": "M-5,-2h3v-3h4v3h3v4h-3v3h-4v-3h-3Z",
}  # fmt: skip
MARK = {"better": "▲ ", "kept": "= ", "slightly worse": "▽ ", "worse": "▼ "}
COMMAND = "benchmark.py"
TALL = 30  # rows; a longer table scrolls in its place


def h(text: object) -> str:
    """Text as HTML, whatever is in it."""
    return html.escape(printable(str(text)))


def figure_html(figure: Figure) -> str:
    """Its title, how to read it, its legend and panels."""
    kind = {1: " one", 2: " two", 4: " two"}.get(len(figure.panels), "")
    try:
        svgs = "".join(f"<div>{svg}</div>" for svg in figure.svgs())
    except UserError as error:  # the numbers of the page do not wait for its pictures
        notice(str(error))
        svgs = f'<p class="pale">{h(str(error))}</p>'
    return (
        f"<h3>{h(figure.title)}</h3><p>{h(figure.reading)}</p>"
        f"{_legend(figure)}"
        f'<figure role="img" aria-label="{h(figure.title)}: {h(figure.alt[:2000])}">'
        f'<div class="panels{kind}">{svgs}</div></figure>'
        + (f'<p class="pale">{h(figure.left_out)}</p>' if figure.left_out else "")
    )


def _legend(figure: Figure) -> str:
    keys = "".join(
        f'<li><svg width="12" height="12" viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path d="{MARKS[shape]}" fill="{colour}"/></svg> <bdi>{h(label)}</bdi></li>'
        for label, colour, shape in figure.legend
    )
    return f'<ul class="legend">{keys}</ul>' if keys else ""


def html_table(head: Sequence[str], body: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of ready-made cells below headings."""
    top = "".join(f'<th scope="col">{h(each)}</th>' for each in head)
    rows = [f"<tr>{''.join(row)}</tr>" for row in body]
    tall = " tall" if len(rows) > TALL else ""
    return (
        f'<div class="wide{tall}" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def th(text: str) -> str:
    """The heading of a row."""
    return f'<th scope="row" data-v="{h(text)}"><bdi>{h(text)}</bdi></th>'


def td(row: Row | None) -> str:
    """A score, or a difference with its verdict."""
    if row is None:
        return "<td></td>"
    value = row.difference if row.reference else row.score
    half = half_text(row)
    if not row.reference:
        return f'<td data-v="{value:.6f}">{value:.2f} {half}{HEARD if row.seen else ""}</td>'
    mark = MARK.get(row.verdict, "")
    p = p_text(row.p_holm)
    return (
        f'<td data-v="{value:.6f}">{round(value, 2) + 0.0:+.2f} {half}'
        f'<small class="{row.verdict.split(" ")[0]}">{mark}{h(row.verdict)}{p and ", p " + p}'
        "</small></td>"
    )
