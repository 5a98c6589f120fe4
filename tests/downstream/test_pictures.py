"""Pictures are drawn by another process: what ends it costs a picture, and nothing else."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.downstream.test_table import TASKS, put
from upstream.common import PROJECT, pictures
from upstream.common.errors import UserError

BAR = {
    "mark": "bar",
    "data": {"values": [{"a": 1}, {"a": 2}]},
    "encoding": {"x": {"field": "a", "type": "quantitative"}},
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pictures._end()
    monkeypatch.setattr(pictures, "_fault", "")
    yield
    pictures._end()


def test_a_picture_is_what_the_library_draws() -> None:
    import vl_convert

    assert pictures.draw(BAR) == pictures.draw(BAR) == vl_convert.vegalite_to_svg(BAR).encode()
    assert pictures.draw(BAR, "pdf").startswith(b"%PDF")


def test_a_wrong_specification_costs_one_picture() -> None:
    with pytest.raises(UserError, match="a picture is not drawn"):
        pictures.draw({"mark": "no such mark", "encoding": 5})
    assert pictures.draw(BAR).startswith(b"<svg")


def test_a_renderer_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "renderer.py"
    program.write_text("import os; input(); os.abort()")
    monkeypatch.setattr(pictures, "RENDERER", program)
    for _ in range(2):  # at once the second time
        with pytest.raises(UserError, match=r"ended \(status -6\).* see ulimit -v and ulimit -n"):
            pictures.draw(BAR)
    monkeypatch.setattr(pictures, "_fault", "")
    monkeypatch.setattr(pictures, "PATIENCE", 0.2)
    program.write_text("import time; time.sleep(60)")
    with pytest.raises(UserError, match="no answer in"):
        pictures.draw(BAR)
    assert pictures._renderer is None


def test_a_page_without_pictures_has_its_numbers(tmp_path: Path) -> None:
    """`report` where an address space is limited as grid engines do it."""
    for upstream, rate in (("base", 0.3), ("tuned", 0.2)):
        for task in TASKS:
            for seed in range(2):
                put(tmp_path, upstream, task, seed, rate)
    command = [sys.executable, str(PROJECT / "benchmark.py"), "report", "--reference", "base",
               "--results", str(tmp_path)]  # fmt: skip
    limits = (6 << 30, 6 << 30)
    done = subprocess.run(
        command,
        cwd=PROJECT,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text()
    assert "Minus" in text
    if "<svg" not in text:
        assert done.stderr.count("no picture is drawn") == 1
        assert "no picture is drawn" in text
