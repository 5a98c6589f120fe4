"""What the tests of merging share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_figure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs of stage 1, a quarter of a second for each figure: only where it is asked."""
    if "figure" not in request.node.name:
        monkeypatch.setattr("merging.tuning.build.draw", lambda *_: True)
