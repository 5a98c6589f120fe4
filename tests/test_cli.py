"""The door: the main job end to end on tiny things, resuming, and every mistake by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

import benchmark
from tests import tiny
from upstream.common import PROJECT

ROOT = PROJECT


def call(*words: object) -> int:
    try:
        return benchmark.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def scores(results: Path) -> dict[str, float]:
    found = {}
    for path in results.glob("*@*/*/*@*/seed*/score.json"):
        content = json.loads(path.read_text())
        cell = content["cell"]
        found[f"{cell['upstream']} {cell['task']} {cell['seed']}"] = content["result"]["score"]
    return found


def test_main_job_scores_compares_and_resumes(
    recipes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results"
    words = ("--upstream", "merged", "--suite", recipes, "--results", results, "--workers", 1)
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert "12 to compute" in out  # base, finetuned, merged; two tasks; two seeds
    assert "finetuned" in out and "paired by utterance" in out
    assert "cost of finetuned: " in out and "cost of merged: " in out and " M weights learnt" in out
    first = scores(results)
    assert len(first) == 12
    assert (results / "table.csv").is_file() and (results / "table.md").is_file()
    assert (results / "report.html").is_file() and "report.html" in out

    stamp = {p: p.stat().st_mtime_ns for p in results.rglob("score.json")}
    assert call(*words) == 0
    assert "12 cells kept, 0 to compute" in capsys.readouterr().out
    assert stamp == {p: p.stat().st_mtime_ns for p in results.rglob("score.json")}

    one = next(p for p in stamp if "seed1" in str(p) and "word" in str(p))
    one.unlink()
    assert call(*words) == 0
    assert "11 cells kept, 1 to compute" in capsys.readouterr().out
    assert scores(results) == first, "a cell that is computed again is the same"

    base = json.loads(one.read_text())["cell"]["upstream"]
    other = next(u for u in {k.split()[0] for k in first} if u != base)
    for form in ("text", "md", "csv", "json", "latex"):
        assert call("compare", base, other, "--results", results, "--format", form) == 0
        assert "word" in capsys.readouterr().out

    provenance = json.loads(one.read_text())["result"]
    for key in ("lr", "dev", "n", "speakers", "seconds", "device", "versions", "git", "recipe"):
        assert provenance[key] not in (None, "", {})


def test_workers_give_the_same_scores(suite: Path, tmp_path: Path) -> None:
    upstream = tiny.hf_folder(tmp_path, "wavlm")
    for workers in (1, 2):
        words = ("--upstream", f"{upstream},fbank", "--suite", suite, "--workers", workers)
        assert call(*words, "--results", tmp_path / f"r{workers}") == 0
    assert scores(tmp_path / "r1") == scores(tmp_path / "r2") != {}


def test_recomputed_features_give_the_same_task(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--suite", suite, "--downstream", "word", "--upstream", "fbank", "--workers", 1)
    assert call(*words, "--results", tmp_path / "a", "--cache-gb", 0) == 0
    assert not list((tmp_path / "a" / "cache").rglob("float16"))
    assert call(*words, "--results", tmp_path / "b") == 0
    assert scores(tmp_path / "a") == scores(tmp_path / "b") != {}


def test_kill_and_resume(suite: Path, tmp_path: Path) -> None:
    """kill -9 in the middle; the same command finishes and nothing finished is lost."""
    words = [
        sys.executable, "benchmark.py", "--upstream", "fbank", "--suite", suite, "--downstream",
        "word", "--seeds", "3", "--results", tmp_path / "r", "--workers", "1",
    ]  # fmt: skip
    command = [str(word) for word in words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not scores(tmp_path / "r") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("score.json")}
    assert 0 < len(kept) < 3
    assert call(*command[2:]) == 0
    assert len(scores(tmp_path / "r")) == 3
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())


def test_ctrl_c_says_how_to_go_on(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from downstream.run import cell as evaluate

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "fitting", stop)
    words = ("--upstream", "fbank", "--suite", suite, "--workers", 1, "--results", tmp_path / "r")
    assert call(*words) == 130
    assert "the same command goes on" in capsys.readouterr().err


MISTAKES = {
    "unknown upstream": (["--upstream", "hubrt_base"], "did you mean hubert_base"),
    "unknown option": (["--upstream", "fbank:cmvm=true"], "did you mean cmvn"),
    "missing folder": (["--upstream", "hf:no/such/folder/here"], "no/such/folder"),
    "missing file": (["--upstream", "model.pt"], "model.pt"),
    "missing class file": (["--upstream", "mine.py:Mine"], "mine.py"),
    "unknown task": (["--upstream", "fbank", "--downstream", "lable"], "did you mean label"),
    "unknown key": (["--upstream", "fbank", "--set", "train.stesp=3"], "did you mean steps"),
    "wrong type": (["--upstream", "fbank", "--set", "train.steps=many"], "must be int"),
    "no value": (["--upstream", "fbank", "--set", "train.steps"], "KEY=VALUE"),
    "twice": (["--upstream", "fbank,fbank"], "twice"),
    "no merge recipe": (["--upstream", "merged"], "merged.yaml"),
    "no device": (["--upstream", "fbank", "--device", "cuda:77"], "cuda:77"),
    "a device without numbers": (["--upstream", "fbank", "--device", "meta"], "meta"),
    "an empty device": (["--upstream", "fbank", "--device", ""], "cannot be used"),
    "a task twice": (["--upstream", "fbank", "--downstream", "label,label"], "label twice"),
    "no task": (["--upstream", "fbank", "--downstream", ""], "unknown task ''"),
    "a negative budget": (["--upstream", "fbank", "--cache-gb", "-5"], "'-5' is no number from 0"),
    "a budget of NaN": (["--upstream", "fbank", "--cache-gb", "nan"], "'nan' is no number"),
    "no audio": (["--upstream", "fbank", "--batch-seconds", "0"], "'0' is no number from 1 up"),
    "endless audio": (["--upstream", "fbank", "--batch-seconds", "inf"], "'inf' is no number"),
    "half a worker": (["--upstream", "fbank", "--workers", "0.5"], "'0.5' is no whole number"),
    "seeds without end": (["--upstream", "fbank", "--seeds", "1" + "0" * 30], "is no whole number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[name]
    assert call(*words, "--suite", suite, "--results", tmp_path / "r") == 2
    err = capsys.readouterr().err.strip()
    assert message in err and err.startswith("benchmark.py") and "\n" not in err


def test_what_nobody_foresaw_is_one_line_that_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("of\nall things")

    monkeypatch.setattr("downstream.commands.compare", fail)
    assert call("compare", "a", "b") == 2
    line = capsys.readouterr().err.strip()
    assert "unforeseen ZeroDivisionError at test_cli.py:" in line and "please report" in line
    assert "\n" not in line and "of all things" in line
    assert call("compare", "a", "b", "--debug") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_recipe_or_its_parts_but_not_both(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        (recipes / "merged.yaml", "--base", "hubert_demo"),
        (recipes / "merged.yaml", "--tuned", "x"),
        (),
        ("--base", "hubert_demo"),
    ):
        assert call("merge", *words, "--output", tmp_path / "out") == 2
        assert "--base and --tuned" in capsys.readouterr().err


def test_output_into_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} benchmark.py list upstreams | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("data2vec_base") and done.stderr == ""


def test_unknown_suite_and_unwritable_results(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--upstream", "fbank", "--suite", "dmeo", "--results", tmp_path) == 2
    assert "did you mean demo" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert call("--upstream", "fbank", "--suite", suite, "--results", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


def spoil(folder: Path, line: str) -> None:
    with (folder / "manifest.tsv").open("a") as file:
        file.write(line + "\n")


@pytest.mark.parametrize(
    "row, message",
    [
        ("gone.wav\ts9\ttest\tlow\tLOW", "gone.wav"),
        ("text.wav\ts9\ttest\tlow\tLOW", "text.wav"),
        ("empty.wav\ts9\ttest\tlow\tLOW", "empty.wav"),
        ("good.wav\ts9\ttest\thihg\tLOW", "'hihg' is in dev or test but not in train"),
    ],
)
def test_bad_corpora_are_one_line(
    row: str, message: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    tones = Path((suite / "label.yaml").read_text().split("root: ")[1].split(",")[0])
    corpus.mkdir()
    for file in tones.iterdir():
        (corpus / file.name).write_bytes(file.read_bytes())
    (corpus / "text.wav").write_text("this is not audio")
    soundfile.write(corpus / "empty.wav", [], 16_000)
    (corpus / "good.wav").write_bytes((corpus / "0-0.wav").read_bytes())
    spoil(corpus, row)
    words = ("--upstream", "fbank", "--suite", suite, "--downstream", "label", "--workers", 1)
    assert call(*words, "--set", f"corpus.root={corpus}", "--results", tmp_path / "r") == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "benchmark.py:" in line]
    assert len(err) == 1 and message in err[0]


def test_five_milliseconds_and_other_rates_are_scored(suite: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    tones = Path((suite / "label.yaml").read_text().split("root: ")[1].split(",")[0])
    corpus.mkdir()
    for file in tones.iterdir():
        (corpus / file.name).write_bytes(file.read_bytes())
    for rate, channels in ((16_000, 1), (8_000, 1), (44_100, 2), (48_000, 2)):
        seconds = 0.005 if rate == 16_000 else 0.3
        shape = (int(rate * seconds), channels)
        soundfile.write(corpus / f"{rate}.wav", [[0.1] * channels] * shape[0], rate)
        spoil(corpus, f"{rate}.wav\ts9\ttest\tlow\tLOW")
    upstream = tiny.hf_folder(tmp_path, "hubert")
    words = ("--upstream", f"fbank,{upstream}", "--suite", suite, "--workers", 1, "--seeds", 1)
    assert call(*words, "--set", f"corpus.root={corpus}", "--results", tmp_path / "r") == 0
    predictions = next((tmp_path / "r").rglob("predictions.jsonl")).read_text()
    assert all(f'"{rate}"' in predictions for rate in (16_000, 8_000, 44_100, 48_000))


def test_plan_builds_nothing_and_then_says_kept(
    recipes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("plan", "--upstream", "merged", "--suite", recipes, "--results", tmp_path / "r")
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert "20 steps of fine-tuning" in out and "float16 0.0" in out
    assert not list((tmp_path / "r").rglob("*.safetensors"))


def test_cache_is_listed_and_cleared_by_name(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--results", tmp_path / "r")
    words = ("--upstream", "fbank,fbank_no_cmvn", "--suite", suite, "--seeds", 1, "--workers", 1)
    assert call(*words, *where) == 0
    capsys.readouterr()
    assert call("cache", *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and sum("float16" in line for line in lines) == 2
    assert all("72 utterances" in line for line in lines[:4])
    assert call("cache", "clear", "fbnk", *where) == 2
    assert "did you mean fbank" in capsys.readouterr().err
    assert call("cache", "clear", "fbank", *where) == 0
    assert capsys.readouterr().out.count("cleared") == 2
    assert call("cache", *where) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and out.count("fbank_no_cmvn") == 2
    assert call(*words, *where) == 0, "finished cells need no features"
    assert "4 cells kept, 0 to compute" in capsys.readouterr().out


@pytest.mark.parametrize("what", benchmark.LISTS)
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", what) == 0
    expected = {
        "upstreams": "hubert_base", "tasks": "asr", "suites": "demo", "corpora": "librispeech",
        "heads": "frame_ctc", "methods": "linear",
        "published": "published:hubert-base/asr-ted-lium3/speech-ft ",
    }  # fmt: skip
    assert expected[what] in capsys.readouterr().out


def test_list_tells_what_one_entry_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "corpora", "manifest") == 0
    text = capsys.readouterr().out
    for words in ("channel: str | None = 'channel'", "split_by", "`folds: 5`", "0 is the first"):
        assert words in text, text
    assert call("list", "tasks", "asr") == call("list", "methods", "linear") == 0
    assert call("list", "corpora", "manifst") == 2
    assert "did you mean manifest?" in capsys.readouterr().err
    assert call("list", "suites", "demo") == 2


def test_describe_check_finetune_merge_export(
    recipes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, out = tmp_path / "r", tmp_path / "out"
    assert call("finetune", recipes / "finetune.yaml", "--results", results, "--output", out) == 0
    assert call("describe", out, "--results", results) == 0
    assert "4 of 32 values" in capsys.readouterr().out
    assert call("check", "--upstream", out) == 0
    assert "BROKEN" not in capsys.readouterr().out
    assert call("check", "--recipe", recipes / "label.yaml") == 0
    merged = tmp_path / "merged"
    assert call("merge", recipes / "merged.yaml", "--results", results, "--output", merged) == 0
    assert "effective alpha 0.2500" in capsys.readouterr().out
    half = tmp_path / "half"
    base = next(recipes.parent.glob("hubert-*"))
    words = ("merge", "--base", base, "--tuned", out, "--set", "alpha=0.5", "--output", half)
    assert call(*words) == 0
    assert "effective alpha 0.5000" in capsys.readouterr().out
    assert call("describe", half) == 0
    assert "# Merged upstream" in capsys.readouterr().out
    assert call("export", half, "--format", "s3prl", "--output", tmp_path / "half.pt") == 0
    assert call("describe", tmp_path / "half.pt") in (0, 2)  # tiny widths need :family=


def test_readme_upstream_in_fifteen_lines(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "mine.py").write_text(code)
    spec = f"{tmp_path / 'mine.py'}:Mine"
    assert call("check", "--upstream", spec) == 0
    words = ("--upstream", spec, "--suite", suite, "--results", tmp_path / "r", "--workers", 1)
    assert call(*words) == 0


def test_one_folder_is_one_upstream_however_it_is_spelt(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.hf_folder(tmp_path, "hubert")
    words = ("--suite", suite, "--downstream", "label", "--results", tmp_path / "r", "--workers", 1)
    assert call("--upstream", f"hf:{folder}/", *words) == 0
    assert call("--upstream", f"hf:{folder},{folder}", *words) == 2
    assert "twice" in capsys.readouterr().err
    assert call("--upstream", folder, *words) == 0
    assert "2 cells kept, 0 to compute" in capsys.readouterr().out
    where = ("--results", tmp_path / "r")
    assert call("compare", f"hf:{folder}/", folder, *where) == 0


def test_a_state_that_cannot_be_kept_costs_nothing(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk inside torch.save: the heads are trained all the same, and no lease stays."""
    from upstream.checkpoints import tensor_files

    def full(*_: object, **__: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("unexpected pos 704 vs 598") from error

    monkeypatch.setattr(tensor_files.torch, "save", full)
    words = ("--upstream", "fbank", "--suite", suite, "--downstream", "label", "--workers", 1)
    assert call(*words, "--results", tmp_path / "r") == 0
    assert "no state is kept" in capsys.readouterr().err
    assert len(scores(tmp_path / "r")) == 2
    assert not list((tmp_path / "r").rglob("*.lease"))


def test_where_all_cells_fail_the_last_line_says_so(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from downstream.run import heads
    from upstream.common.errors import UserError

    def full(*_: object) -> None:
        raise UserError("head.safetensors: cannot be written (No space left on device)")

    monkeypatch.setattr(heads, "keep", full)
    words = ("--upstream", "fbank", "--suite", suite, "--downstream", "label", "--workers", 1)
    assert call(*words, "--results", tmp_path / "r") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 2 cells failed" in last and "no results" not in last
    assert not list((tmp_path / "r").rglob("*.lease"))


def test_check_says_which_files_it_ran(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("check", "--results", tmp_path / "r", "--recipe")
    assert call(*words, suite) == 0
    out = capsys.readouterr().out
    assert "label" in out and "word" in out
    code = suite / "mine.py"
    code.write_text("from downstream.tasks.sid import CLASSIFY as TASK\n")
    text = (suite / "label.yaml").read_text().replace("task: classify", "task: mine.py:TASK")
    (suite / "label.yaml").write_text(text)
    assert call(*words, suite / "label.yaml") == 0
    assert f"ran {code}" in capsys.readouterr().out


def test_half_a_character_in_a_table_is_one_line(
    suite: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line.split("\t") for line in (tones / "manifest.tsv").read_text().splitlines()]
    lines = [dict(zip(rows[0], row), path=str(tones / row[0])) for row in rows[1:]]
    lines[5]["label"] = "a\ud83d"
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = (suite / "label.yaml").read_text().replace(str(tones), f"{tmp_path}, file: m.jsonl")
    (suite / "label.yaml").write_text(text)
    assert call("check", "--recipe", suite / "label.yaml", "--results", tmp_path / "r") == 2
    err = capsys.readouterr().err
    assert "half a character" in err and "unforeseen" not in err and err.count("\n") == 1
