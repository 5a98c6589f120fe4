"""What each row of the page cost, what made it, and the command that makes it again."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from downstream import recipe
from downstream.report.groups import grouped, name, version
from downstream.report.markup import COMMAND, h, html_table, th
from downstream.report.results import Result
from downstream.report.unlike import flat
from downstream.report.view import View
from upstream.common.errors import UserError
from upstream.common.schema import build, read_yaml
from upstream.common.text import portable


def costs(view: View) -> str:
    """Seconds of every cell, and what it took to build an upstream."""
    tasks, body = sorted({version(r) for r in view.results}), []
    for upstream, mine in view.upstreams.items():
        cells = [th(upstream)]
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
        + html_table(head, body, "sorts")
    )


def provenance(view: View) -> str:
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
            f"fingerprint {mine[0].cell.fingerprint}; "
            f"from {portable(scores[0].source) or 'unknown'}",
            f"{', '.join(sorted(versions))}; git {', '.join(sorted(git))}; {devices}; "
            f"{' to '.join(dict.fromkeys([made[0], made[-1]]))}",
        ]
        lines = "".join(f"<small>{h(fact)}</small>" for fact in facts)
        commands = "".join(f"<code>{h(line)}</code><br>" for line in _commands(view, mine))
        body.append([th(upstream), f'<td class="free">{commands}{lines}</td>'])
    recipes = []
    for task, mine in sorted(grouped(view.results, version).items()):
        warnings = sorted({portable(w) for r in mine for w in r.score.warnings})
        text = yaml.safe_dump(portable(mine[0].score.recipe), sort_keys=False, allow_unicode=True)
        said = "".join(f"\n# {w}" for w in warnings[:20])
        recipes.append(
            f"<details><summary>recipe of {h(view.called[task])}, revision {h(task.revision)}"
            f"</summary><pre>{h(text)}{h(said)}</pre></details>"
        )
    return (
        "<h3>Provenance</h3><p>The command that makes each row again, and what made it.</p>"
        + html_table(["upstream", "again"], body)
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
    upstream, suite = shlex.quote(results[0].cell.upstream), suite_word(view.suite)
    return [
        f"{COMMAND} --upstream {upstream} --suite {suite} --downstream "
        f"{shlex.quote(','.join(tasks))} {' '.join(words)}".rstrip()
        for words, tasks in groups.items()
    ]


def suite_word(suite: str) -> str:
    """What --suite takes; of a folder elsewhere a result knows no more than the name."""
    return shlex.quote(suite if _own(suite) else f"PATH/TO/{suite}")


def _own(suite: str) -> Path | None:
    """The folder of a suite that comes with the project: a record's name leads nowhere else."""
    folder = recipe.RECIPES / suite
    return folder if suite == Path(suite).name and folder.is_dir() else None


def _changes(result: Result) -> list[str]:
    """KEY=VALUE where the result's recipe is not the suite's, if the suite is known here."""
    here = _recipe(result.cell.suite, result.cell.task)
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
        for key, value in flat(portable(result.score.recipe)).items()
        if here.get(key, value) != value
    ]


@functools.cache
def _recipe(suite: str, task: str) -> dict[str, Any]:
    """The leaves of a recipe of a suite that comes with the project; empty if it has none.

    It is read as YAML alone: what a recipe names is not run for a record that names the recipe.
    """
    folder = _own(suite)
    if folder is None or task != Path(task).name:
        return {}
    path = folder / f"{task}.yaml"
    try:
        names = {"name": task, "suite": suite, "path": str(path)}
        return flat(portable(build(recipe.Recipe, read_yaml(path), str(path), **names).as_dict()))
    except UserError:
        return {}
