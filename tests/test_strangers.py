"""A results folder that a stranger made: no command hangs, runs what it names, or leaves it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import benchmark
from tests import tiny
from tests.conftest import LABELS

EVERY = bool(os.environ.get("EVERY_COMMAND"))  # all commands on each plant: some minutes
SECONDS = 60  # that a command may take here; it takes one or two

# every kind of file and folder that the commands make, by a pattern that finds one
KINDS = [
    "*@*/*/label@*/seed0/score.json",
    "*@*/*/label@*/seed0/summary.json",
    "*@*/*/label@*/seed0/predictions.jsonl",
    "*@*/*/label@*/seed0/head.safetensors",
    "*@*/*/label@*/seed0",
    "*@*/*/label@*",
    "*@*",
    "cache",
    "cache/files.json",
    "cache/prepared",
    "cache/prepared/*.json",
    "cache/*/about.json",
    "cache/*/mean",
    "cache/*/mean/used",
    "cache/*/mean/[0-9a-f]*",
    "cache/*/mean/[0-9a-f]*/shard.json",
    "cache/*/mean/[0-9a-f]*/rows.npy",
    "cache/*/float16/[0-9a-f]*/shard.json",
    "upstreams",
    "upstreams/merged@*",
    "upstreams/merged@*/merge.json",
    "upstreams/merged@*/README.md",
    "upstreams/merged@*/heard.txt",
    "upstreams/merged@*/config.json",
    "upstreams/merged@*/model.safetensors",
    "upstreams/finetune@*/finetune.json",
    "upstreams/finetune@*/log.jsonl",
    "upstreams/finetune@*/heard.txt",
    "similarity",
    "similarity/*.json",
    "similarity/floor/*.json",
    "table.csv",
    "report.html",
]
# what may lie where nothing is yet
EXTRA = [
    "errors.log",
    "*@*/*/label@*/seed0/.lease",
    "*@*/*/label@*/seed0/state.pt",
    "*@*/*/label@*/seed0/.part-" + "0" * 32,
    "cache/door.lease",
    "cache/*/mean/reading-" + "0" * 32 + ".lease",
    "cache/*/mean/" + "0" * 16,
    "cache/*/mean/.part-" + "0" * 16 + "-" + "1" * 32,
    "cache/*/1.gone",
    "cache/running/host-1.json",
    "cache/running",
    "cache/passes",
    "upstreams/merged@*/.lease",
    "chosen",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tones: Path) -> Path:
    """A suite, an upstream and the results of a real run, with a similarity."""
    home = tmp_path_factory.mktemp("strangers")
    suite = home / "tiny"
    suite.mkdir()
    base = tiny.hf_folder(home, "hubert")
    corpus = {"name": "manifest", "root": str(tones), "target": "label"}
    train = {"steps": 8, "batch": 12, "lr": [1e-2], "eval_every": 4, "seeds": 2}
    task = {"kind": "task", "task": "classify", "corpus": corpus, "train": train}
    tuning = {"kind": "finetune", "upstream": str(base), "task": "label.yaml", "steps": 4,
              "batch": 6, "eval_every": 2, "lr": 1e-2}  # fmt: skip
    merge = {"kind": "merge", "base": str(base), "tuned": ["finetune.yaml"]}
    for name, content in {"label": task, "finetune": tuning, "merged": merge}.items():
        (suite / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert call(home, "run", home / "results") == 0
    assert call(home, "similarity", home / "results") == 0
    return home


COMMANDS: dict[str, list[str]] = {
    "compare": ["compare", "BASE", "merged", "--format", "md"],
    "several": ["compare", "BASE", "merged", "finetuned"],
    "errors": ["errors", "BASE", "merged", "--downstream", "label", "--suite", "SUITE"],
    "matrix": ["matrix", "--suite", "tiny", "--base", "BASE", "--format", "csv"],
    "share": ["share", "BASE"],
    "card": ["share", "BASE", "--format", "model-index"],
    "cache": ["cache", "list"],
    "clear": ["cache", "clear"],
    "plan": ["plan", "--upstream", "merged", "--suite", "SUITE", "--workers", "1"],
    "describe": ["describe", "UPSTREAM"],
    "predict": ["predict", "AUDIO", "--upstream", "BASE", "--downstream", "label",
                "--suite", "SUITE"],
    "similarity": ["similarity", "BASE", "UPSTREAM", "--suite", "SUITE", "--utterances", "8"],
    "export": ["export", "UPSTREAM", "--output", "OUTPUT"],
    "report": ["report"],
    "run": ["run", "--upstream", "merged", "--suite", "SUITE", "--workers", "1", "--device", "cpu"],
}  # fmt: skip
SLOW = ["run", "report", "similarity", "predict", "export", "clear", "plan", "describe"]


def call(home: Path, command: str, results: Path) -> int:
    """Run a command; the test fails if it does not end in time."""

    def late(*_: object) -> None:
        raise TimeoutError(command)

    merged = sorted((results / "upstreams").glob("merged@*")) if results.is_dir() else []
    words = {
        "BASE": str(home / "hubert-0"),
        "SUITE": str(home / "tiny"),
        "UPSTREAM": str(merged[0]) if merged else "merged:recipe=" + str(home / "tiny/merged.yaml"),
        "AUDIO": str(next(iter(tones_of(home).glob("*.wav")))),
        "OUTPUT": str(results.parent / "exported"),
    }
    arguments = [words.get(word, word) for word in COMMANDS[command]]
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return benchmark.main([*arguments, "--results", str(results)])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tones_of(home: Path) -> Path:
    task = yaml.safe_load((home / "tiny" / "label.yaml").read_text())
    return Path(task["corpus"]["root"])


class Stranger:
    """A copy of the results with something planted in it, and what must not be touched."""

    def __init__(self, home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.place, self.capsys = home, place, capsys
        self.results, self.outside = place / "results", place / "outside"
        (self.outside / ("0" * 16)).mkdir(parents=True)
        for name in ("a.txt", "score.json", f"{'0' * 16}/photo.jpg", ".part-mine"):
            (self.outside / name).write_text("mine")
        self.mark = place / "ran"
        self.evil = place / "results" / "evil.py"

    def fresh(self) -> Path:
        shutil.rmtree(self.results, ignore_errors=True)
        shutil.copytree(self.home / "results", self.results, symlinks=True)
        self.evil.write_text(f"open({str(self.mark)!r}, 'w')\nTASK = METRIC = Head = Mine = 1\n")
        return self.results

    def snapshot(self) -> dict[str, tuple[str, int]]:
        files = [path for path in self.outside.rglob("*") if path.is_file()]
        return {str(p): (p.read_text(), p.stat().st_mtime_ns) for p in files} | {
            "": (" ".join(sorted(str(p) for p in self.outside.rglob("*"))), 0)
        }

    def survives(self, what: str, commands: list[str]) -> None:
        """Run the commands: in time, nothing outside touched or run, lines and no traceback."""
        before = self.snapshot()
        for command in commands:
            self.capsys.readouterr()
            status = call(self.home, command, self.results)
            out, err = self.capsys.readouterr()
            said = f"{what}: {command}: {status}\n{out[-500:]}\n{err[-1500:]}"
            assert status in (0, 2), said
            assert "Traceback" not in out + err and "unforeseen" not in out + err, said
            assert "\x1b" not in out and "\u202e" not in out, said
            assert status == 0 or err.strip(), said
            assert self.snapshot() == before, said
            assert not self.mark.exists(), said

    def commands(self, number: int) -> list[str]:
        """All; or a quick one and one of the slow, in turn."""
        if EVERY:
            return [*QUICK, *SLOW[1:5], "plan", "describe", "run", "clear"]
        return [QUICK[number % len(QUICK)], SLOW[number % len(SLOW)]]


@pytest.fixture
def stranger(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Stranger:
    monkeypatch.setattr("upstream.common.disk.LEASE_SECONDS", 1.5)
    return Stranger(home, tmp_path, capsys)


def link_to(target: Callable[[Stranger], str]) -> Callable[[Stranger, Path], None]:
    return lambda stranger, path: path.symlink_to(target(stranger))


PLANTS: dict[str, Callable[[Stranger, Path], None]] = {
    "link to a file": link_to(lambda s: str(s.outside / "a.txt")),
    "link to a folder": link_to(lambda s: str(s.outside)),
    "dangling link": link_to(lambda s: str(s.outside / "new")),
    "loop": link_to(lambda s: "loop"),
    "zeros": link_to(lambda s: "/dev/zero"),
    "pipe": lambda s, path: os.mkfifo(path),
    "folder": lambda s, path: (path / "x").mkdir(parents=True),
    "empty": lambda s, path: path.write_bytes(b""),
    "noise": lambda s, path: path.write_bytes(b"\xff\x00\x1b[2J{" * 99),
    "list": lambda s, path: path.write_text("[]"),
    "deep": lambda s, path: path.write_text("[" * 100_000),
    "huge": lambda s, path: path.touch() or os.truncate(path, 1 << 43),  # type: ignore[func-returns-value]
}
QUICK = ["compare", "errors", "matrix", "share", "cache"]
PART = 4  # of the plants, and of the quick commands: without EVERY_COMMAND they take turns


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def found(results: Path, pattern: str) -> Path:
    """The first that is there, of cells the base's, or the place where it would be."""
    folder, _, name = pattern.rpartition("/")
    paths = sorted(results.glob(pattern), key=lambda p: ("hubert-0@" not in str(p), p)) or [
        path / name for path in sorted(results.glob(folder) if folder else [results])
    ]
    place = paths[0] if paths else results / pattern
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


@pytest.mark.parametrize("kind", [*KINDS, *EXTRA])
def test_what_is_no_file_of_ours(kind: str, stranger: Stranger) -> None:
    if kind in KINDS:
        assert list((stranger.home / "results").glob(kind)), "such files are made no more"
    turn = [*KINDS, *EXTRA].index(kind)
    for number, (name, plant) in enumerate(PLANTS.items()):
        if not EVERY and (number + turn) % PART:
            continue
        results = stranger.fresh()
        path = found(results, kind)
        remove(path)
        plant(stranger, path)
        stranger.survives(f"{name} as {kind}", stranger.commands(number + turn // PART))


VALUES: list[Any] = [
    None, True, -1, 0, 1e308, float("inf"), float("nan"), 10**30, "", "x" * 100_000, "../../x",
    "\x1b[2J\u202e\u2028", "\ud83d", "=1+1", "<script>alert(1)</script>", [], [[]], [None], {},
    {"x": {"x": 1}}, ["a", 1],
]  # fmt: skip
RECORDS = [
    "*@*/*/label@*/seed0/score.json",
    "*@*/*/label@*/seed0/summary.json",
    "*@*/*/label@*/seed0/predictions.jsonl",
    "cache/files.json",
    "cache/*/about.json",
    "cache/*/mean/[0-9a-f]*/shard.json",
    "upstreams/merged@*/merge.json",
    "upstreams/merged@*/config.json",
    "upstreams/finetune@*/finetune.json",
    "upstreams/finetune@*/log.jsonl",
    "similarity/*.json",
    "similarity/floor/*.json",
]
CASES = 30  # of a kind of record, about
CHECKED = ("summary.json", "files.json", "about.json", "shard.json")


def read_record(path: Path) -> Any:
    """The first line of what is lines, else all."""
    text = path.read_text()
    whole = path.suffix == ".json" and path.name not in CHECKED and path.parts[-2] != "floor"
    with contextlib.suppress(ValueError):
        return json.loads(text)
    assert not whole or "similarity" in path.parts
    return json.loads(text.split("\n")[0])


def write_record(path: Path, content: Any) -> None:
    text = json.dumps(content)
    before = path.read_text().split("\n")
    if path.suffix == ".jsonl":
        text = "\n".join([text, *before[1:]])
    elif len(before) == 3 and before[1].isdigit():
        text += f"\n{zlib.crc32(text.encode())}\n"
    path.write_text(text)


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and the first item of every list."""
    if isinstance(content, dict):
        for key in [*content][:40]:
            yield (*above, key)
            yield from places(content[key], (*above, key))
    elif isinstance(content, list) and content:
        yield (*above, 0)
        yield from places(content[0], (*above, 0))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    first, *rest = place
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[first] = changed(copy[first], tuple(rest), value) if rest else value
    return copy


@pytest.mark.parametrize("kind", RECORDS)
def test_every_key_of_every_record_with_nonsense(kind: str, stranger: Stranger) -> None:
    """A few of all pairs of key and value; with EVERY_COMMAND all."""
    results = stranger.fresh()
    path = found(results, kind)
    content = read_record(path)
    cases = [(place, value) for place in places(content) for value in VALUES]
    step = 1 if EVERY else max(1, len(cases) // CASES) | 1
    for count, (place, value) in enumerate(cases[:: step + (step % 3 == 0 or step % 7 == 0)]):
        write_record(path, changed(content, place, value))
        slow = [["plan", "describe", "predict"][count % 3]] if count % 4 == 0 else []
        if count % 12 == 0:
            slow = [["run", "report", "similarity"][count // 12 % 3]]
        what = f"{kind}: {place} = {value!r:.60}"
        stranger.survives(what, [QUICK[count % len(QUICK)], *slow])
        if slow:
            results = stranger.fresh()
            path = found(results, kind)


@pytest.mark.parametrize("kind", [*RECORDS, "tiny/label.yaml"])
def test_nothing_that_a_record_names_is_run(kind: str, stranger: Stranger) -> None:
    """A canary as every text of a record, inside lists and mappings, and as another suite."""
    if kind == "tiny/label.yaml":  # a suite beside the results, which a record calls its own
        results = stranger.fresh()
        suite = results / "sent"
        suite.mkdir()
        task = yaml.safe_load((stranger.home / "tiny" / "label.yaml").read_text())
        task["task"] = f"{stranger.evil}:TASK"
        (suite / "label.yaml").write_text(yaml.safe_dump(task))
        for path in results.glob("*@*/*/*@*/seed*/score.json"):
            content = json.loads(path.read_text())
            content["cell"]["suite"] = str(suite)
            path.write_text(json.dumps(content))
        stranger.survives("suite", ["report", "compare", "share"])
        return
    results = stranger.fresh()
    content = read_record(found(results, kind))
    for name in ("TASK", "METRIC", "Head", "Mine")[: None if EVERY else 1]:
        text = f"{stranger.evil}:{name}"
        for value in (text, [text], {"name": text}, f"evil.py:{name}", str(stranger.evil)):
            spoilt = content
            for place in places(content):
                here = content
                with contextlib.suppress(KeyError, IndexError, TypeError):
                    for key in place:
                        here = here[key]
                if isinstance(here, str) or place[-1] in ("metric", "head", "lexicon"):
                    with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
                        if place[0] != "cell":
                            spoilt = changed(spoilt, place, value)
                            write_record(found(results, kind), changed(content, place, value))
                            if "score" in kind and (EVERY or value == text):
                                stranger.survives(f"{place} {value}", ["predict"])
            write_record(found(results, kind), spoilt)
            stranger.survives(f"{kind} {value}", ["compare", "matrix", "predict", "describe"])
            results = stranger.fresh()


def test_a_pickle_is_not_obeyed(stranger: Stranger) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(stranger.mark)!r}, 'w')",)

    results = stranger.fresh()
    (cell,) = list(results.glob("*@*/*/label@*/seed0"))[:1]
    (cell / "score.json").unlink()
    (cell / "state.pt").write_bytes(pickle.dumps(Evil()))
    stranger.survives("state", ["run"])
    results = stranger.fresh()
    for upstream in results.glob("upstreams/*@*"):
        (upstream / "model.safetensors").unlink()
        (upstream / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
        (upstream / "state.pt").write_bytes(pickle.dumps(Evil()))
    stranger.survives("weights", ["describe", "plan", "run"])


def test_labels_of_the_tones_are_what_predict_says(home: Path, capsys: Any) -> None:
    """What is attacked here works."""
    for command in COMMANDS:
        if command != "clear":
            assert call(home, command, home / "results") == 0, capsys.readouterr().err
    assert any(label in capsys.readouterr().out for label in LABELS)
