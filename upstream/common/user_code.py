"""A user's own Python, named where a registered name could stand: `mine.py:Thing`.

Results and features are found by what made them, so the content of such a file, and of every module
of the user's that it imports in turn, is part of their identity. The user's are the modules below
the file's folder, or below where one stands, and those that the file puts on the path itself. A
library is never the user's, wherever it was installed (`libraries.py`): it is neither hashed nor
run a second time, which torch does not survive.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
import zipimport
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from upstream.common import disk, libraries
from upstream.common.errors import UserError, near_miss

NAME = re.compile(r"(.+\.py):(\w+)")


def thing(name: str) -> Any:
    """What `mine.py:Thing` names; the file is run once per process. Raises UserError."""
    found = NAME.fullmatch(name)
    assert found is not None
    path = Path(found[1]).absolute()
    module = _run_once(path)
    if not hasattr(module, found[2]):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise UserError(f"{path} has no {found[2]}{near_miss(found[2], names)}")
    return getattr(module, found[2])


def named_in(value: Any) -> bool:
    """Whether a value, nested as it may be, names something of a user's file."""
    if isinstance(value, (list, tuple)):
        return any(map(named_in, value))
    if isinstance(value, dict):
        return any(map(named_in, value.values()))
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def files_run() -> list[Path]:
    """The users' files that this process has run, in their order."""
    return list(_run_files)


_run_files: dict[Path, None] = {}


def identity(name: str) -> str:
    """`name`; of a file its own name and the digest of all that it rests on, wherever it lies."""
    found = NAME.fullmatch(name)
    if not found:
        return name
    path = Path(found[1]).absolute()
    _run_once(path)
    return f"{path.name}:{found[2]}@{digest(path)}"


def beside(value: Any, folder: Path) -> Any:
    """`value` with every `mine.py:Thing` in it that lies in `folder` made an absolute path."""
    if isinstance(value, dict):
        return {key: beside(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [beside(item, folder) for item in value]
    found = NAME.fullmatch(value) if isinstance(value, str) else None
    here = found and (folder / found[1]).is_file()
    return str((folder / value).absolute()) if here else value


def imported(path: Path) -> list[ModuleType]:
    """The loaded modules, not of a library or this project, that a file's code names, in turn."""
    modules: dict[str, ModuleType] = {}
    waiting = [(path.read_bytes() if path.is_file() else b"", "")]
    while waiting:
        for name in _imports(*waiting.pop()):
            module = sys.modules.get(name)
            if module is None or name in modules:
                continue
            if libraries.is_users(name, module, path):
                modules[name] = module
                with contextlib.suppress(UserError):  # it may have moved since it was run
                    waiting.append((_source(module), module.__package__ or ""))
    return list(modules.values())


def digest(path: Path) -> str:
    """12 hex digits over the content of a file that was run and of the modules it imports."""
    sources = [disk.read(path), *map(_source, imported(path))]
    contents = sorted(hashlib.sha256(source).hexdigest() for source in sources)
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:12]


def _source(module: ModuleType) -> bytes:
    """The content of a module's file, which may lie in a zip archive."""
    file = Path(str(module.__file__))
    loader = module.__spec__.loader if module.__spec__ else None
    if not file.exists() and isinstance(loader, zipimport.zipimporter):
        return bytes(loader.get_data(str(file)))
    return disk.read(file)


def _forget(module: ModuleType) -> None:
    """Let the next import run a module anew; its package must not hand out the old one."""
    name = module.__name__
    sys.modules.pop(name, None)
    package, _, attribute = name.rpartition(".")
    parent = sys.modules.get(package)
    if parent is not None and getattr(parent, attribute, None) is module:
        delattr(parent, attribute)


def run(path: Path) -> ModuleType:
    """The user's file as a module, run anew with all that it imports of the user's."""
    disk.require_file(path)
    _run_files[path] = None
    name = f"user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for other in imported(path):
        _forget(other)
    importlib.invalidate_caches()  # a zip archive's directory
    sys.modules[name] = module  # where pickle and inspect look for it
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it is told by whole seconds
    try:
        in_user_code(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    finally:
        sys.dont_write_bytecode = writes
    return module


_run_once = functools.cache(run)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Every module that the import statements of a source may name, parents included."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(filter(None, [*(parents if node.level else []), node.module or ""]))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def in_user_code(path: Path, act: Callable[[], Any]) -> Any:
    """Run a piece of the user's file; what goes wrong there is one line with its place."""
    try:
        return act()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: {type(error).__name__}: {reason}") from error
