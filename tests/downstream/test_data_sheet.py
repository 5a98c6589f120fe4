"""`check --recipe`: what a corpus is, split by split."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import soundfile
import yaml

import benchmark
from downstream import recipe
from downstream.base import HEADS
from downstream.run.data_sheet import data_sheet
from tests.downstream.test_data_checks import TRAIN, labelled, noise, prepared
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.common.schema import bind


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        wave = noise(number, 1 + number / 10)
        soundfile.write(tmp_path / f"{number}.wav", wave, 16_000)
    return tmp_path


def test_every_fact_of_a_split(folder: Path) -> None:
    wave = noise(3)
    soundfile.write(folder / "3.wav", numpy.stack([wave, -wave], 1), 16_000)
    soundfile.write(folder / "2.wav", noise(2, 2.0)[:8000], 8000)
    (folder / "6.wav").write_bytes((folder / "0.wav").read_bytes())
    rows = labelled()
    for number, row in enumerate(rows):
        row["speaker"] = f"s{number // 2}"
    rows[7]["speaker"] = "s0"
    prepared(folder, "classify", rows, target="label")
    sheet = data_sheet(recipe.load(folder / "task.yaml"), folder / "results")
    train, dev, test = sheet.splits.values()
    assert list(sheet.splits) == ["train", "dev", "test"]
    assert (train.utterances, train.speakers, train.labels) == (4, 2, {"a": 2, "b": 2})
    assert train.hours == round(4.1 / 3600, 4)
    assert train.shortest == ("0", 1.0) and train.longest == ("1", 1.1)
    assert train.channels == {"1": 3, "2, averaged": 1} and train.rates == {16_000: 3, 8000: 1}
    assert (train.near_silent, train.measured) == (1, 4) and dev.near_silent == 0
    assert sheet.shared_speakers == {"train, dev": 0, "train, test": 1, "dev, test": 0}
    assert sheet.shared_audio == {"train, dev": 0, "train, test": 1, "dev, test": 0}
    assert len(sheet.warnings) == 3 and test.speakers == 2
    text = sheet.as_text()
    for words in ("train, test: 1 speakers in both", "1 utterances of the latter", "a 2, b 2",
                  "from 1.00 s (0) to 1.10 s (1)", "1 of 4", "2, averaged (1)"):  # fmt: skip
        assert words in text, text
    assert json.loads(sheet.as_json())["splits"]["train"]["labels"] == {"a": 2, "b": 2}


def test_texts_crops_and_folds(folder: Path) -> None:
    rows = [{"text": "AB"} for _ in range(8)]
    rows[5]["text"] = rows[6]["text"] = "ÄB"
    prepared(folder, "asr", rows, target="text")
    sheet = data_sheet(recipe.load(folder / "task.yaml"), folder / "results")
    assert sheet.splits["dev"].unknown == {"Ä": 1} and not sheet.splits["train"].unknown
    assert sheet.splits["train"].speakers == 0 and not sheet.splits["train"].labels
    assert "dev symbols outside the vocabulary: Ä 1" in sheet.as_text()

    content = yaml.safe_load((folder / "task.yaml").read_text())
    rows = labelled()
    for number, row in enumerate(rows):
        row |= {"path": f"{number}.wav", "split": f"fold{number // 4}"}
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content |= {"task": "er", "folds": True, "train": TRAIN}
    content["corpus"]["target"] = "label"
    content["crop"] = {"seconds": 0.5, "per_utterance": 2}
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    sheet = data_sheet(recipe.load(folder / "task.yaml"), folder / "results")
    assert list(sheet.splits)[:3] == ["fold0 train", "fold0 dev", "fold0 test"]
    assert sheet.splits["fold0 test"].longest == ("3", 1.3), "whole utterances, no crops"
    assert len(sheet.splits) == 6


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text("from downstream.corpora.manifest import read\nREAD = read\n")
    prepared(folder, "classify", labelled(), target="label")
    content = yaml.safe_load((folder / "task.yaml").read_text())
    content["corpus"]["name"] = "mine.py:READ"
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    words = ["check", "--recipe", str(folder / "task.yaml"), "--results", str(folder / "results")]
    assert benchmark.main(words) == 0
    text = capsys.readouterr().out
    assert f"ran {folder}/mine.py" in text and "no speaker and no audio is in two" in text
    assert benchmark.main([*words, "--format", "json"]) == 0
    sheet = json.loads(capsys.readouterr().out)
    assert sheet["code"][0] == f"{folder}/mine.py"
    assert sheet["splits"]["test"]["utterances"] == 2


@pytest.mark.parametrize("task", ["classify", "sid", "ic"])
def test_a_corpus_that_is_known_is_checked_without_torch(folder: Path, task: str) -> None:
    """Importing torch takes longer than looking at a hundred thousand files again."""
    prepared(folder, task, labelled(), target="label")
    words = ["check", "--recipe", str(folder / "task.yaml"), "--results", str(folder / "results")]
    assert benchmark.main(words) == 0
    code = (
        "import sys, benchmark\n"
        "status = benchmark.main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else status)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train labels: a 2, b 2" in done.stdout


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_of_the_project_needs_no_option(name: str) -> None:
    """So a recipe that says nothing of its head is read without importing it."""
    assert bind(HEADS[name], {}, "head", ("layers", "dim", "classes")) is not None


def test_a_head_of_a_task_that_does_not_exist_is_told_early(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from downstream.tasks.sid import CLASSIFY\n"
        "TASK = replace(CLASSIFY, name='mine', head='uterance')\n"
    )
    prepared(folder, "classify", labelled(), target="label")
    content = yaml.safe_load((folder / "task.yaml").read_text())
    content["task"] = f"{folder / 'mine.py'}:TASK"
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        UserError, match=r"head: name: unknown head 'uterance'; did you mean utterance"
    ):
        recipe.load(folder / "task.yaml")
