"""All results as one HTML page that needs nothing else: no network, no script to be read."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from downstream import recipe
from downstream.report import curves, figures, table
from downstream.report.compare import Row
from downstream.report.figures import Figure, printable
from downstream.report.groups import Labels, Name, grouped, labels, name, results_of, version
from downstream.report.layers import layer_weights
from downstream.report.lineage import Lineage, likely_base, lineages
from downstream.report.results import Result
from downstream.report.style import SCRIPT, STYLE
from downstream.report.table import HEARD, Table, heading, p_text
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.similarity import Similarity

MARKS = {  # SVG paths of vega's symbols
    "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "square": "M-4,-4h8v8h-8Z",
    "triangle-up": "M0,-5L5,5H-5Z", "triangle-down": "M0,5L5,-5H-5Z",
    "triangle-left": "M-5,0L5,-5V5Z", "triangle-right": "M5,0L-5,-5V5Z",
    "diamond": "M0,-6L4,0L0,6L-4,0Z",
    "cross": "M-5,-2h3v-3h4v3h3v4h-3v3h-4v-3h-3Z",
}  # fmt: skip
COMMAND, NAME = "benchmark.py", "report.html"
TALL = 30  # rows; a longer table scrolls in its place


@dataclass(frozen=True)
class View:
    """One suite of a results folder."""

    suite: str
    results: list[Result]
    table: Table
    reference: str  # as the table calls it; "" if nothing is compared
    called: Labels
    lineage: dict[Name, Lineage]

    @property
    def upstreams(self) -> dict[str, list[Result]]:
        """The results of each upstream, in the order of the table."""
        groups = {self.called[n]: mine for n, mine in grouped(self.results, name).items()}
        order = dict.fromkeys(row.upstream for row in self.table.rows)
        return {upstream: groups[upstream] for upstream in order if upstream in groups}

    def figures(self) -> dict[str, list[Figure]]:
        """By section."""
        rows, ref, suite = self.table.rows, self.reference, self.suite
        weights = curves.layer_weights(
            layer_weights((r for mine in self.upstreams.values() for r in mine), self.called), suite
        )
        return {
            "forest": [f for f in [figures.forest(rows, ref, suite)] if f],
            "heat": [f for f in [figures.heat(rows, ref, suite)] if f],
            "alpha": curves.alphas(rows, ref, self.lineage, suite),
            "layers": [weights] if weights else [],
        }


def write(
    output: Path,
    results: Sequence[Result],
    similarities: Sequence[Similarity] = (),
    references: Sequence[str] = (),
    suite: str | None = None,
    folder: Path | None = None,
) -> list[Path]:
    """Write the page, and with `folder` every figure as PDF and SVG file; what was written.

    references: upstreams that differences are taken from; without, the base of what was merged.
    The same results give the same bytes. Raises UserError.
    """
    views = [view(suite, mine, references) for suite, mine in _suites(results, suite, references)]
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


def view(suite: str, results: Sequence[Result], references: Sequence[str] = ()) -> View:
    """What the page says of one suite. References that it has no results of are left out."""
    known = [wanted for wanted in references if _has(wanted, results)]
    guess = None if known else likely_base(results)
    known += [guess] if guess else []
    whole = table.summary(results, suite, known)
    called = labels(results)
    first = called[name(results_of(known[0], results)[0])] if known else ""
    return View(suite, list(results), whole, first, called, lineages(results))


def _has(wanted: str, results: Sequence[Result]) -> bool:
    try:
        return bool(results_of(wanted, results))
    except UserError:
        return False


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
        if not any(_has(wanted, suites[s]) for s in chosen):
            results_of(wanted, [r for s in chosen for r in suites[s]])  # says what is wrong
    return [(s, suites[s]) for s in chosen]


def _alike(found: Sequence[Similarity]) -> dict[tuple[str, str], list[Similarity]]:
    """Those that share their reference and their audio."""
    groups: dict[tuple[str, str], list[Similarity]] = {}
    for each in sorted(found, key=lambda s: (s.other, s.fingerprints)):
        groups.setdefault((each.fingerprints[0], each.audio), []).append(each)
    return groups


def h(text: object) -> str:
    """Text as HTML, whatever is in it."""
    return html.escape(printable(str(text)))


def _suite(view: View, drawn: Mapping[str, Sequence[Figure]]) -> str:
    suite, ref = view.suite, view.reference or "REFERENCE"
    run = f"{COMMAND} --upstream"
    hints = {
        "forest": f"differences need a reference: {COMMAND} report --reference UPSTREAM",
        "heat": "a picture across tasks needs a reference and two tasks",
        "alpha": f"{run} merged:alpha=0,0.1,0.25,0.5,1 --suite {_suite_word(suite)} draws it",
        "layers": "no head with several hidden states is kept here",
    }
    titles = {"forest": "Differences", "heat": "Across tasks", "alpha": "Along alpha",
              "layers": "Layer weights"}  # fmt: skip
    parts = [f'<h2 id="{_anchor(suite)}">Suite <bdi>{h(suite)}</bdi></h2>', _tables(view, ref)]
    for section, found in drawn.items():
        if found:
            parts += map(_figure, found)
        else:
            parts.append(f'<p class="pale">{titles[section]}: {h(hints[section])}.</p>')
    return f"<section>{''.join(parts)}{_costs(view)}{_provenance(view)}</section>"


def _anchor(suite: str) -> str:
    return "suite-" + hashlib.sha256(suite.encode("utf-8", "replace")).hexdigest()[:8]


def _figure(figure: Figure) -> str:
    one = " one" if len(figure.panels) == 1 else ""
    svgs = "".join(f"<div>{svg}</div>" for svg in figure.svgs())
    return (
        f"<h3>{h(figure.title)}</h3><p>{h(figure.reading)}</p>"
        f"{_legend(figure)}"
        f'<figure role="img" aria-label="{h(figure.title)}: {h(figure.alt[:2000])}">'
        f'<div class="panels{one}">{svgs}</div></figure>'
        + (f'<p class="pale">{h(figure.left_out)}</p>' if figure.left_out else "")
    )


def _legend(figure: Figure) -> str:
    keys = "".join(
        f'<li><svg width="12" height="12" viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path d="{MARKS[shape]}" fill="{colour}"/></svg> <bdi>{h(label)}</bdi></li>'
        for label, colour, shape in figure.legend
    )
    return f'<ul class="legend">{keys}</ul>' if keys else ""


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
            body.append([_th(upstream), *map(_td, mine)])
        if ref:
            parts.append(f"<h3>Minus <bdi>{h(ref)}</bdi></h3><p>Points ± half of the 95 % "
                         "interval, verdict, adjusted p.</p>")  # fmt: skip
        else:
            parts.append("<h3>Scores</h3><p>Per cent ± half of the 95 % interval, the mean over "
                         "head seeds; ↓ lower is better, ↑ higher is.</p>")  # fmt: skip
        parts.append(_html_table(["upstream", *heads], body, "sorts"))
    said = "".join(f"<li>{h(note)}</li>" for note in table.remarks(view.table)[:200])
    opened = f"<details><summary>What these numbers rest on</summary><ul>{said}</ul></details>"
    return "".join(parts) + f'<div class="notes">{opened}</div>'


def _html_table(head: Sequence[str], body: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of ready-made cells below headings."""
    top = "".join(f'<th scope="col">{h(each)}</th>' for each in head)
    rows = [f"<tr>{''.join(row)}</tr>" for row in body]
    tall = " tall" if len(rows) > TALL else ""
    return (
        f'<div class="wide{tall}" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _th(text: str) -> str:
    return f'<th scope="row" data-v="{h(text)}"><bdi>{h(text)}</bdi></th>'


def _td(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    value = row.difference if row.reference else row.score
    half = "±?" if math.isnan(row.low) else f"±{value - row.low:.2f}"
    if not row.reference:
        return f'<td data-v="{value:.6f}">{value:.2f} {half}{HEARD if row.seen else ""}</td>'
    mark = {"better": "▲ ", "worse": "▼ "}.get(row.verdict, "")
    p = p_text(row.p_holm)
    return (
        f'<td data-v="{value:.6f}">{round(value, 2) + 0.0:+.2f} {half}'
        f'<small class="{row.verdict.split(" ")[0]}">{mark}{h(row.verdict)}{p and ", p " + p}'
        "</small></td>"
    )


def _similarity(view: View, drawn: Sequence[Figure]) -> str:
    if drawn:
        return (
            f'<section><h2 id="similarity">Similarity</h2>{"".join(map(_figure, drawn))}</section>'
        )
    base = view.reference or "REFERENCE"
    hint = h(f"{COMMAND} similarity {shlex.quote(base)} UPSTREAM")
    return (
        f'<section><p class="pale">Similarity of hidden states: {hint} measures it.</p></section>'
    )


def _costs(view: View) -> str:
    """Seconds of every cell, and what it took to build an upstream."""
    tasks, body = sorted({version(r) for r in view.results}), []
    for upstream, mine in view.upstreams.items():
        cells = [_th(upstream)]
        of = view.lineage.get(name(mine[0]))
        built = (
            (f"{of.seconds:.1f} s", f"{of.peak / 1e9:.2f} GB", f"{of.stored / 1e6:.3g} MB")
            if of
            else ("", "", "")
        )
        values = (of.seconds, of.peak, of.stored) if of else ("", "", "")
        cells += [f'<td data-v="{v}">{text}</td>' for v, text in zip(values, built)]
        for task in tasks:
            seconds = [r.score.seconds for r in mine if version(r) == task]
            if seconds:
                text = f"{sum(seconds):.1f} s<small>{len(seconds)} seeds</small>"
                cells.append(f'<td data-v="{sum(seconds):.3f}">{text}</td>')
            else:
                cells.append("<td></td>")
        body.append(cells)
    head = ["upstream", "building", "memory", "stored", *(view.called[t] for t in tasks)]
    return (
        "<h3>Cost</h3><p>Building: fine-tuning and merging (empty: not built here, or the record "
        "is gone). Then the seconds that each cell's heads took, all seeds.</p>"
        + _html_table(head, body, "sorts")
    )


def _provenance(view: View) -> str:
    """What made each row, and the command that makes it again."""
    body = []
    for upstream, mine in view.upstreams.items():
        scores = [r.score for r in mine]
        versions = {f"{k} {v}" for s in scores for k, v in s.versions.items()}
        git = {
            f"{str(s.git.get('revision', 'unknown'))[:12]}{' changed' * bool(s.git.get('dirty'))}"
            for s in scores
        }
        made = sorted({s.created[:10] for s in scores})
        devices = ", ".join(sorted({s.device for s in scores}))
        facts = [
            f"fingerprint {mine[0].cell.fingerprint}; from {scores[0].source or 'unknown'}",
            f"{', '.join(sorted(versions))}; git {', '.join(sorted(git))}; {devices}; "
            f"{' to '.join(dict.fromkeys([made[0], made[-1]]))}",
        ]
        lines = "".join(f"<small>{h(fact)}</small>" for fact in facts)
        commands = "".join(f"<code>{h(line)}</code><br>" for line in _commands(view, mine))
        body.append([_th(upstream), f'<td class="free">{commands}{lines}</td>'])
    recipes = []
    for task, mine in sorted(grouped(view.results, version).items()):
        warnings = sorted({w for r in mine for w in r.score.warnings})
        text = yaml.safe_dump(mine[0].score.recipe, sort_keys=False, allow_unicode=True)
        said = "".join(f"\n# {w}" for w in warnings[:20])
        recipes.append(
            f"<details><summary>recipe of {h(view.called[task])}, revision {h(task.revision)}"
            f"</summary><pre>{h(text)}{h(said)}</pre></details>"
        )
    return (
        "<h3>Provenance</h3><p>The command that makes each row again, and what made it.</p>"
        + _html_table(["upstream", "again"], body)
        + "".join(recipes)
    )


def _commands(view: View, results: Sequence[Result]) -> list[str]:
    """Cells of one upstream: a command for each number of seeds and each set of changed keys."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for task, mine in sorted(grouped(results, version).items()):
        seeds = max(r.cell.seed for r in mine) + 1
        words = [f"--seeds {seeds}"] if mine[0].score.lr else []
        words += [f"--set {shlex.quote(change)}" for change in _changes(mine[0])]
        groups.setdefault(tuple(words), []).append(task.task)
    upstream, suite = shlex.quote(results[0].cell.upstream), _suite_word(view.suite)
    return [
        f"{COMMAND} --upstream {upstream} --suite {suite} --downstream "
        f"{shlex.quote(','.join(tasks))} {' '.join(words)}".rstrip()
        for words, tasks in groups.items()
    ]


def _suite_word(suite: str) -> str:
    """What --suite takes; of a folder elsewhere a result knows no more than the name."""
    try:
        recipe.suite_folder(suite)
    except UserError:
        return shlex.quote(f"PATH/TO/{suite}")
    return shlex.quote(suite)


def _changes(result: Result) -> list[str]:
    """KEY=VALUE where the result's recipe is not the suite's, if the suite is known here."""
    here = _recipe(result.cell.suite, result.cell.task)
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
        for key, value in _leaves(result.score.recipe)
        if here.get(key, value) != value
    ]


@functools.cache
def _recipe(suite: str, task: str) -> dict[str, Any]:
    """The leaves of a recipe of a suite that comes with the project; empty if it has none."""
    try:
        return dict(_leaves(recipe.load(recipe.suite(suite)[task]).as_dict()))
    except (UserError, KeyError):
        return {}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
