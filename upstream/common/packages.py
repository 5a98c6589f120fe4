"""The packages that this project uses: what each is for, and the command that brings it.

A part that one command needs must not stop another: a package that may be missing is imported with
`require_package`, where it is used, so that what is missing or broken is one line.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from upstream.common import PROJECT
from upstream.common.errors import UserError

PROJECT_NAME = "speech-ft-bench"  # the distribution's


class Package(NamedTuple):
    """A distribution that can be imported."""

    distribution: str
    extras: tuple[str, ...] = ()  # of ours that bring it; none: every installation has it
    purpose: str = ""


# By the name that is imported. One without an extra is needed by (nearly) every command.
PACKAGES = {
    "torch": Package("torch"),
    "numpy": Package("numpy"),
    "scipy": Package("scipy"),
    "soundfile": Package("soundfile"),
    "yaml": Package("pyyaml"),
    "safetensors": Package("safetensors"),
    "filelock": Package("filelock"),
    "rapidfuzz": Package("rapidfuzz"),
    "tqdm": Package("tqdm"),
    "huggingface_hub": Package("huggingface_hub", (), "the Hugging Face hub"),
    "transformers": Package("transformers", (), "pre-training the demo's encoder"),
    "espeakng_loader": Package("espeakng-loader", ("demo",), "the synthetic corpus"),
    "sklearn": Package("scikit-learn", ("demo",), "pre-training the demo's encoder"),
    "altair": Package("altair", ("report",), "a figure"),
    "vl_convert": Package("vl-convert-python", ("report",), "a figure"),
    "pyarrow": Package("pyarrow", ("hf",), "a folder of Hugging Face's datasets"),
    "submitit": Package("submitit", ("slurm",), "--executor slurm"),
    "ray": Package("ray", ("ray",), "--executor ray"),
    "s3prl": Package("s3prl", ("s3prl",), "an upstream s3prl:NAME"),
    "torchaudio": Package("torchaudio", ("s3prl",), "the code of s3prl"),
    "tensorboard": Package("tensorboard", ("dev",), "tensorboard: true of a fine-tuning"),
}
# These must never be imported a second time, wherever they lie.
REQUIRED = frozenset(name for name, package in PACKAGES.items() if not package.extras)


def require_package(name: str) -> ModuleType:
    """The module `name`, of a package in PACKAGES or below one.

    Raises UserError for one that is missing or that cannot be imported, with the command that
    brings it.
    """
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        line = import_failure(error) or _failure(name.partition(".")[0], error)
        raise UserError(line) from error


def import_failure(error: BaseException) -> str:
    """One line on an error that comes from a package that is missing or broken; else "".

    Other people's code fails in its own ways as it is imported: ImportError, OSError from a shared
    library, AttributeError where two versions do not fit. What they share is the place: the body
    of a module of that package.
    """
    name = str(getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and name in PACKAGES:
        return _failure(name, error)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name == "<module>" and (package := _top_level(frame.filename)) in PACKAGES:
            return _failure(package, error)
    return ""


def _top_level(filename: str) -> str:
    """`altair` of `.../site-packages/altair/vegalite/api.py`."""
    file = Path(filename)
    entries = [Path(entry) for entry in sys.path if entry and file.is_relative_to(entry)]
    if not entries:
        return ""
    nearest = max(entries, key=lambda entry: len(entry.parts))
    return Path(file.relative_to(nearest).parts[0]).stem


def _failure(name: str, error: BaseException) -> str:
    """What is missing or broken, what it is for, and the way out."""
    package = PACKAGES[name]
    who = f"{package.purpose} needs {package.distribution}" if package.purpose else ""
    if isinstance(error, ModuleNotFoundError) and _is_missing(name):
        who = f"{who}, which is" if who else f"{package.distribution} is"
        return f"{who} not installed: {install_command(name)}"
    who = f"{who}, which" if who else package.distribution
    return f"{who} does not load ({reason(error)}): {repair_command(name)}"


def _is_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):  # half loaded
        return False


def reason(error: BaseException) -> str:
    """`OSError: libfoo.so: cannot open ...`, in one line of a bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def install_command(name: str) -> str:
    """`pip install 'speech-ft-bench[report]'`, or the same for a clone."""
    extras = PACKAGES[name].extras
    extra = f"[{extras[0]}]" if extras else ""
    if any((PROJECT / file).exists() for file in ("pyproject.toml", "setup.cfg")):
        return f"pip install -e '.{extra}'"
    return f"pip install '{PROJECT_NAME}{extra}'"


def repair_command(name: str) -> str:
    """What brings a package that is installed and does not load."""
    if name == "torchaudio":  # each of its builds is for one build of torch
        wanted = (version("torch") or "2.11.0").partition("+")
        index = f" --index-url https://download.pytorch.org/whl/{wanted[2]}" if wanted[2] else ""
        return f"pip install --force-reinstall --no-deps torchaudio=={wanted[0]}{index}"
    return f"pip install --force-reinstall {PACKAGES[name].distribution}"


def version(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
