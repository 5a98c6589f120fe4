"""What a run of stage 1 did, drawn from the lines of its log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upstream.common import disk, pictures
from upstream.common.errors import UserError

POINTS = 500  # of a curve, at most: more updates are drawn as means
WIDTH, HEIGHT = 560, 110

Row = dict[str, float | str]


def draw(
    place: Path, lines: Sequence[Mapping[str, float]], history: Sequence[Mapping[str, Any]]
) -> str:
    """Write the figure: loss, learning rates, gradient norm, dev scores by update.

    lines: of `Log`. history: step and dev scores of every evaluation, `also` by name.
    Returns why there is none, where what draws is missing; else "". Raises UserError where it
    cannot draw.
    """
    try:
        pictures.require()
    except UserError as error:
        return str(error)
    import altair as alt

    curves, many = _curves(lines)
    dev = [
        {"step": each["step"], "value": score, "of": name}
        for each in history
        for name, score in {"selects": each["dev"], **each.get("also", {})}.items()
        if math.isfinite(score)
    ]
    title = "update" if many == 1 else f"update (means of {many})"
    scale = alt.Scale(domain=[0, lines[-1]["step"]], nice=False)
    x = alt.X("step:Q", title=title, scale=scale, axis=alt.Axis(tickCount=8))

    def panel(values: Sequence[Row], title: str, log: bool = False) -> alt.Chart:
        scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
        y = alt.Y("value:Q", title=title, scale=scale)
        color = alt.Color("of:N", title=None, legend=alt.Legend() if _several(values) else None)
        chart = alt.Chart(alt.Data(values=list(values)), width=WIDTH, height=HEIGHT)
        return chart.encode(x=x, y=y, color=color)

    rows = [
        panel(curves["loss"], "loss").mark_line(),
        panel(curves["lr"], "learning rate").mark_line(),
        panel([row for row in curves["norm"] if row["value"]], "gradient norm", True).mark_line(),
        panel(dev, "dev score").mark_line(point=True),
    ]
    chart = alt.vconcat(*rows).resolve_scale(color="independent")
    disk.write(place, pictures.draw(chart.to_dict()))
    return ""


def _curves(lines: Sequence[Mapping[str, float]]) -> tuple[dict[str, list[Row]], int]:
    """Points of each panel, and of how many updates each is the mean (of those that are finite)."""
    many = math.ceil(len(lines) / POINTS)
    keys = [("loss", "loss", ""), ("lr", "lr", "encoder"), ("norm", "norm", "")]
    if any(line["lr"] != line["head_lr"] for line in lines):
        keys.append(("lr", "head_lr", "head"))
    curves: dict[str, list[Row]] = {"loss": [], "lr": [], "norm": []}
    for first in range(0, len(lines), many):
        part = lines[first : first + many]
        for panel, key, of in keys:
            if known := [line[key] for line in part if math.isfinite(line[key])]:
                value = sum(known) / len(known)
                curves[panel].append({"step": part[-1]["step"], "value": value, "of": of})
    return curves, many


def _several(values: Sequence[Row]) -> bool:
    return len({row["of"] for row in values}) > 1
