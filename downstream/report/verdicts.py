"""What may be said of a difference, and the sentence that says it of an upstream.

Two questions are asked of every task. Is there a difference? A two-sided t test: *better*, *worse*.
Is the upstream worse than the reference by a margin or more? A one-sided test of that
(non-inferiority): where it is refuted the task is *kept*. Both tests use the same standard error
and degrees of freedom, the same speakers (or folds) and heads.

Multiplicity: the tasks of two upstreams in one suite are a family, for each of the two questions
one of its own. Holm's procedure keeps the probability that any *better* or *worse* of a pair is
false, and that any *kept* is, each below 5 % whatever depends on whatever. On one task only one of
both can be false, for the claims are false in different worlds: a difference where there is none,
*kept* where at least the margin was lost. So nothing has to be paid for asking both questions of
one difference (Morikawa and Yoshida 1995; EMA CPMP/EWP/482/99). Of a pair with tasks of both kinds,
any false word at all has a probability below 10 %, the sum.

A difference that is shown and lies within the margin, at the same time: CONSORT's extension calls
it non-inferior and inferior at once (Piaggio et al. 2012, JAMA 308:2594, figure 1); here it is
*slightly worse*, counted neither as kept nor as worse.

The margin is 5 % of the reference's errors unless --margin says otherwise, so that it means the
same where a task is easy and where it is hard. Why 5 %: from one generation of Base models to the
next, HuBERT to WavLM, errors on SUPERB's tasks fell by 9 % in the median
(results/published/superb.csv); what loses less than half of such a step has kept what it had, as
medicine asks for half of the effect of a treatment (FDA, Non-Inferiority Clinical Trials, 2016).
The reference's errors are taken for known: their own uncertainty moves a margin by some per cent of
it. Where there are no errors to take a share of (SUPERB's score), nothing is *kept*.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from scipy.special import ndtri

from downstream.base import Direction
from downstream.report.statistics import Interval
from upstream.common.errors import UserError, near_miss

SIGNIFICANT = 0.05
SEEDS = 3  # fewer say too little of how heads differ (tests/downstream/test_statistics.py)
POWER = 0.8
MOST_TIMES = 20  # of speakers or seeds; with more, nothing is decided that a reader can wait for

Verdict = Literal[
    "", "better", "kept", "slightly worse", "worse", "undecided", "withheld", "seen", "unknown",
]  # fmt: skip


class Margin(NamedTuple):
    """What may be lost: points, or per cent of the reference's errors."""

    amount: float
    relative: bool

    def points(self, better: Direction, reference: float) -> float:
        """Of a metric in per cent where the reference scores `reference`."""
        errors = reference if better == "lower" else 100 - reference
        return self.amount * max(0.0, errors) / 100 if self.relative else self.amount


DEFAULT = Margin(5.0, True)
Margins = Mapping[str, Margin]  # by task; "" for all others


def read_margins(text: str, tasks: Collection[str] | None = None) -> dict[str, Margin]:
    """`5%`, `1.5` (points), `er=2,asr=10%`, or `3%,er=2`; tasks: that there are.

    Raises UserError for what is no margin, an unknown task or one that is named twice.
    """
    margins: dict[str, Margin] = {}
    for part in text.split(","):
        task, equals, size = part.strip().rpartition("=")
        number = size.strip()
        relative = number.endswith("%")
        try:
            amount = float(number.removesuffix("%"))
        except ValueError:
            amount = math.nan
        if not 0 < amount <= 100 or (equals and not task):
            raise UserError(
                f"--margin {text!r}: {part!r} is no margin; write points (1.5), per cent of the "
                "reference's errors (5%), or a task's own (er=2,asr=10%)"
            )
        if task in margins:
            raise UserError(f"--margin {text!r} names {task or 'all tasks'} twice")
        if task and tasks is not None and task not in tasks:
            raise UserError(f"--margin: no task {task!r} is compared{near_miss(task, tasks)}")
        margins[task] = Margin(amount, relative)
    return margins


def margin_of(task: str, margins: Margins) -> Margin:
    """The task's own, that of all, or DEFAULT."""
    return margins.get(task) or margins.get("") or DEFAULT


def judge(p: float, p_kept: float, wins: bool, seen: bool, reference_seen: bool) -> Verdict:
    """What a difference with a p says of an upstream.

    p, p_kept: adjusted; p_kept may be NaN. wins: the difference is on the upstream's side.
    seen: the upstream, or the reference, has heard the answers; it can neither win nor keep.
    """
    kept = p_kept < SIGNIFICANT  # NaN is not
    if p < SIGNIFICANT:
        if seen if wins else reference_seen:
            return "seen"
        if wins:
            return "better"
        return "slightly worse" if kept else "worse"
    if kept:
        return "seen" if seen else "kept"
    return "undecided"


def needed(interval: Interval, margin: float, better: Direction, tests: int, unit: str) -> str:
    """What would decide: `about 20 more speakers or 3 more seeds`; "" if no realistic number does.

    So many that with a probability of 80 % a difference would be shown, or be within the margin, if
    the truth were what is estimated. More of one kind leave the other's part of the variance as it
    is; where neither suffices alone, both are needed.
    """
    spread, value = interval.standard_error, interval.value
    if not spread > 0 or not interval.clusters:
        return ""
    power = float(ndtri(POWER))
    gain = -value if better == "lower" else value
    target = abs(value) / (float(ndtri(1 - SIGNIFICANT / 2 / tests)) + power)
    if margin > 0:
        target = max(target, (gain + margin) / (float(ndtri(1 - SIGNIFICANT / tests)) + power))
    by_seed = interval.seed_variance
    by_cluster = max(0.0, spread**2 - by_seed)
    ways = []
    for part, rest, count, word in (
        (by_cluster, by_seed, interval.clusters, unit),
        (by_seed, by_cluster, interval.seeds, "seeds"),
    ):
        left = target**2 - rest
        times = part / left if left > 0 else math.inf
        if part > 0 and times <= MOST_TIMES:
            ways.append(_more(max(1, math.ceil(count * times) - count), word))
    if ways:
        return f"about {' or '.join(ways)}"
    times = spread**2 / target**2 if target > 0 else math.inf
    if not by_seed or not by_cluster or times > MOST_TIMES:
        return ""
    return f"about {times:.1f} times as many {unit} and seeds"


def _more(count: int, word: str) -> str:
    """`1 more seed`, `20 more speakers`."""
    if count > 10:  # no one can say it more exactly
        count = 5 * math.ceil(count / 5) if count <= 100 else 50 * math.ceil(count / 50)
    return f"{count} more {word.removesuffix('s') if count == 1 else word}"


class Finding(NamedTuple):
    """A verdict on an upstream in one task, and what would decide an undecided one."""

    task: str
    verdict: Verdict
    needed: str = ""


PHRASES: dict[Verdict, str] = {
    "better": "better on {}", "kept": "kept {}", "slightly worse": "slightly worse on {}",
    "worse": "worse on {}", "undecided": "{} undecided", "seen": "{} heard in fine-tuning",
    "withheld": "{} without a verdict (too few seeds)", "unknown": "{} without a verdict",
}  # fmt: skip


def answer(upstream: str, findings: Sequence[Finding]) -> str:
    """`merged: better on er; kept asr, sid; pr undecided (about 20 more speakers)`.

    Of the verdicts alone, each task once, in the order of PHRASES.
    """
    parts = []
    for verdict, phrase in PHRASES.items():
        groups: dict[str, list[str]] = {}
        for finding in findings:
            if finding.verdict == verdict:
                groups.setdefault(finding.needed, []).append(finding.task)
        for more, tasks in groups.items():
            parts.append(phrase.format(", ".join(tasks)) + (f" ({more})" if more else ""))
    return f"{upstream}: {'; '.join(parts) or 'nothing to compare'}"


class Answer(NamedTuple):
    """Of an upstream, against a reference."""

    reference: str
    sentence: str


def answer_lines(answers: Sequence[Answer]) -> list[str]:
    """The sentences below their references."""
    shown: list[str] = []
    for reference in dict.fromkeys(each.reference for each in answers):
        shown.append(f"against {reference}:")
        shown += [f"  {each.sentence}" for each in answers if each.reference == reference]
    return shown
