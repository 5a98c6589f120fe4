"""Coverage, false verdicts and widths, simulated: worlds like those of the demo's tasks.

A world has four upstreams that are equally good. What is measured of each: speakers, who differ and
differ from upstream to upstream, head seeds, and chance on each speaker with each head. Standard
deviations are near those that the demo's 64 cells show (analysis of variance over upstreams, seeds
and speakers); `common` is the part of a seed that is the same for all upstreams.

Run `python -m tests.downstream.test_coverage` for the table of the large version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from downstream.report.statistics import Interval, minus, seed_spread
from downstream.report.summary import Sample


class World(NamedTuple):
    """Standard deviations in points: of the difference over speakers, of a head over seeds, ..."""

    speaker: float  # an upstream's part for one speaker
    seed: float  # of a head as a whole
    noise: float  # of a head on one speaker
    common: float  # of a seed, the same for all upstreams


WORLDS = {
    "asr": World(5.0, 3.6, 8.0, 1.0),
    "pr": World(2.0, 3.0, 2.0, 0.5),
    "er": World(6.0, 1.3, 5.0, 0.3),
    "sid": World(6.0, 0.5, 6.0, 0.0),
}
MARGIN = 3.0  # points


class Outcome(NamedTuple):
    """Shares of worlds, and half-widths in points."""

    coverage: float
    false_verdicts: float  # p < .05 though the two are equally good
    narrow: float  # at 5 % of worlds
    middle: float
    wide: float  # at 95 %

    @property
    def ratio(self) -> float:
        return self.wide / self.narrow


def draws(
    world: World, speakers: int, repeats: int, upstreams: int = 4, seeds: int = 3, gap: float = 0.0
) -> Iterator[list[Sample]]:
    """Upstreams of equal speakers; the first is `gap` points above the others."""
    rng = np.random.default_rng([speakers, upstreams, seeds])
    for _ in range(repeats):
        who = 3 * world.speaker * rng.normal(size=(1, speakers, 1))
        who = who + world.speaker * rng.normal(size=(upstreams, speakers, 1))
        head = world.common * rng.normal(size=(1, 1, seeds))
        head = head + world.seed * rng.normal(size=(upstreams, 1, seeds))
        values = 50 + who + head + world.noise * rng.normal(size=(upstreams, speakers, seeds))
        values[0] += gap
        whole = values.mean(1)
        without = whole[:, None] + (whole[:, None] - values) / (speakers - 1)
        yield [Sample(*each) for each in zip(whole, without)]


def differences(*args: float, **world: float) -> Iterator[Interval]:
    for peers in draws(*args, **world):  # type: ignore[arg-type]
        yield minus(peers[0], peers[1], seed_spread(peers))


def outcome(world: World, speakers: int, repeats: int, **how: int) -> Outcome:
    results = list(differences(world, speakers, repeats, **how))  # type: ignore[arg-type]
    covers = np.array([r.low < 0 < r.high for r in results])
    narrow, middle, wide = np.quantile([r.high - r.value for r in results], [0.05, 0.5, 0.95])
    wrong = np.mean([r.p < 0.05 for r in results])
    return Outcome(covers.mean(), float(wrong), narrow, middle, wide)


@pytest.mark.parametrize("speakers", [5, 12, 40, 100])
@pytest.mark.parametrize("name", WORLDS)
def test_intervals_cover_and_are_no_lottery(name: str, speakers: int) -> None:
    """1,000 worlds: the sampling error of a coverage of 95 % is 0.7 %."""
    result = outcome(WORLDS[name], speakers, 1000)
    assert 0.92 <= result.coverage <= 0.98
    assert result.false_verdicts <= 0.07
    # of few speakers t itself is uncertain: chi-square of 4 degrees of freedom varies as much
    assert result.ratio <= (3.7 if speakers < 9 else 2.6)


@pytest.mark.slow
@pytest.mark.parametrize("speakers", [9, 20, 40, 100])
@pytest.mark.parametrize("name", WORLDS)
def test_as_many_worlds_as_a_promise_needs(name: str, speakers: int) -> None:
    """4,000 worlds of four upstreams with three seeds, 7 s each: sampling error 0.35 %."""
    result = outcome(WORLDS[name], speakers, 4000)
    assert 0.93 <= result.coverage <= 0.97
    assert result.false_verdicts <= 0.06
    assert result.ratio <= 2.5


def main() -> None:
    """The table of the report."""
    print("case  upstreams speakers  coverage  false  half-width at 5, 50, 95 %   ratio")
    for name, world in WORLDS.items():
        for upstreams in (2, 4, 6):
            for speakers in (5, 6, 9, 12, 20, 40, 100):
                if upstreams != 4 and speakers != 40:
                    continue
                r = outcome(world, speakers, 10_000, upstreams=upstreams)
                print(
                    f"{name:5} {upstreams:9} {speakers:8} {100 * r.coverage:9.1f} "
                    f"{100 * r.false_verdicts:6.1f} {r.narrow:9.2f} {r.middle:6.2f} {r.wide:6.2f} "
                    f"{r.ratio:10.2f}"
                )


if __name__ == "__main__":
    main()
