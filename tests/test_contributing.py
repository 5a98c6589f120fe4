"""What CONTRIBUTING.md promises: each of its examples works as it stands, from a user's folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny
from tests.test_cli import call, scores
from upstream.common import PROJECT

TEXT = (PROJECT / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"```(?:python|yaml)\n# (mine/\S+)\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, tones: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader of CONTRIBUTING.md has in the end."""
    monkeypatch.setenv("CORPUS", str(tones))
    monkeypatch.chdir(tmp_path)
    for name, content in EXAMPLES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content.replace("$BASE", str(tiny.hf_folder(tmp_path, "hubert"))))
    return tmp_path / "mine"


def test_every_example_is_short() -> None:
    assert len(EXAMPLES) == 10
    for name, content in EXAMPLES:
        assert len(content.strip().splitlines()) <= 20, name


def test_an_upstream_of_ones_own_keeps_the_promises(mine: Path) -> None:
    assert call("check", "--upstream", "mine/upstream.py:Frames") == 0


def test_the_examples_are_scored_together(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--upstream", "merged,mine/upstream.py:Frames", "--suite", "mine", "--workers", 1)
    assert call(*words) == 0
    table = capsys.readouterr().out
    assert "DIST" in table and "label ACC" in table and "mine/upstream.py:Frames" in table
    cells = scores(Path("results"))
    assert len(cells) == 2 * 2 * 3  # upstreams, tasks, seeds
    better = {key: value for key, value in cells.items() if "Frames label" in key}
    assert min(better.values()) > 50, "tones of three pitches are told apart by their frames"
    assert call("compare", "merged", "mine/upstream.py:Frames") == 0
    assert "DIST" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("task.py", "ORDER.index(reference) - ", "0.5 + ORDER.index(reference) - "),
        ("head.py", "nn.Identity()", "nn.Linear(dim, dim)"),
        ("corpus.py", '"train", "dev"', '"dev", "train"'),
    ],
)
def test_an_edit_is_another_cell(mine: Path, file: str, old: str, new: str) -> None:
    """Results are found by the content of the user's files, wherever they lie."""
    from downstream import recipe
    from upstream.common import user_code

    before = recipe.load(mine / "ordinal.yaml").hash
    elsewhere = mine.rename(mine.with_name("moved"))
    user_code._run_once.cache_clear()
    assert recipe.load(elsewhere / "ordinal.yaml").hash == before
    content = (elsewhere / file).read_text()
    assert old in content
    (elsewhere / file).write_text(content.replace(old, new))
    user_code._run_once.cache_clear()
    assert recipe.load(elsewhere / "ordinal.yaml").hash != before
