"""Tables from finished cells: a summary per suite, a comparison of two upstreams, SUPERB scores."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd

from downstream.report import compare as matching
from downstream.report.compare import SIGNIFICANT, Job, Name, Verdict
from downstream.report.layout import Grid, latex, markdown, text
from downstream.report.results import Result, finite, write_atomic
from downstream.report.statistics import Difference, holm, interval
from downstream.tasks.metrics import METRICS
from upstream.common import PROJECT
from upstream.common.errors import UserError, near_miss

CONSTANTS = PROJECT / "results" / "published" / "constants.csv"
TASKS_ABREAST = 4  # what fits into 100 columns

Format = Literal["text", "md", "csv", "json", "latex"]


class Compared(NamedTuple):
    """One task of `compare`, in per cent and percentage points of the metric as it is shown."""

    task: str
    metric: str
    a: float
    b: float
    difference: float  # a - b
    low: float
    high: float
    speakers: int
    utterances: int
    seeds: int
    p: float
    p_holm: float  # adjusted for the number of tasks compared; the verdict rests on it
    verdict: Verdict  # on A
    reason: str  # why there is no interval


@dataclass(frozen=True)
class Comparison:
    """Two upstreams task by task, and what could not be compared."""

    a: str
    b: str
    rows: list[Compared]
    skipped: list[str]


def summary(results: Sequence[Result], suite: str, reference: str | None = None) -> pd.DataFrame:
    """One row per upstream and task of a suite, the reference's rows first.

    score, low, high: the mean over seeds and its 95 % interval. difference, diff_low, diff_high, p:
    against `reference` (name or name@fingerprint), paired by utterance, over the seeds both have.
    verdict: Holm-corrected over the whole table. Raises UserError for an unknown suite or name.
    """
    mine = [r for r in results if r.cell.suite == suite]
    if not mine:
        raise UserError(
            f"no results in suite {suite!r}{near_miss(suite, matching.suites(results))}"
        )
    base = matching.by_job(matching.find(mine, reference)) if reference else {}
    names = matching.upstream_labels(map(matching.name, mine))
    tasks = matching.job_labels(map(matching.job, mine))
    chosen = matching.name(next(iter(base.values()))[0]) if base else None
    groups: dict[tuple[bool, Name, Job], list[Result]] = defaultdict(list)
    for result in mine:
        groups[matching.name(result) != chosen, matching.name(result), matching.job(result)].append(
            result
        )
    rows: list[dict[str, Any]] = []
    for other, name, job in sorted(groups):
        group = groups[other, name, job]
        one = interval(matching.rows(group))
        score, half = matching.mean(group), (one.high - one.low) / 2
        row: dict[str, Any] = {
            "suite": suite, "upstream": names[name], "fingerprint": name.fingerprint,
            "task": tasks[job], "recipe": job.recipe, "metric": group[0].score.metric,
            "score": score, "low": score - half, "high": score + half,
            "seeds": one.seeds, "speakers": one.speakers, "utterances": one.utterances,
            "reference": names[chosen] if chosen else "", "difference": math.nan,
            "diff_low": math.nan, "diff_high": math.nan, "p": math.nan, "note": one.reason,
        }  # fmt: skip
        if chosen and other:
            try:
                d = matching.contrast(group, base.get(job, []))
                row |= {"difference": d.estimate, "diff_low": d.low, "diff_high": d.high, "p": d.p}
                row["note"] = d.reason
            except UserError as error:
                row["note"] = f"not compared: {error}"
        rows.append(row)
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        shift, metric = row["difference"], row["metric"]
        verdict = "" if math.isnan(shift) else matching.verdict(shift, p, metric)
        row |= {"p_holm": p, "verdict": verdict}
    return pd.DataFrame(rows)


def compare(a: str, b: str, results: Sequence[Result]) -> Comparison:
    """A minus B for every task that both have with the same suite, recipe and seeds.

    Raises UserError if a name is unknown, or stands for several weights.
    """
    left, right = (matching.by_job(matching.find(results, which)) for which in (a, b))
    labels = matching.job_labels([*left, *right])
    skipped = [
        f"{labels[job]}: only {a if job in left else b} has it with this recipe ({job.recipe})"
        for job in sorted(left.keys() ^ right.keys())
    ]
    found: list[tuple[Job, Difference, float, float]] = []
    for job in sorted(left.keys() & right.keys()):
        lone = {r.cell.seed for r in left[job]} ^ {r.cell.seed for r in right[job]}
        try:
            difference = matching.contrast(left[job], right[job])
        except UserError as error:
            skipped.append(f"{labels[job]}: {error}")
            continue
        if lone:
            skipped.append(f"{labels[job]}: seeds that only one has: {sorted(lone)}")
        both = [[r for r in group[job] if r.cell.seed not in lone] for group in (left, right)]
        found.append((job, difference, matching.mean(both[0]), matching.mean(both[1])))
    rows = []
    for (job, d, score_a, score_b), p in zip(found, holm([d.p for _, d, _, _ in found])):
        metric = left[job][0].score.metric
        row = Compared(
            labels[job], metric, score_a, score_b, d.estimate, d.low, d.high, d.speakers,
            d.utterances, d.seeds, d.p, p, matching.verdict(d.estimate, p, metric), d.reason,
        )  # fmt: skip
        rows.append(row)
    return Comparison(a, b, rows, skipped)


def show(table: pd.DataFrame) -> str:
    """A `summary` as aligned text, four tasks to a block."""
    tasks = sorted(table.task.unique())
    parts = [tasks[i : i + TASKS_ABREAST] for i in range(0, len(tasks), TASKS_ABREAST)]
    blocks = [text(_grid(table, part)) for part in parts]
    return "\n\n".join([*blocks, "\n".join(_notes(table))])


def write(root: Path, results: Sequence[Result], reference: str | None = None) -> list[Path]:
    """Write `table.csv` (a row per upstream and task) and `table.md`, every suite in both.

    Where a suite has no results of the reference, its differences are left out and a note says so:
    at the end of a long run a page without them is better than none. Raises UserError if `root`
    cannot be written.
    """
    tables, pages = [], ["# Results"]
    for suite in matching.suites(results):
        notes = []
        try:
            table = summary(results, suite, reference)
        except UserError as error:
            table, notes = summary(results, suite), [f"no differences: {error}"]
        tables.append(table)
        grid = markdown(_grid(table, sorted(table.task.unique())))
        pages += [f"## {suite}", grid, "\n".join(f"- {x}" for x in _notes(table) + notes)]
    contents = {
        root / "table.csv": pd.concat(tables).to_csv(index=False) if tables else "",
        root / "table.md": "\n\n".join(pages) + "\n",
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            write_atomic(path, content)
    except OSError as error:
        raise UserError(f"cannot write into {root}: {error.strerror}; check permissions") from None
    return list(contents)


def render(comparison: Comparison, form: Format = "text") -> str:
    """A comparison for the terminal, a page, a program or a paper."""
    if form == "json":
        rows = [row._asdict() for row in comparison.rows]
        content = {"a": comparison.a, "b": comparison.b, "rows": rows}
        return json.dumps(finite({**content, "skipped": comparison.skipped}), indent=1)
    if form == "csv":
        table = pd.DataFrame(comparison.rows, columns=Compared._fields)
        return table.assign(upstream_a=comparison.a, upstream_b=comparison.b).to_csv(index=False)
    grid = ["task|metric|A|B|A - B|95 % interval|speakers|utterances|seeds|p Holm|A is".split("|")]
    for r in comparison.rows:
        span = "unknown" if math.isnan(r.low) else f"[{r.low:+.2f}, {r.high:+.2f}]"
        p = "" if math.isnan(r.p_holm) else "<.001" if r.p_holm < 0.001 else f"{r.p_holm:.3f}"
        counts = [str(r.speakers), str(r.utterances), str(r.seeds)]
        scores = [f"{r.a:.2f}", f"{r.b:.2f}", f"{r.difference:+.2f}", span]
        grid.append([r.task, _metric(r.metric), *scores, *counts, p, r.verdict])
    notes = [
        f"A = {comparison.a}",
        f"B = {comparison.b}",
        "95 % interval: paired by utterance, t over speakers and head seeds",
        f"better, worse: Holm-corrected p < {SIGNIFICANT} over the tasks shown",
        *(f"{r.task}: {r.reason}" for r in comparison.rows if r.reason),
        *(f"not compared: {line}" for line in comparison.skipped),
    ]
    if form == "text":
        return "\n".join([text(grid), "", *notes])
    if form == "md":
        return "\n".join([markdown(grid), "", *(f"- {note}" for note in notes)])
    if form == "latex":
        return "\n".join([latex(grid), *(f"% {note}" for note in notes)])
    raise UserError(f"unknown format {form!r}{near_miss(form, get_args(Format))}")


def superb_score(values: Mapping[str, float], constants: str = "leaderboard-2022") -> float | None:
    """SUPERB score: 0 is FBANK, 1000 the best upstream of a named set of constants.

    values: metric (pr_per, sf_f1, ... as in results/published/constants.csv) -> per cent. Metrics
    are averaged inside a task, then tasks; None if one is missing. Formula: SUPERB leaderboard,
    `overall_metrics.js`. Print the set's name with the score: no two sets agree.
    """
    table = pd.read_csv(CONSTANTS)
    if constants not in set(table["set"]):
        raise UserError(f"unknown constants {constants!r}{near_miss(constants, set(table['set']))}")
    table = table[table["set"] == constants]
    gain = 1000 * (table.metric.map(values) - table.fbank) / (table.sota - table.fbank)
    return None if gain.isna().any() else float(gain.groupby(table.task).mean().mean())


def _metric(name: str) -> str:
    return f"{METRICS[name].label} {METRICS[name].arrow}"


def _plus(value: float, low: float, form: str = ".2f") -> str:
    """`5.75 ±0.40`; the intervals are symmetric."""
    shown = round(value, 2) + 0.0  # no -0.00
    return f"{shown:{form}} ±" + ("?" if math.isnan(low) else f"{value - low:.2f}")


def _grid(table: pd.DataFrame, tasks: Sequence[str]) -> Grid:
    cells = {(r.upstream, r.task): r for r in table.itertuples()}
    metrics = dict(zip(table.task, table.metric))
    grid = [["upstream", *(f"{task} {_metric(metrics[task])}" for task in tasks)]]
    for name in table.upstream.unique():
        row = [name]
        for task in tasks:
            cell = cells.get((name, task))
            shown = _plus(cell.score, cell.low) if cell else "-"
            if cell and cell.verdict:
                shown += f"\n{_plus(cell.difference, cell.diff_low, '+.2f')} {cell.verdict}"
            row.append(shown)
        grid.append(row)
    return grid


def _notes(table: pd.DataFrame) -> list[str]:
    """What a reader must know to read the numbers, one line each."""
    notes = ["±: half of the 95 % interval, t over speakers and head seeds"]
    if table.reference[0]:
        compared = int((table.verdict != "").sum())
        notes += [
            f"second line: difference to {table.reference[0]}, paired by utterance",
            f"better, worse: Holm-corrected p < {SIGNIFICANT} over {compared} differences",
        ]
    for task, rows in table.groupby("task"):
        counts = (f"{_span(rows[c])} {c}" for c in ("utterances", "speakers", "seeds"))
        notes.append(f"{task}: {', '.join(counts)}")
    noted = table[table.note != ""]
    return notes + [f"{r.upstream}, {r.task}: {r.note}" for r in noted.itertuples()]


def _span(column: pd.Series) -> str:
    low, high = column.min(), column.max()
    return str(low) if low == high else f"{low}-{high}"
