"""`benchmark.py doctor`: what is installed here and whether it works, to paste into a bug report.

Every package is imported in a process of its own: whatever is broken, even what crashes Python,
is one line here and stops nothing else.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from upstream.common import PROJECT, disk
from upstream.common.packages import (
    PACKAGES,
    PROJECT_NAME,
    install_command,
    repair_command,
    version,
)

ROOMS = ("benchmark", "upstream", "downstream", "merging")
PATIENCE = 180  # seconds for one import
LITTLE = 2.0  # GB of disk
# What shows that a package works, where importing it does not.
PROBES = {
    "torch": (
        "import torch; threads = torch.get_num_threads(); devices = ["
        "torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]; "
        "devices += ['MPS'] * torch.backends.mps.is_available(); "
        "facts = [torch.backends.cpu.get_cpu_capability(), threads, devices, torch.version.cuda]"
    ),
    "espeakng_loader": (
        "import ctypes, espeakng_loader; ctypes.CDLL(espeakng_loader.get_library_path())"
    ),
    "pyarrow": "import pyarrow.parquet",
    "s3prl": "import s3prl.upstream.baseline.expert",
    "transformers": "from transformers import HubertModel",
}
CODE = """
import json, sys
paths, code = sys.argv[1:]
sys.path[:] = json.loads(paths)
facts = None
try:
    exec(code)
    answer = [True, facts]
except BaseException as error:
    answer = [False, f"{type(error).__name__}: {error}"]
print("\\n" + json.dumps(answer), flush=True)
"""


class Part(NamedTuple):
    """A package as it is here. `fault`: why it does not load; None where it is not installed."""

    name: str
    version: str
    fault: str | None = ""
    facts: Any = None

    @property
    def works(self) -> bool:
        return self.fault == ""


def doctor(args: argparse.Namespace) -> int:
    """What is installed and whether it works: doctor"""
    print(f"Speech-FT Bench {version(PROJECT_NAME) or 'from a folder'}, {_origin()}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        parts = {}
        for part in pool.map(examine, PACKAGES):
            parts[part.name] = part
            print(_anonymous(_line(part, parts["torch"])), flush=True)
    for line in _machine(parts["torch"]):
        print(_anonymous(line))
    faults = [*_missing(parts), *_results(args.results)]
    for line in [*faults, *_warnings(parts)]:
        print(_anonymous(f"! {line}"))
    print("a run has what it needs" if not faults else "a run does not have what it needs")
    return 2 if faults else 0


def examine(name: str) -> Part:
    """Import a package in a process of its own."""
    distribution = PACKAGES[name].distribution
    shown = version(distribution) or ""
    if name == "s3prl" and not shown:
        fork = version("espnet-s3prl")
        shown = f"{fork} (espnet-s3prl)" if fork else ""
    words = [sys.executable, "-c", CODE, json.dumps(sys.path), PROBES.get(name, f"import {name}")]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return Part(name, shown, f"not imported within {PATIENCE} s")
    except OSError as error:
        return Part(name, shown, f"Python does not start ({error})")
    try:
        works, facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        ends = f"Python ended with status {done.returncode}"
        return Part(name, shown, f"{ends} {' '.join(done.stderr.split())[-200:]}".strip())
    if works:
        return Part(name, shown or "of unknown version", "", facts)
    fault = " ".join(str(facts).split())[:300]
    missing = fault.startswith(f"ModuleNotFoundError: No module named '{name}'")
    return Part(name, shown, None if missing else fault)


def _line(part: Part, torch: Part) -> str:
    package = PACKAGES[part.name]
    label = f"  {package.distribution} {part.version}".rstrip()
    purpose = f" ({package.purpose} needs it)" if package.purpose else ""
    if part.works:
        return label
    if part.fault is None:
        return f"{label}: not installed{purpose}: {install_command(part.name)}"
    if part.fault == torch.fault and part.name != "torch":
        return f"{label}: does not load, because torch does not{purpose}"
    return f"{label}: does not load{purpose}: {part.fault}: {repair_command(part.name)}"


def _missing(parts: Mapping[str, Part]) -> list[str]:
    """What every run needs and does not have."""
    needed = [name for name, package in PACKAGES.items() if not package.purpose]
    return [
        f"{PACKAGES[name].distribution} is needed by every run"
        for name in needed
        if not parts[name].works
    ]


def _machine(torch: Part) -> Iterator[str]:
    """CPU, threads and devices."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    except OSError:
        flags = set()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
    capability, threads, devices, cuda = torch.facts or ["unknown to torch", "?", [], None]
    extensions = " ".join(flag for flag in wanted if flag in flags) or "not listed here"
    yield f"CPU: {platform.machine()}, torch uses {capability}; extensions: {extensions}"
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "not set")
    yield f"threads: {threads} of torch, {cores} cores for this process, OMP_NUM_THREADS {limit}"
    if not torch.works:
        yield "devices: unknown, torch does not load"
        return
    built = f"torch is built for CUDA {cuda}" if cuda else "torch is built without CUDA"
    yield f"devices: {', '.join(['cpu', *devices])} ({built})"


def _results(folder: Path) -> Iterator[str]:
    """Prints the room for results; yields what is wrong with the folder."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = disk.free_bytes(folder) / 1e9
    except (OSError, StopIteration) as error:
        yield f"--results cannot be looked at ({type(error).__name__})"
        return
    print(f"results: {free:.1f} GB of disk are free")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield "--results cannot be written: another folder, or its permissions"
    elif free < LITTLE:
        yield f"--results: less than {LITTLE:g} GB are free"


def _warnings(parts: Mapping[str, Part]) -> Iterator[str]:
    """Known bad pairs, requirements that do not hold, names that belong to somebody else."""
    torch, audio, hub = (parts[name] for name in ("torch", "torchaudio", "huggingface_hub"))
    if audio.version and torch.version and not _fit(torch.version, audio.version):
        yield (
            f"torchaudio {audio.version} is built for another torch than {torch.version}: "
            f"{repair_command('torchaudio')}"
        )
    if version("s3prl") and version("espnet-s3prl"):
        yield "s3prl and espnet-s3prl hold the same files: uninstall both, then install one"
    if version("s3prl") and _number(hub.version) >= (1, 0):
        yield (
            f"the runner of s3prl needs huggingface_hub below 1.0, not {hub.version}; its "
            f"upstreams, which are all that is used here, do not"
        )
    if parts["pyarrow"].version and _number(parts["pyarrow"].version) < (14, 0, 1):
        yield "pyarrow before 14.0.1 may run code from a file: pip install --upgrade pyarrow"
    yield from _unmet()
    yield from foreign_names()


def _fit(torch: str, audio: str) -> bool:
    """2.11.0 and 2.11.0, both for the same CUDA, or for none that the version names."""
    builds = [text.partition("+")[2] for text in (torch, audio)]
    same_build = not all(builds) or builds[0] == builds[1]
    return same_build and _number(torch)[:3] == _number(audio)[:3]


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", text.partition("+")[0]))


def _unmet() -> Iterator[str]:
    """Requirements of this project that what is installed does not meet."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires(PROJECT_NAME) or []]
    except Exception:  # not installed, or its record is damaged: said above
        return
    for requirement in requirements:
        installed = version(requirement.name)
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            yield f"{requirement.name} {installed} is installed, {requirement.specifier} is needed"


def foreign_names() -> Iterator[str]:
    """Distributions of others that install a package under a name of ours."""
    wanted = {f"{room}/__init__.py": room for room in ROOMS} | {
        f"{room}.py": room for room in ROOMS
    }
    for distribution in metadata.distributions():
        try:
            name = distribution.metadata["Name"] or "?"
            if re.sub(r"[-_.]+", "-", name).lower() == PROJECT_NAME:
                continue
            files = {str(file) for file in distribution.files or []}
        except Exception:  # somebody's damaged record
            continue
        for room in sorted({wanted[file] for file in files & set(wanted)}):
            yield (
                f"the distribution {name} installs a package `{room}` as well; which one is "
                f"imported depends on the path: pip uninstall {name}, or use another environment"
            )


def _origin() -> str:
    """How this project comes to be imported."""
    clone = (PROJECT / "setup.cfg").exists() or (PROJECT / "pyproject.toml").exists()
    try:
        facts = json.loads(metadata.distribution(PROJECT_NAME).read_text("direct_url.json") or "{}")
    except Exception:  # not installed, or damaged
        return "a clone that is not installed" if clone else "not installed"
    if facts.get("dir_info", {}).get("editable"):
        return "a clone, installed with pip install -e"
    return "a clone, beside an installed copy" if clone else "installed by pip"


def _anonymous(text: str) -> str:
    """The text without this machine's folders and the user's name."""
    folders = {str(PROJECT): "PROJECT", sys.prefix: "ENVIRONMENT", sys.base_prefix: "PYTHON"}
    folders |= {os.path.realpath(folder): name for folder, name in [*folders.items()]}
    folders |= {str(Path.home()): "~", os.path.realpath(Path.home()): "~"}
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    try:
        return re.sub(rf"(?<=/){re.escape(getpass.getuser())}(?=/)", "USER", text)
    except (OSError, KeyError, ImportError):  # no name
        return text
