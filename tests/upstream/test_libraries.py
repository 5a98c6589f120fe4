"""A user's own class in any environment: a library is never taken for the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import upstream
from tests.upstream.test_user_class import edit, fingerprint, folder  # noqa: F401 - a fixture
from upstream.common import PROJECT, libraries

SITE = "lib/python3.11/site-packages"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is remembered of the environment is asked again, and forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    questions = [value for value in vars(libraries).values() if hasattr(value, "cache_clear")]
    for question in questions:
        question.cache_clear()
    yield
    for question in questions:
        question.cache_clear()


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def is_users(file: Path, path: Path, name: str = "thing") -> bool:
    module = ModuleType(name)
    module.__file__ = str(file)
    return libraries.is_users(name, module, path)


def plain(root: Path) -> Path:
    return root / "helper.py"


def deep(root: Path) -> Path:
    return root / "helpers" / "deep" / "one.py"


def linked(root: Path) -> Path:
    """A folder of the user's elsewhere, reached by a link."""
    write(root.parent / "shared" / "one.py")
    (root / "link").symlink_to(root.parent / "shared")
    return root / "link" / "one.py"


def resolved(root: Path) -> Path:
    """The user's folder is itself a link, and the module knows where that leads."""
    root.rename(root.parent / "disk")
    root.symlink_to(root.parent / "disk")
    return root.parent / "disk" / "one.py"


def beside_project(root: Path) -> Path:
    """setuptools leaves this behind where a project of the user's is installed with -e."""
    write(root / "helpers.egg-info" / "top_level.txt", "helpers\n")
    sys.path.insert(0, str(root))
    return root / "helpers" / "one.py"


def archived(root: Path) -> Path:
    return root / "helpers.zip" / "helpers" / "one.py"


def added(root: Path) -> Path:
    """A folder beside the user's that only the user's file puts on the path."""
    sys.path.insert(0, str(root.parent / "shared"))
    return root.parent / "shared" / "one.py"


@pytest.mark.parametrize(
    "place",
    [plain, deep, linked, resolved, beside_project, archived, added],
    ids=lambda f: f.__name__,
)
def test_the_users_modules(place: Callable[[Path], Path], tmp_path: Path) -> None:
    root = tmp_path / "user"
    path = write(root / "mine.py")
    assert is_users(place(root), path)


def test_the_users_modules_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PYTHONPATH, and not below the user's file."""
    path, file = write(tmp_path / "user" / "mine.py"), write(tmp_path / "work" / "src" / "one.py")
    monkeypatch.setenv("PYTHONPATH", str(file.parent))
    assert not is_users(file, path)
    monkeypatch.chdir(tmp_path / "work")
    assert is_users(file, path)


def test_a_package_on_the_path_that_the_users_file_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "work" / "package" / "upstreams" / "mine.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "work"))
    assert is_users(tmp_path / "work" / "package" / "helper.py", path)


def environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return root.parent / "env" / SITE / "library" / "__init__.py"


def below(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A venv in the user's folder."""
    return root / ".venv" / SITE / "library" / "__init__.py"


def link_below(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(root.parent / "env" / SITE / "library.py")
    (root / "venv").symlink_to(root.parent / "env")
    return root / "venv" / SITE / "library.py"


def links_into_site(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As uv installs with --link-mode symlink, seen from the cache's side."""
    target = write(root.parent / "env" / SITE / "library.py")
    (root / "library.py").symlink_to(target)
    return root / "library.py"


def debian(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return root / "usr/lib/python3/dist-packages/library.py"


def egg(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return root / "library-1.0-py3.11.egg" / "library.py"


def user_site(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(libraries.site, "getusersitepackages", lambda: str(root / "odd"))
    return root / "odd" / "library.py"


def python_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(root.parent / "modules")]))
    return root.parent / "modules" / "library.py"


def python_path_zip(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(root.parent / "modules.zip"))
    return root.parent / "modules.zip" / "library.py"


def target(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`pip install --target` into the user's own folder."""
    write(root / "library-1.0.dist-info" / "RECORD", "library/__init__.py,sha256=x,1\n")
    monkeypatch.syspath_prepend(str(root))
    return root / "library" / "deep.py"


def editable(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`pip install -e` of a clone that lies below the user's folder."""
    site, clone = root.parent / "env" / SITE, root / "clone of it"
    write(site / "library-1.0.dist-info" / "METADATA", "Name: library\nVersion: 1.0\n")
    facts = {"url": clone.as_uri(), "dir_info": {"editable": True}}
    write(site / "library-1.0.dist-info" / "direct_url.json", json.dumps(facts))
    write(site / "other-1.0.dist-info" / "direct_url.json", "{")  # broken, and not ours
    monkeypatch.syspath_prepend(str(site))
    return clone / "src" / "library" / "__init__.py"


def pth(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As conda-develop and older setuptools do."""
    site = root.parent / "odd"
    write(site / "some.pth", f"import os\n# a comment\n{root.parent / 'clone'}\n")
    monkeypatch.setattr(libraries.site, "getusersitepackages", lambda: str(site))
    return root.parent / "clone" / "library.py"


def standard(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return Path(str(json.__file__))


def ours(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(PROJECT)
    return Path(str(upstream.__file__))


LIBRARIES = [
    environment, below, link_below, links_into_site, debian, egg, user_site, python_path,
    python_path_zip, target, editable, pth, standard, ours,
]  # fmt: skip


@pytest.mark.parametrize("place", LIBRARIES, ids=lambda f: f.__name__)
def test_a_library_wherever_it_lies(
    place: Callable[[Path, pytest.MonkeyPatch], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "user"
    path = write(root / "mine.py")
    monkeypatch.chdir(root)
    file = place(root, monkeypatch)
    libraries._python_folders.cache_clear()
    assert not is_users(file, path)
    assert is_users(root / "helper.py", path)


def test_torch_is_a_library_even_in_the_users_folder(tmp_path: Path) -> None:
    """Whoever develops it there: it does not survive a second import."""
    path = write(tmp_path / "mine.py")
    assert not is_users(tmp_path / "torch" / "nn" / "modules.py", path, "torch.nn.modules")


CLASS = """
import library
import torch
from helpers import scale

from upstream.base import Hidden, Upstream


class Mine(Upstream):
    num_layers, dim, stride = 1, 1, 160

    def forward(self, wavs, lens):
        return Hidden(scale.scaled(wavs[None, :, ::160, None]), (lens + 159) // 160)
"""
COUNTING = "import os\nos.environ['RUNS'] = os.environ.get('RUNS', '') + 'x'\n"


def test_a_library_on_the_path_is_run_once_and_not_hashed(tmp_path: Path) -> None:
    """In a process of its own; the user's helper is in a namespace package and counts."""
    path = write(tmp_path / "user" / "mine.py", CLASS)
    helper = write(
        tmp_path / "user" / "helpers" / "scale.py", "def scaled(x):\n    return 2.0 * x\n"
    )
    library = write(tmp_path / "apps" / "library" / "__init__.py", COUNTING)
    code = (
        "import os, sys, pathlib, upstream\n"
        "spec, library, helper = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(spec.split(':')[0]))\n"
        "def show(file, text):\n"
        "    if file: pathlib.Path(file).write_text(text)\n"
        "    print(upstream.load(spec).fingerprint())\n"
        "show('', '')\n"
        "show(library, 'NEW = 1')\n"
        "show(helper, 'def scaled(x):\\n    return 2.1 * x')\n"
        "print(os.environ['RUNS'])"
    )
    paths = os.pathsep.join([str(library.parents[1]), str(PROJECT)])
    done = subprocess.run(
        [sys.executable, "-c", code, f"{path}:Mine", str(library), str(helper)],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path / "user",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, third, runs = done.stdout.split()
    assert first == second != third
    assert runs == "x"


def test_what_the_users_zip_archive_holds_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "helpers.zip"
    text = CLASS.replace("import library\n", "").replace("helpers import", "zipped.helpers import")
    path = write(tmp_path / "mine.py", text)
    monkeypatch.syspath_prepend(str(archive))
    prints = []
    for gain in ("2.0", "2.1", "2.0"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("zipped/__init__.py", "")
            file.writestr("zipped/helpers/__init__.py", "")
            file.writestr("zipped/helpers/scale.py", f"def scaled(x):\n    return {gain} * x\n")
        prints.append(upstream.load(f"{path}:Mine").fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_the_fingerprint_is_what_it_was(folder: Path) -> None:  # noqa: F811
    """Of a class in an ordinary environment, before libraries were told by where they lie."""
    assert fingerprint(folder) == "b841e99a8305"
    edit(folder / "helpers" / "deep.py", "1.0", "1.5")
    assert fingerprint(folder) != "b841e99a8305"
