"""Which loaded modules are a library's and which the user's, in whatever environment.

A library may lie in this interpreter's site-packages, in another's (`--system-site-packages`,
PYTHONPATH, a venv below the user's folder), in the user's own (`pip --user`), in any folder (`pip
install --target`), or where it is developed (`pip install -e`). Paths are compared as they are
written and as they resolve, since each of these may be a link.
"""

from __future__ import annotations

import functools
import json
import os
import site
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

from upstream.common import PROJECT
from upstream.common.packages import REQUIRED

ROOMS = [PROJECT / room for room in ("upstream", "downstream", "merging")]
INSTALLED = {"site-packages", "dist-packages"}  # of pip and of Debian, in any environment


def is_users(name: str, module: ModuleType, path: Path) -> bool:
    """Whether the loaded module `name` is Python of the user's, seen from the user's file `path`.

    A namespace package is nobody's, it has no file; the modules in it are looked at one by one.
    """
    text = getattr(module, "__file__", None)
    if not isinstance(text, str) or not text.endswith(".py"):
        return False
    if name.partition(".")[0] in REQUIRED:  # wherever torch lies
        return False
    file = Path(text).absolute()
    if _is_installed(file) or _is_installed(file.resolve()):
        return False
    homes = _homes(path)

    def is_elsewhere(folder: Path) -> bool:
        return _below(file, folder) and not any(_below(home, folder) for home in homes)

    if any(map(is_elsewhere, _editable_projects())):
        return False
    if any(_below(file, home) for home in homes):
        return True
    # Of the other folders, those that the environment has on the path are libraries', unless the
    # user works in one; those that the user's file puts there itself are the user's.
    return not any(map(is_elsewhere, _environment_path()))


def _homes(path: Path) -> list[Path]:
    """The file's folder and the one where we stand; a file system's root is nobody's."""
    folders = [path.absolute().parent, Path.cwd()]
    return [folder for folder in folders if folder != Path(folder.anchor)]


def _is_installed(file: Path) -> bool:
    """Whether a file lies where this project, Python or an installer puts modules."""
    if INSTALLED.intersection(file.parts) or any(part.endswith(".egg") for part in file.parts):
        return True
    if any(file.is_relative_to(folder) for folder in [*ROOMS, *_python_folders()]):
        return True
    entries = {Path(entry).absolute() for entry in sys.path if entry}
    for folder in entries.intersection(file.parents):
        if file.relative_to(folder).parts[0] in _recorded_names(folder):
            return True
    return False


def _below(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) or file.resolve().is_relative_to(folder.resolve())


@functools.cache
def _python_folders() -> list[Path]:
    """Folders of the standard library and of installed packages, of this interpreter."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(kind) for kind in kinds] + [str(Path(os.__file__).parent)]
    folders += [*getattr(site, "getsitepackages", list)(), site.getusersitepackages()]
    return [form for folder in folders for form in (Path(folder), Path(folder).resolve())]


@functools.cache
def _recorded_names(folder: Path) -> frozenset[str]:
    """What `pip install --target` put into a folder, by the first part of the name."""
    names: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        lines = record.read_text(errors="replace").splitlines()
        names.update(line.split("/")[0].split(",")[0].strip('"') for line in lines)
    return frozenset(names)


@functools.cache
def _editable_projects() -> list[Path]:
    """The folders of projects that `pip install -e` left where they are."""
    folders = []
    for distribution in metadata.distributions():
        try:
            facts = json.loads(distribution.read_text("direct_url.json") or "{}")
            if facts.get("dir_info", {}).get("editable"):
                folders.append(Path(url2pathname(urlparse(facts["url"]).path)))
        except (ValueError, KeyError, AttributeError, OSError):
            continue  # a broken installation of something else
    return folders


@functools.cache
def _environment_path() -> list[Path]:
    """The folders that PYTHONPATH and the .pth files of installed packages put on the path.

    Not what is on the path at the start: a worker inherits what the user's file added to it.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [Path(entry).absolute() for entry in entries if entry]
    for place in _python_folders():
        for file in place.glob("*.pth"):
            try:
                lines = file.read_text(errors="replace").splitlines()
            except OSError:
                continue
            names = [line.strip() for line in lines if line.strip()]
            folders += [place / name for name in names if not name.startswith(("#", "import"))]
    return folders
