"""All results as one HTML page that needs nothing else: no network, no script to be read."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from downstream.report import curves, figures, table
from downstream.report.again import costs, provenance, suite_word
from downstream.report.compare import Row, answers
from downstream.report.figures import Figure
from downstream.report.groups import grouped, name, results_of
from downstream.report.markup import COMMAND, figure_html, h, html_table, td, th
from downstream.report.matrix_view import notes, text_table
from downstream.report.published import Published
from downstream.report.results import Result
from downstream.report.style import SCRIPT, STYLE
from downstream.report.table import heading
from downstream.report.verdicts import Margin
from downstream.report.view import View, has, view
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.common.text import portable
from upstream.resolve import canonical
from upstream.similarity import Similarity

NAME = "report.html"


def write(
    output: Path,
    results: Sequence[Result],
    similarities: Sequence[Similarity] = (),
    references: Sequence[str] = (),
    suite: str | None = None,
    folder: Path | None = None,
    published: Sequence[Published] = (),
    margins: Mapping[str, Margin] = {},
) -> list[Path]:
    """Write the page, and with `folder` every figure as PDF and SVG file; what was written.

    references: upstreams that differences are taken from; without, the base of what was merged.
    published: rows of the literature beside what is measured on SUPERB's own data.
    The same results give the same bytes. Raises UserError.
    """
    shown = _portable_names(results)
    references = [_reference(wanted, shown) for wanted in references]
    results = [_renamed(r, shown[r.cell.upstream]) for r in results]
    similarities = [
        replace(s, reference=portable(s.reference), other=portable(s.other)) for s in similarities
    ]
    suites = _suites(results, suite, references)
    views = [view(name, mine, references, published, margins) for name, mine in suites]
    drawn = {v.suite: v.figures() for v in views}
    alike = [
        figure
        for number, (_, group) in enumerate(sorted(_alike(similarities).items()))
        for figure in curves.similar(group, f"-{number + 1}" if number else "")
    ]
    parts = [_suite(v, drawn[v.suite]) for v in views] + [_similarity(views[0], alike)]
    disk.write(output, _html("".join(parts), views).encode())
    written = [output]
    if folder:
        for figure in [f for by in drawn.values() for each in by.values() for f in each] + alike:
            written += figure.save(folder)
    return written


def _portable_names(results: Sequence[Result]) -> dict[str, str]:
    """What a page that others read calls each upstream: no absolute path, and no two alike."""
    names = sorted({r.cell.upstream for r in results})
    short = {n: portable(n) for n in names}
    count = Counter(short.values())
    return {
        n: each if n == each or count[each] == 1 else f"{each} ({number})"
        for number, (n, each) in enumerate(short.items(), 1)
    }


def _reference(wanted: str, shown: Mapping[str, str]) -> str:
    """A name, or name@fingerprint, as the page calls it."""
    for spelling in (wanted, canonical(wanted)):
        bare, _, fingerprint = spelling.rpartition("@")
        if spelling in shown:
            return shown[spelling]
        if bare in shown:
            return f"{shown[bare]}@{fingerprint}"
    return wanted


def _renamed(result: Result, upstream: str) -> Result:
    if upstream == result.cell.upstream:
        return result
    return replace(result, cell=replace(result.cell, upstream=upstream))


def _suites(
    results: Sequence[Result], suite: str | None, references: Sequence[str]
) -> list[tuple[str, list[Result]]]:
    """Raises UserError for no results, an unknown suite or a reference that no suite has."""
    if not results:
        raise UserError("report: there are no results here; run the benchmark first, or --results")
    suites = grouped(results, lambda r: r.cell.suite)
    if suite is not None and suite not in suites:
        raise UserError(f"report: no results in suite {suite!r}{near_miss(suite, suites)}")
    chosen = sorted(s for s in suites if suite in (None, s))
    for wanted in references:
        if not any(has(wanted, suites[s]) for s in chosen):
            results_of(wanted, [r for s in chosen for r in suites[s]])  # says what is wrong
    return [(s, suites[s]) for s in chosen]


def _alike(found: Sequence[Similarity]) -> dict[tuple[str, str], list[Similarity]]:
    """Those that share their reference and their audio."""
    groups: dict[tuple[str, str], list[Similarity]] = {}
    for each in sorted(found, key=lambda s: (s.other, s.fingerprints)):
        groups.setdefault((each.fingerprints[0], each.audio), []).append(each)
    return groups


def _suite(view: View, drawn: Mapping[str, Sequence[Figure]]) -> str:
    suite, ref = view.suite, view.reference or "REFERENCE"
    run = f"{COMMAND} --upstream"
    hints = {
        "forest": f"differences need a reference: {COMMAND} report --reference UPSTREAM",
        "heat": "a picture across tasks needs a reference and two tasks",
        "alpha": f"{run} merged:alpha=0,0.1,0.25,0.5,1 --suite {suite_word(suite)} draws it",
        "layers": "no head with several hidden states is kept here",
    }
    titles = {"forest": "Differences", "heat": "Across tasks", "alpha": "Along alpha",
              "layers": "Layer weights"}  # fmt: skip
    parts = [f'<h2 id="{_anchor(suite)}">Suite <bdi>{h(suite)}</bdi></h2>', _answer(view),
             _tables(view, ref), _ways(view)]  # fmt: skip
    for section, found in drawn.items():
        if found:
            parts += map(figure_html, found)
        else:
            parts.append(f'<p class="pale">{titles[section]}: {h(hints[section])}.</p>')
    return f"<section>{''.join(parts)}{costs(view)}{provenance(view)}</section>"


def _anchor(suite: str) -> str:
    return "suite-" + hashlib.sha256(suite.encode("utf-8", "replace")).hexdigest()[:8]


def _answer(view: View) -> str:
    """One sentence for each upstream, before any table; nothing where nothing is compared."""
    said = answers(view.table.rows)
    parts = []
    for reference in dict.fromkeys(each.reference for each in said):
        items = "".join(f"<li>{h(a.sentence)}</li>" for a in said if a.reference == reference)
        parts.append(f"<p>Against <bdi>{h(reference)}</bdi>:</p><ul>{items}</ul>")
    return f'<div class="answer">{"".join(parts)}</div>' if parts else ""


def _tables(view: View, reference: str) -> str:
    """Scores, then differences from each reference, and what must be said of them."""
    parts = []
    for ref in dict.fromkeys(row.reference for row in view.table.rows):
        rows = [row for row in view.table.rows if row.reference == ref]
        heads = list(figures.by_heading(rows))
        cells = {(row.upstream, heading(row)): row for row in rows}
        body = []
        for upstream in dict.fromkeys(row.upstream for row in rows):
            mine = (cells.get((upstream, head)) for head in heads)
            body.append([th(upstream), *map(td, mine)])
        if not ref:
            body += _baselines(rows, heads)
        if ref:
            parts.append(f"<h3>Minus <bdi>{h(ref)}</bdi></h3><p>Points ± half of the 95 % "
                         "interval, verdict, adjusted p.</p>")  # fmt: skip
        else:
            parts.append("<h3>Scores</h3><p>Per cent ± half of the 95 % interval, the mean over "
                         "head seeds; ↓ lower is better, ↑ higher is.</p>")  # fmt: skip
        parts.append(html_table(["upstream", *heads], body, "sorts"))
    said = "".join(f"<li>{h(note)}</li>" for note in table.remarks(view.table)[:200])
    opened = f"<details><summary>What these numbers rest on</summary><ul>{said}</ul></details>"
    return "".join(parts) + f'<div class="notes">{opened}</div>'


def _baselines(rows: Sequence[Row], heads: Sequence[str]) -> list[list[str]]:
    """What takes no upstream: chance and the majority class, below accuracies."""
    return [
        [th(label), *(f"<td>{h(cell)}</td>" for cell in cells)]
        for label, *cells in table.baselines(rows, heads)
    ]


def _ways(view: View) -> str:
    """The cross-task matrix; nothing where nothing was fine-tuned."""
    if view.matrix is None:
        return ""
    head, *rows = text_table(view.matrix)
    body = [[th(row[0]), *(f"<td>{h(cell)}</td>" for cell in row[1:])] for row in rows]
    said = "".join(f"<li>{h(note)}</li>" for note in notes(view.matrix)[:200])
    return (
        "<h3>Ways of fine-tuning</h3><p>A row for each way, its fine-tuning seeds together.</p>"
        f"{html_table(head, body)}"
        f'<div class="notes"><details><summary>How to read it</summary><ul>{said}</ul></details>'
        "</div>"
    )


def _similarity(view: View, drawn: Sequence[Figure]) -> str:
    if drawn:
        shown = "".join(map(figure_html, drawn))
        return f'<section><h2 id="similarity">Similarity</h2>{shown}</section>'
    base = view.reference or "REFERENCE"
    hint = h(f"{COMMAND} similarity {shlex.quote(base)} UPSTREAM")
    return (
        f'<section><p class="pale">Similarity of hidden states: {hint} measures it.</p></section>'
    )


def _html(body: str, views: Sequence[View]) -> str:
    """The whole page. Nothing may be loaded, and no script but the page's own may run."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    cells = [r for v in views for r in v.results]
    newest = max(r.score.created for r in cells)[:16].replace("T", " ")
    newest = f"{newest} UTC" if newest else "an unknown date"
    links = "".join(f'<a href="#{_anchor(v.suite)}"><bdi>{h(v.suite)}</bdi></a>' for v in views)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><title>Speech-FT Bench: results</title>'
        f"<style>{STYLE}</style></head><body><h1>Speech-FT Bench: results</h1>"
        f"<p>{len({name(r) for r in cells})} upstreams, {len(cells)} cells (upstream, task, head "
        f"seed), the newest of {h(newest)}. A head is trained on frozen "
        "features; differences are paired by utterance, intervals respect speakers and head seeds."
        f"</p><nav>{links}</nav>{body}<script>{SCRIPT}</script></body></html>\n"
    )
