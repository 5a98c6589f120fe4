"""The shape of the house: imports run one way, files stay short, the door opens fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from upstream.common import PROJECT

ROOT = PROJECT
ROOMS = ["upstream", "downstream", "merging"]  # each may import those before it
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way_and_files_stay_short(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    later = {*ROOMS[ROOMS.index(room) + 1 :], "benchmark", "tests"}
    assert not imported(path) & later
    assert len(path.read_text().splitlines()) <= 400


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, benchmark\n"
        "try: benchmark.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pandas', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--upstream merged" in done.stdout


WRITERS = {
    "unlink", "rmtree", "rmdir", "mkdir", "makedirs", "touch", "rename", "replace", "renames",
    "write_text", "write_bytes", "symlink_to", "copyfile", "copytree", "move",
}  # fmt: skip
# places that `disk` gave to write to; what is no file of a results folder
MAY_WRITE = {
    "upstream/features/store.py: rmdir", "downstream/run/beats.py: write_text",
    "downstream/report/share.py: write_bytes", "downstream/commands.py: touch",
    "merging/cost.py: write_text",
    # a folder of downloads is the user's, and lies where the user says
    "upstream/common/download.py: unlink", "upstream/common/unpack.py: mkdir",
    "downstream/fetch.py: rmtree", "downstream/fetch.py: replace",
}  # fmt: skip


def test_files_are_written_and_removed_in_one_module() -> None:
    """A stranger's link is refused in `upstream/common/disk.py`, and nobody goes past it."""
    found = set()
    for path in FILES:
        where = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, owner = node.func.attr, ast.unparse(node.func.value)
            text = name in ("replace", "rename") and owner not in ("os", "path", "Path")
            if name in WRITERS and owner != "disk" and not text:
                found.add(f"{where}: {name}")
    assert found - {f for f in found if "common/disk.py" in f} == MAY_WRITE
