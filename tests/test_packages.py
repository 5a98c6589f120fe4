"""Commands need only what they use: what is missing or broken otherwise is one line."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.test_cli import ROOT, call
from upstream import doctor
from upstream.common import packages
from upstream.common.errors import UserError, one_line
from upstream.common.packages import PACKAGES, Package, import_failure, require_package

OPTIONAL = [name for name, package in PACKAGES.items() if package.purpose]
BROKEN = {  # what the body of a package does
    "shared library": "raise OSError('libfoo.so.1: cannot open shared object file')",
    "two versions": "import json\njson.no_such_function()",
    "its own part is missing": "import a_part_that_is_not_there",
}
SCRIPT = """
import contextlib, io, json, sys
import benchmark
blocked, commands = json.loads(sys.argv[1])
for name in blocked:
    sys.modules[name] = None
answers = []
for words in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = benchmark.main(words)
        except SystemExit as stop:
            status = stop.code
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def run_all(blocked: list[str], path: Path, *commands: list[object]) -> list[tuple[int, str, str]]:
    """Status, output and errors of commands, in a process of their own."""
    words = json.dumps([blocked, [[str(word) for word in command] for command in commands]])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, words],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(status, out, err) for status, out, err in json.loads(done.stdout.splitlines()[-1])]


def shadow(folder: Path, body: str, *names: str) -> Path:
    """A folder for the path that holds packages with this body."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(body)
    return folder


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        tiny.encoder(tmp_path, "hubert").save(folder)
    return folders


@pytest.mark.parametrize("kind", ["missing", *BROKEN])
def test_what_needs_no_optional_package_runs_without_any(
    kind: str, suite: Path, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    blocked = OPTIONAL if kind == "missing" else []
    path = shadow(tmp_path / "path", BROKEN.get(kind, ""), *(OPTIONAL if kind in BROKEN else ()))
    one, two = bases
    results: list[object] = ["--results", tmp_path / "r"]
    task: list[object] = ["--suite", suite, "--downstream", "label"]
    both = f"{one},{two}:padding=s3prl"
    fine: list[list[object]] = [
        ["list", "upstreams"],
        ["list", "corpora"],
        ["describe", one],
        ["check", "--upstream", one],
        ["check", "--recipe", suite / "label.yaml"],
        ["merge", "--base", one, "--tuned", two, "--output", tmp_path / "merged"],
        ["export", one, "--format", "s3prl", "--output", tmp_path / "one.pt"],
        ["plan", "--upstream", both, *task, *results],
        ["run", "--upstream", both, *task, *results, "--workers", 1],
        ["compare", one, f"{two}:padding=s3prl", *results],
        ["errors", one, f"{two}:padding=s3prl", *task, *results],
        ["share", one, *results, "--output", tmp_path / "shared.json"],
        ["cache", *results],
    ]
    needs: dict[str, list[object]] = {
        "altair": ["report", *results],
        "s3prl": ["describe", "s3prl:fbank"],
        "submitit": ["run", "--upstream", one, *task, *results, "--executor", "slurm"],
        "ray": ["run", "--upstream", one, *task, *results, "--executor", "ray"],
        "huggingface_hub": ["describe", "hf:nobody/nothing"],
    }
    answers = run_all(blocked, path, *fine, *needs.values())
    for command, (status, out, err) in zip(fine, answers):
        assert status == 0, (command, out[-500:], err)
    assert "no page: a figure needs" in answers[8][1]
    for (name, command), (status, _, err) in zip(needs.items(), answers[len(fine) :]):
        lines = [line for line in err.splitlines() if line.strip()]
        assert status == 2 and len(lines) == 1, (command, err)
        assert "pip install" in lines[0] and PACKAGES[name].distribution in lines[0], lines
        assert "unforeseen" not in lines[0]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="which is not installed: pip install -e") as caught:
        require_package(name)
    assert PACKAGES[name].distribution in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_named_by_whoever_imports_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also deep in another package, and also where nobody foresaw it."""
    monkeypatch.setitem(PACKAGES, "fake_outer", Package("fake-outer", ("demo",), "a test"))
    monkeypatch.setitem(PACKAGES, "fake_inner", Package("fake-inner", ("demo",), "another test"))
    shadow(tmp_path, "import fake_inner", "fake_outer")
    shadow(tmp_path, BROKEN[kind], "fake_inner")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="another test needs fake-inner, which does not load") as e:
        require_package("fake_outer")
    assert str(e.value).endswith("pip install --force-reinstall fake-inner")
    with pytest.raises(Exception) as unforeseen:
        __import__("fake_outer")
    assert one_line(unforeseen.value, "") == str(e.value)


def test_other_errors_are_not_taken_for_a_packages() -> None:
    for act in (lambda: json.loads("{"), lambda: __import__("upstream.nothing")):
        with pytest.raises(Exception) as caught:
            act()
        assert import_failure(caught.value) == ""


def test_the_command_is_that_of_a_wheel_where_this_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages.install_command("altair") == "pip install -e '.[report]'"
    monkeypatch.setattr(packages, "PROJECT", tmp_path)
    assert packages.install_command("altair") == "pip install 'speech-ft-bench[report]'"
    assert packages.install_command("torch") == "pip install 'speech-ft-bench'"


# doctor -----------------------------------------------------------------------------------------

PARTS = {
    "works": "VALUE = 1",
    "library": BROKEN["shared library"],
    "attribute": BROKEN["two versions"],
    "exits": "import sys\nsys.exit(3)",
    "dies": "import os\nos.abort()",
    "hangs": "import time\ntime.sleep(60)",
    "home": "import pathlib\nraise OSError(f'{pathlib.Path.home()}/lib/x.so\\nis not there')",
}


def test_doctor_tells_what_is_broken_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {f"part_{name}": body for name, body in PARTS.items()}
    for name, body in names.items():
        shadow(tmp_path / "path", body, name)
    known = ("torch", "torchaudio", "huggingface_hub", "pyarrow")  # torch is looked at first
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    table = {name: Package(name, ("demo",), "a test") for name in (*known, *names, "part_missing")}
    monkeypatch.setattr(doctor, "PACKAGES", table)
    monkeypatch.setattr(packages, "PACKAGES", table)
    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(known, "pass"))
    monkeypatch.setattr(doctor, "PATIENCE", 5)
    monkeypatch.setenv("HOME", str(tmp_path / "home of somebody"))

    class Args:
        results = tmp_path / "r"

    args: Any = Args()
    assert doctor.doctor(args) == 0, "none of these is needed by every run"
    out = capsys.readouterr().out
    lines = {line.split()[0].rstrip(":"): line for line in out.splitlines() if "part_" in line}
    assert lines["part_works"] == "  part_works of unknown version"
    assert "OSError: libfoo.so.1: cannot open shared object file" in lines["part_library"]
    assert "AttributeError" in lines["part_attribute"]
    assert "SystemExit: 3" in lines["part_exits"]
    assert "Python ended with status -6" in lines["part_dies"]
    assert "not imported within 5 s" in lines["part_hangs"]
    assert "OSError: ~/lib/x.so is not there" in lines["part_home"]
    assert "not installed (a test needs it): pip install -e '.[demo]'" in lines["part_missing"]
    assert str(tmp_path) not in out and "free" in out
    monkeypatch.setitem(table, "part_library", Package("part_library"))
    assert doctor.doctor(args) == 2
    assert "! part_library is needed by every run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch", "audio", "fit"),
    [
        ("2.11.0", "2.11.0", True), ("2.11.0", "2.11.1", False), ("2.11.0", "2.10.0", False),
        ("2.11.0+cpu", "2.11.0+cpu", True), ("2.11.0+cpu", "2.11.0+cu130", False),
    ],
)  # fmt: skip
def test_torch_and_torchaudio_are_a_pair(torch: str, audio: str, fit: bool) -> None:
    assert doctor._fit(torch, audio) is fit


def test_doctor_notices_who_else_installs_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "upstream_tools-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: upstream-tools\nVersion: 1.0\n")
    (record / "RECORD").write_text("upstream/__init__.py,,\nmerging.py,,\nother/upstream/x.py,,\n")
    (tmp_path / "damaged-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = list(doctor.foreign_names())
    assert [line.split("`")[1] for line in lines] == ["merging", "upstream"]
    assert all("the distribution upstream-tools installs" in line for line in lines)


@pytest.mark.parametrize("room", ["upstream", "downstream", "merging"])
def test_a_foreign_package_of_our_name_is_one_line(room: str, tmp_path: Path) -> None:
    """As from a console script, whose folder is not ours; nothing of it is run."""
    shadow(tmp_path, "raise OSError('was run')", room)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import benchmark; benchmark.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "upstreams"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"the package `{room}` would be imported from {tmp_path}" in done.stderr


def test_the_table_is_what_setup_says() -> None:
    """Every requirement is in it, and every extra that it names brings the distribution."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    required = re.findall(r"^([\w-]+)", parser["options"]["install_requires"], re.MULTILINE)
    assert set(required) <= {package.distribution for package in PACKAGES.values()}
    for name, package in PACKAGES.items():
        for extra in package.extras:
            assert package.distribution in re.findall(r"^([\w-]+)", extras[extra], re.MULTILINE), (
                name
            )


@pytest.mark.parametrize("command", ["doctor", "check"])
def test_check_of_nothing_is_doctor(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "doctor", lambda args: 2 if args.results == Path("x") else 0)
    assert call(command, "--results", "x") == 2
