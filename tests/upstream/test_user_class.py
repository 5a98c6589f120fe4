"""A user's class gets another fingerprint with every edit that may change its output."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import upstream
from upstream.common import PROJECT

MINE = """
import sys
from pathlib import Path

import numpy as np
import torch
from upstream.base import Hidden, Upstream

sys.path.insert(0, str(Path(__file__).parent))
import helpers.scale
from helpers.base import Base

GAIN = 1.0
TABLE = np.load(Path(__file__).with_name("table.npy"))


def shift(x):
    return x + 0.25


class Mine(Base):
    num_layers, dim, stride = 1, 1, 160

    def __init__(self):
        super().__init__()
        self.kept = {"w": [torch.load(Path(__file__).with_name("kept.pt"))]}

    def forward(self, wavs, lens):
        late = torch.load(Path(__file__).with_name("late.pt"))
        x = shift(wavs[None, :, ::160, None]) * GAIN * TABLE[0] * self.kept["w"][0] * late
        return Hidden(helpers.scale.scaled(self.common(x)).float(), (lens + 159) // 160)
"""
BASE = """
from upstream.base import Upstream
from . import deep


class Base(Upstream):
    def common(self, x):
        return x - deep.OFFSET
"""
SCALE = """
def scaled(x):
    return 2.0 * x
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, the modules that it imports, and the tensors that it loads."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    for path, text in {
        tmp_path / "mine.py": MINE,
        helpers / "__init__.py": "",
        helpers / "base.py": BASE,
        helpers / "deep.py": "OFFSET = 1.0\n",
        helpers / "scale.py": SCALE,
    }.items():
        path.write_text(text)
    np.save(tmp_path / "table.npy", np.ones(3))
    for name in ("kept.pt", "late.pt"):
        torch.save(torch.ones(1), tmp_path / name)
    return tmp_path


def fingerprint(folder: Path) -> str:
    return upstream.load(f"{folder / 'mine.py'}:Mine").fingerprint()


def edit(path: Path, old: str, new: str) -> None:
    """Of the same size and within the second: nothing but the content tells."""
    assert len(old) == len(new) and old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mine.py", "x + 0.25", "x + 0.26"),  # a helper function
        ("mine.py", "GAIN = 1.0", "GAIN = 1.1"),  # a constant
        ("helpers/base.py", "x - deep", "x * deep"),  # the base class
        ("helpers/scale.py", "2.0 * x", "2.1 * x"),  # a module of the user's
        ("helpers/deep.py", "1.0", "1.5"),  # one that this imports in turn
    ],
)
def test_every_edit_of_the_code_counts(file: str, old: str, new: str, folder: Path) -> None:
    before, wav = fingerprint(folder), (torch.ones(1, 320), torch.tensor([320]))
    assert fingerprint(folder) == before
    plain = upstream.load(f"{folder / 'mine.py'}:Mine")(*wav).layers
    edit(folder / file, old, new)
    assert fingerprint(folder) != before
    assert not torch.equal(upstream.load(f"{folder / 'mine.py'}:Mine")(*wav).layers, plain)
    edit(folder / file, new, old)
    assert fingerprint(folder) == before


@pytest.mark.parametrize("name", ["kept.pt", "table.npy"])
def test_every_tensor_that_is_held_counts(name: str, folder: Path) -> None:
    """However little it changes, and though it is no parameter."""
    before = fingerprint(folder)
    if name == "table.npy":
        np.save(folder / name, np.array([1, 1, 1 + 1e-12]))
    else:
        torch.save(torch.ones(1) + 1e-6, folder / name)
    assert fingerprint(folder) != before


def test_what_is_read_while_it_runs_counts_by_the_output(folder: Path) -> None:
    before = fingerprint(folder)
    torch.save(torch.ones(1) * 1.02, folder / "late.pt")
    assert fingerprint(folder) != before


def test_the_fingerprint_is_that_of_another_process_and_place(folder: Path) -> None:
    code = (
        "import sys, torch, upstream\n"
        "for threads in (1, 2):\n"
        "    torch.set_num_threads(threads)\n"
        "    print(upstream.load(sys.argv[1]).fingerprint())"
    )
    moved = shutil.copytree(folder, folder.with_name("elsewhere"))
    run = [sys.executable, "-c", code, f"{moved / 'mine.py'}:Mine"]
    done = subprocess.run(run, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [fingerprint(folder)] * 2


def test_a_class_that_cannot_run_yet_loads(tmp_path: Path) -> None:
    """Its first use says why, and `check` which promise it breaks."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from upstream.base import Upstream\n\n\nclass Mine(Upstream):\n"
        "    num_layers, dim, stride = 1, 1, 160\n"
    )
    model = upstream.load(f"{path}:Mine")
    assert model.evidence["output"] == [] and len(model.fingerprint()) == 12


def test_a_random_class_has_one_fingerprint(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE.replace("x + 0.25", "x + torch.rand(1)"))
    assert fingerprint(folder) == fingerprint(folder)
