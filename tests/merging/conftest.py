"""What the tests of merging share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_figure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second for each of hundreds of runs: only where it is asked."""
    if "figure" not in request.node.name:
        monkeypatch.setattr("merging.tuning.build.draw", lambda *_: True)
