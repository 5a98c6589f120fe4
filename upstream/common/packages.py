"""The packages that this project uses: what each is for, and the command that brings it.

A part that one command needs must not stop another: a package that may be missing is imported with
`require_package`, where it is used, so that what is missing or broken is one line.
"""

from __future__ import annotations

import importlib
from importlib import metadata
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


# By the name that is imported. One that is needed by no command alone has no extra.
PACKAGES = {
    "torch": Package("torch"),
    "numpy": Package("numpy"),
    "scipy": Package("scipy"),
    "soundfile": Package("soundfile"),
    "yaml": Package("pyyaml"),
    "safetensors": Package("safetensors"),
    "filelock": Package("filelock"),
    "editdistance": Package("editdistance"),
    "tqdm": Package("tqdm"),
    "huggingface_hub": Package("huggingface_hub", (), "models of the Hugging Face hub"),
    "transformers": Package("transformers", (), "pre-training the demo's encoder"),
    "espeakng_loader": Package("espeakng-loader", ("demo",), "speaking the demo's corpus"),
    "sklearn": Package("scikit-learn", ("demo",), "pre-training the demo's encoder"),
    "altair": Package("altair", ("report", "demo"), "figures"),
    "vl_convert": Package("vl-convert-python", ("report", "demo"), "figures"),
    "pyarrow": Package("pyarrow", ("hf",), "corpora as Hugging Face's datasets saved them"),
    "submitit": Package("submitit", ("slurm",), "--executor slurm"),
    "ray": Package("ray", ("ray",), "--executor ray"),
    "s3prl": Package("s3prl", ("s3prl",), "upstreams named s3prl:NAME"),
}
# These must never be imported a second time, wherever they lie.
REQUIRED = frozenset(name for name, package in PACKAGES.items() if not package.extras)


def require_package(name: str) -> ModuleType:
    """The module `name`, of a package in PACKAGES or below one.

    Raises UserError for one that is missing or that cannot be imported, with the command that
    brings it. Other people's code fails in its own ways: ImportError, OSError from a shared
    library, AttributeError where two versions do not fit.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(_why_not(name, error)) from error


def _why_not(name: str, error: Exception) -> str:
    """What is missing or broken, and the way out."""
    top = name.partition(".")[0]
    package = PACKAGES[top]
    needed = f" (needed for {package.purpose})" if package.purpose else ""
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and missing in (top, name):
        return f"{top} is not installed{needed}; {install_command(top)}"
    return f"{top} is installed but does not load{needed}: {reason(error)}; {install_command(top)}"


def reason(error: BaseException) -> str:
    """`ImportError: libfoo.so: cannot open ...`, in one line of a bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def install_command(name: str) -> str:
    """`pip install 'speech-ft-bench[report]'`, as it is for a clone or for a wheel."""
    package = PACKAGES[name]
    extra = f"[{package.extras[0]}]" if package.extras else ""
    if (PROJECT / "setup.cfg").exists():
        return f"in the clone, pip install -e '.{extra}'"
    return f"pip install '{PROJECT_NAME}{extra}'"


def version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
