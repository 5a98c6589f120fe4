"""Figures: one specification (Vega-Lite) each, as inline SVG of the page and as PDF or SVG file.

Colours are Okabe and Ito's, which most colour-blind readers tell apart, and never without a shape.
A figure is a row of small panels, so that a telephone shows them below each other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from downstream.report.compare import Row, reduction
from downstream.report.results import safe_name
from downstream.report.table import heading, p_text
from downstream.tasks.metrics import parted
from upstream.common import disk, pictures
from upstream.common.text import escaped

if TYPE_CHECKING:
    import altair as alt
else:
    alt = pictures.require()

MOST_ROWS, MOST_LINES, MOST_DOTS = 40, 6, 24  # of a panel
MOST_PANELS = 24  # of a figure
LONGEST = 30  # letters of a name beside an axis
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down",
          "triangle-left", "triangle-right"]  # fmt: skip
VERDICTS = {  # colour and shape
    "better": ("#0072B2", "triangle-up"), "worse": ("#D55E00", "triangle-down"),
    "kept": ("#009E73", "square"), "slightly worse": ("#E69F00", "triangle-left"),
    "undecided": ("#767676", "circle"), "seen": ("#CC79A7", "diamond"),
    "withheld": ("#767676", "cross"), "unknown": ("#767676", "cross"),
}  # fmt: skip
FOLDERS = re.compile(r"^[^:]*/(?=[^/:]+\.ya?ml\b)")
INK = "#222"
CONFIG: dict[str, Any] = {
    "font": "Helvetica, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelColor": INK,
        "titleColor": INK, "gridColor": "#eee", "domainColor": "#999", "tickColor": "#999",
        "labelLimit": 190, "tickCount": 5, "labelFlush": False,
    },
    "title": {"fontSize": 12, "anchor": "start", "color": INK, "frame": "group"},
    "legend": {"orient": "bottom", "columns": 2, "labelFontSize": 11, "title": None,
               "labelLimit": 170, "symbolSize": 60, "direction": "horizontal", "offset": 8,
               "symbolOpacity": 1},
    "aria": False,
    "padding": {"left": 20, "right": 8, "top": 5, "bottom": 5},  # a reader's font may be wider
}  # fmt: skip

Values = Sequence[Mapping[str, Any]]
Panel: TypeAlias = Any  # a chart of Altair, which types them loosely


class Figure(NamedTuple):
    """Panels that say one thing."""

    name: str  # of its files
    title: str
    reading: str  # one line for a reader who has not seen such a figure
    alt: str  # for a reader who sees none
    panels: Sequence[Panel]
    left_out: str = ""  # what found no place
    curves: Sequence[str] = ()  # in their order; several have a legend
    verdicts: Sequence[str] = ()  # that occur

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Name, colour and shape; a page shows them once."""
        kinds = [(v, *VERDICTS[v]) for v in self.verdicts]
        several = self.curves if len(self.curves) > 1 else ()
        return kinds + [(n, *looks(i)) for i, n in enumerate(several)]

    def svgs(self) -> list[str]:
        """Each panel as inline SVG. What a mark says stands in its <title>, shown on hovering.

        Raises UserError where nothing can be drawn.
        """
        specs = (_unlabelled(_spec(panel)) for panel in self.panels)
        return [_inline(pictures.draw(spec).decode()) for spec in specs]

    def save(self, folder: Path) -> list[Path]:
        """All panels together as a PDF and an SVG file. Raises UserError."""
        columns = 2 if len(self.panels) == 4 else 3
        spec = {**_spec(alt.concat(*self.panels, columns=columns)), "background": "white"}
        forms = {"pdf": pictures.draw(spec, "pdf"), "svg": pictures.draw(spec)}
        paths = [folder / f"{safe_name(self.name)}.{form}" for form in forms]
        for path, content in zip(paths, forms.values()):
            disk.write(path, content)
        return paths


def printable(text: str) -> str:
    """Without hidden characters and those that XML has no word for: a renderer dies of one."""
    return re.sub("[\ufffe\uffff]", "\ufffd", escaped(text))


def _spec(chart: Panel) -> dict[str, Any]:
    return dict(_printable({**chart.to_dict(validate=False), "config": CONFIG}))


def _printable(spec: Any) -> Any:
    if isinstance(spec, (list, tuple)):
        return [_printable(each) for each in spec]
    if isinstance(spec, dict):
        return {key: _printable(value) for key, value in spec.items()}
    return printable(spec) if isinstance(spec, str) else spec


def _unlabelled(spec: Any) -> Any:
    """Without legends."""
    if isinstance(spec, list):
        return [_unlabelled(each) for each in spec]
    if isinstance(spec, dict):
        return {k: None if k == "legend" and v == {} else _unlabelled(v) for k, v in spec.items()}
    return spec


def _inline(svg: str) -> str:
    """Without what a page has no use for; labels of marks become titles. Scales to its place."""
    svg = re.sub(r' (?:role|aria-roledescription|pointer-events|opacity)="[^"1]*1?"', "", svg)
    svg = re.sub(
        r'<(path|line) aria-label="([^"]*)"([^>]*?)/>', r"<\1\3><title>\2</title></\1>", svg
    )
    svg = re.sub(r' aria-(?:label|hidden)="[^"]*"| class="[^"]*"', "", svg)
    svg = re.sub(r'<path d="M0,0h0v0h0Z"/>|<path d="" display="none"/>', "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def short_names(names: Sequence[str], longest: int = LONGEST) -> dict[str, str]:
    """Each as it fits beside an axis, and no two alike.

    Cut at its left, because the end of a name tells more; in its middle where that is not enough.
    """
    bare = {n: FOLDERS.sub("", n) for n in names}  # of recipes
    if len({*bare.values()}) < len(bare):
        bare = {n: n for n in names}
    whole = {n: printable(each) for n, each in bare.items()}
    cut = {n: t if len(t) <= longest else "…" + t[1 - longest :] for n, t in whole.items()}
    count = Counter(cut.values())
    alike = [n for n in cut if count[cut[n]] > 1]
    cut |= {n: f"{whole[n][: longest - 10]}…{whole[n][-9:]}" for n in alike}
    count = Counter(cut.values())
    return {n: c if count[c] == 1 else f"{c} ({i})" for i, (n, c) in enumerate(cut.items(), 1)}


def says(row: Row) -> str:
    """A difference in words."""
    low, high = row.low, row.high
    span = "no interval" if math.isnan(low) else f"95 % {low:+.2f} to {high:+.2f}"
    p = p_text(row.p_holm)
    return (
        f"{row.upstream} minus {row.reference}, {heading(row)}: {row.difference:+.2f} points, "
        f"{span}{p and ', p ' + p}, {row.verdict}"
    )


def gain(row: Row, difference: float | None = None) -> float:
    """Relative reduction of errors against the reference in per cent; NaN if it made none."""
    difference = row.difference if difference is None else difference
    return reduction(row.better, row.reference_score, difference)


def paired_rows(rows: Sequence[Row], reference: str) -> list[Row]:
    """Differences from the reference, without views on groups."""
    return [r for r in rows if reference and r.reference == reference and not parted(r.metric)[1]]


def by_heading(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each task and metric."""
    ordered = sorted(rows, key=lambda row: row.task)
    return {h: [r for r in rows if heading(r) == h] for h in dict.fromkeys(map(heading, ordered))}


def forest(rows: Sequence[Row], reference: str, suite: str) -> Figure | None:
    """Paired differences with their intervals, a panel for each task and metric."""
    mine = paired_rows(rows, reference)
    if not mine:
        return None
    named = list(dict.fromkeys(r.upstream for r in mine))
    shown, short = named[:MOST_ROWS], short_names(named)
    verdicts = [v for v in VERDICTS if any(r.verdict == v for r in mine)]
    key = [(v, *VERDICTS[v]) for v in verdicts]
    colour, shape = (_channel(channel, "verdict:N", key) for channel in ("color", "shape"))
    panels = []
    tasks = by_heading(mine)
    for head, each in list(tasks.items())[:MOST_PANELS]:
        values = [
            {"name": short[r.upstream], "difference": r.difference,
             "low": known_or(r.low, r.difference), "high": known_or(r.high, r.difference),
             "verdict": r.verdict, "says": says(r)}
            for r in each
            if r.upstream in shown and math.isfinite(r.difference)
        ]  # fmt: skip
        if not values:
            continue
        way = "points, better →" if each[0].better == "higher" else "← better, points"
        y = alt.Y("name:N", sort=[short[n] for n in shown], title=None)
        base = alt.Chart(alt.Data(values=values)).encode(y=y)
        zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color="#666", strokeDash=[3, 2])
        bars = base.mark_rule(strokeWidth=1.5).encode(
            x=alt.X("low:Q", title=way, scale=alt.Scale(zero=True)), x2="high:Q", color=colour
        )
        points = base.mark_point(filled=True, size=55, opacity=1).encode(
            x="difference:Q", color=colour, shape=shape, description="says:N"
        )
        panels.append(
            alt.layer(zero.encode(x="x:Q"), bars, points).properties(
                title=head, width=190, height=alt.Step(20)
            )
        )
    left = left_out_of(named, MOST_ROWS) + left_out_of(list(tasks), MOST_PANELS, "tasks")
    return Figure(
        f"{suite}-differences",
        f"Differences from {reference}",
        f"Points: each upstream minus {reference}, paired by utterance; bars: 95 % interval. "
        "A verdict takes the adjusted p of the table.",
        "; ".join(says(r) for r in mine[:60]),
        panels,
        left,
        verdicts=verdicts,
    )


def looks(number: int) -> tuple[str, str]:
    """Colour and shape of the curve of this number; no two of the first 64 are alike."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], SHAPES[(place + turn) % len(SHAPES)]


def lines(names: Sequence[str], channel: str = "color") -> Any:
    """Colour or shape of the curves `names`; the same in every panel."""
    return _channel(channel, "curve:N", [(n, *looks(i)) for i, n in enumerate(names)])


def _channel(channel: str, field: str, key: Sequence[tuple[str, str, str]]) -> Any:
    names, colours, shapes = zip(*key)
    scale = alt.Scale(domain=names, range=colours if channel == "color" else shapes)
    kind = alt.Color if channel == "color" else alt.Shape
    legend = alt.Legend() if len(names) > 1 or field == "verdict:N" else None
    return kind(field, scale=scale, legend=legend, title=None, sort=None)


def known_or(value: float, other: float) -> float:
    """`value`, or `other` if it is not known."""
    return value if math.isfinite(value) else other


def left_out_of(
    names: Sequence[str], most: int, what: str = "upstreams", where: str = "; see the table"
) -> str:
    """A sentence on what found no place; nothing if all did."""
    more = len(names) - most
    return f"Not drawn: {more} more {what}{where}. " if more > 0 else ""
