"""Common Voice and NeMo as they come, and where a recipe's relative paths lead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from downstream import recipe
from downstream.base import Example
from downstream.corpora import common_voice, folder, manifest, nemo
from tests.corpora import fault, splits, wav
from upstream.common.errors import UserError

HEAD = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    names = {"train": "abc", "dev": "d", "test": "ef"}
    for number, (split, letters) in enumerate(names.items()):
        rows = [HEAD]
        for letter in letters:
            wav(tmp_path / "clips" / f"cv_{letter}.wav")
            gender = "" if letter in "be" else "female"
            sentence = f'"Why, {letter}?" he said'
            rows.append(f"s{number}\tcv_{letter}.wav\t{sentence}\t2\t0\t\t{gender}\t\ten\t")
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_common_voice(voices: Path) -> None:
    listed = common_voice.read(voices)
    assert splits(listed) == {"train": 3, "dev": 1, "test": 2}
    path = str(voices / "clips" / "cv_a.wav")
    assert listed[0] == Example("cv_a", path, None, None, '"Why, a?" he said', "s0", "train")
    assert [e.target for e in common_voice.read(voices, "speaker", group="locale")][:2] == [
        "s0"
    ] * 2
    assert "train.tsv:3: 'gender' is empty" in fault(common_voice.read, voices, "gender")
    assert splits(common_voice.read(voices, "gender", unlabelled=True)) == {
        "train": 2, "dev": 1, "test": 1,
    }  # fmt: skip
    only = common_voice.read(voices, train="dev", dev=None)
    assert splits(only) == {"train": 1, "test": 2}


def test_faults_of_common_voice(voices: Path) -> None:
    assert "no column 'sentense'; did you mean sentence" in fault(
        common_voice.read, voices, "sentense"
    )
    assert "no such file; did you mean train.tsv" in fault(common_voice.read, voices, train="trian")
    (voices / "clips" / "cv_f.wav").unlink()
    assert "test.tsv:3: no audio file" in fault(common_voice.read, voices)
    assert "clips" in fault(common_voice.read, voices / "clips")


def entries(home: Path, name: str, *rows: dict[str, Any]) -> None:
    (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nemo(tmp_path: Path) -> None:
    for letter in "abc":
        wav(tmp_path / "wav" / f"{letter}.wav")
    more = {"lang": ["en", "de"], "extra": {"deep": 1}}
    one = {"audio_filepath": "wav/a.wav", "duration": 0.01, "text": "hello", **more}
    two = {"audio_filepath": str(tmp_path / "wav/b.wav"), "duration": 0.004, "offset": 0.002,
           "text": "bye", "speaker": "x"}  # fmt: skip
    entries(tmp_path, "train_manifest.json", {**one, "speaker": "x"}, two)
    entries(tmp_path, "val.json", {**one, "audio_filepath": "wav/c.wav"})
    listed = nemo.read(tmp_path, dev="val.json", test=None)
    place = str(tmp_path / "wav")
    assert listed == [
        Example("wav/a:0.0-0.01", f"{place}/a.wav", None, 0.01, "hello", "x", "train"),
        Example(f"{place}/b:0.002-0.006", f"{place}/b.wav", 0.002, 0.006, "bye", "x", "train"),
        Example("wav/c:0.0-0.01", f"{place}/c.wav", None, 0.01, "hello", "wav/c:0.0-0.01", "dev"),
    ]
    for change, words in (
        ({"duration": None}, ":1: 'duration' is '', not a time"),
        ({"duration": 0}, ":1: 'duration' is 0"),
        ({"duration": "x"}, ":1: 'duration' is 'x'"),
        ({"offset": -1}, ":1: 'offset' is '-1'"),
        ({"text": float("nan")}, ":1: 'text' is empty"),
        ({"text": ["a"]}, ":1: 'text' holds a list"),
        ({"audio_filepath": "z.wav"}, ":1: no audio file"),
        ({"audio_filepath": "z" * 100_000}, "(100"),
    ):
        entries(tmp_path, "train_manifest.json", {**one, **change})
        line = fault(nemo.read, tmp_path, dev=None, test=None)
        assert words in line and len(line) < 800, line


@pytest.mark.parametrize("key", ["path", "text", "speaker"])
def test_half_an_emoji_is_one_line(tmp_path: Path, key: str) -> None:
    wav(tmp_path / "a.wav")
    row = {"path": "a.wav", "text": "x", "speaker": "s", "split": "train"}
    for value in ("\ud83d", "ok \ude00", "\ud83d" * 1000):
        entries(tmp_path, "m.jsonl", {**row, key: value})
        line = fault(manifest.read, tmp_path, "text", file="m.jsonl")
        assert "m.jsonl:1: '" + key + "' holds half a character" in line
        line.encode()
    entries(tmp_path, "m.jsonl", {**row, "text": "\U0001f600"})
    assert manifest.read(tmp_path, "text", file="m.jsonl")[0].target == "\U0001f600"


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    for number in range(30):
        wav(tmp_path / f"{number}.wav")
    os.rename(tmp_path / "3.wav", os.fsencode(tmp_path) + b"/\xe9t\xe9.wav")
    line = fault(folder.read, tmp_path, dev=0.3)
    line.encode()
    assert "is not UTF-8; rename the file" in line
    (tmp_path / "m.tsv").write_text("path\ttext\tsplit\na\0b.wav\tx\ttrain\n")
    assert "no audio file" in fault(manifest.read, tmp_path, "text", file="m.tsv")


# where relative paths lead ------------------------------------------------------------------------


def test_a_root_is_beside_the_recipe_or_where_one_stands(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "suite", tmp_path / "elsewhere"
    for place in (home, elsewhere):
        place.mkdir()
    (home / "task.yaml").write_text(
        "kind: task\ntask: classify\ncorpus: {name: manifest, root: data, target: label}\n"
        "train: {steps: 1, batch: 1, lr: [0.1], eval_every: 1}\n"
    )
    read = recipe.load(home / "task.yaml")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match="data"):
        recipe.examples(read, tmp_path)
    (elsewhere / "data").symlink_to(tones)
    assert len(recipe.examples(read, tmp_path)) == 72, "as ever: where one stands"
    (home / "data").symlink_to(tones)
    assert len(recipe.examples(read, tmp_path)) == 72, "the same folder is no ambiguity"
    (elsewhere / "data").unlink()
    assert len(recipe.examples(read, tmp_path)) == 72, "beside the recipe"
    (elsewhere / "data").mkdir()
    with pytest.raises(UserError, match=r"corpus: root: data is both .*suite/data and .*elsewhere"):
        recipe.examples(read, tmp_path)
    changed = recipe.load(home / "task.yaml", {"corpus.root": "$RECIPE/data"})
    assert len(recipe.examples(changed, tmp_path)) == 72 and changed.hash == read.hash
