"""What the page says of one suite of a results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from downstream.report import curves, figures, heat, table
from downstream.report.figures import Figure
from downstream.report.groups import Labels, Name, grouped, labels, name, results_of
from downstream.report.layers import layer_weights
from downstream.report.lineage import Lineage, likely_base, lineages
from downstream.report.matrix import Matrix, matrix
from downstream.report.pool import Pool
from downstream.report.published import Published
from downstream.report.results import Result
from downstream.report.table import Table
from downstream.report.verdicts import Margin
from upstream.common.errors import UserError


@dataclass(frozen=True)
class View:
    """One suite of a results folder."""

    suite: str
    results: list[Result]
    table: Table
    reference: str  # as the table calls it; "" if nothing is compared
    called: Labels
    lineage: dict[Name, Lineage]
    matrix: Matrix | None  # of what was fine-tuned from the pre-trained upstream, if anything

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
            "heat": self._across(),
            "alpha": curves.alphas(rows, ref, self.lineage, suite),
            "layers": [weights] if weights else [],
        }

    def _across(self) -> list[Figure]:
        """Ways of fine-tuning by tasks, and what no record says the making of, row by row."""
        found = [heat.crossed(self.matrix)] if self.matrix else []
        made = {self.called[each] for each in self.lineage} if any(found) else set()
        rows = [row for row in self.table.rows if row.upstream not in made]
        return [f for f in [*found, heat.heat(rows, self.reference, self.suite)] if f]


def view(
    suite: str,
    results: Sequence[Result],
    references: Sequence[str] = (),
    published: Sequence[Published] = (),
    margins: Mapping[str, Margin] = {},
) -> View:
    """What the page says of one suite. References that it has no results of are left out."""
    known = [wanted for wanted in references if has(wanted, results)]
    guess = None if known else likely_base(results)
    known += [guess] if guess else []
    pool = Pool(results, margins)
    whole = table.summary(results, suite, known, published, pool)
    called = labels(results)
    first = called[name(results_of(known[0], results)[0])] if known else ""
    made = lineages(results)
    return View(
        suite, list(results), whole, first, called, made, _matrix(results, suite, published, pool)
    )


def _matrix(
    results: Sequence[Result], suite: str, published: Sequence[Published], pool: Pool
) -> Matrix | None:
    try:
        found = matrix(results, suite, published=published, pool=pool)
    except UserError:  # nothing says what anything grew from
        return None
    return found if any(line.seeds for line in found.lines) else None


def has(wanted: str, results: Sequence[Result]) -> bool:
    """Whether there are results of an upstream."""
    try:
        return bool(results_of(wanted, results))
    except UserError:
        return False
