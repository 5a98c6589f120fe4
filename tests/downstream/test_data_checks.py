"""What is doubtful about a corpus is told, goes into the score, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
import yaml

import benchmark
from downstream import recipe
from downstream.base import Item
from downstream.corpora import kaldi, lhotse, manifest
from downstream.run import data_checks
from downstream.run.prepare import Prepared, prepare
from downstream.tasks import asv, trials
from tests.corpora import fault
from upstream.common.errors import UserError

SPLITS = ["train"] * 4 + ["dev", "dev", "test", "test"]
TRAIN = {"steps": 1, "batch": 1, "lr": [0.1], "eval_every": 1}


def noise(seed: int, seconds: float = 1.0) -> numpy.ndarray:
    return 0.1 * numpy.random.default_rng(seed).standard_normal(round(16_000 * seconds))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        soundfile.write(tmp_path / f"{number}.wav", noise(number), 16_000)
    return tmp_path


def prepared(folder: Path, task: str, rows: list[dict[str, Any]], **corpus: Any) -> Prepared:
    """A table of `rows`, by default of 0.wav to 7.wav, and what `prepare` makes of it."""
    for number, row in enumerate(rows):
        row.setdefault("path", f"{number}.wav")
        row.setdefault("split", SPLITS[number])
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"name": "manifest", "root": str(folder), "file": "m.jsonl", **corpus}
    content = {"kind": "task", "task": task, "corpus": named, "train": TRAIN}
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    return prepare(recipe.load(folder / "task.yaml"), folder / "results")


def labelled(**changes: Any) -> list[dict[str, Any]]:
    return [{"label": "ab"[number % 2], **changes} for number in range(8)]


def only(found: Prepared, *words: str) -> str:
    (line,) = found.warnings
    assert "\n" not in line and all(word in line for word in words), line
    return line


# the same audio ---------------------------------------------------------------------------------


def test_a_sound_corpus_has_no_doubts(folder: Path) -> None:
    assert not prepared(folder, "classify", labelled(), target="label").warnings


def test_the_same_audio_in_train_and_test(folder: Path) -> None:
    for copy, of in ((6, 0), (7, 1), (5, 2)):
        (folder / f"{copy}.wav").write_bytes((folder / f"{of}.wav").read_bytes())
    found = prepared(folder, "classify", labelled(), target="label")
    test, dev = found.warnings
    assert "2 of 2 test utterances are the same audio as some of train: 6 = 0, 7 = 1" in test
    assert "1 of 2 dev utterances" in dev and "5 = 2" in dev


def test_a_doubt_is_in_the_score_and_on_the_page(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "6.wav").write_bytes((folder / "0.wav").read_bytes())
    rows = labelled()
    (warning,) = prepared(folder, "classify", rows, target="label").warnings
    results = folder / "results"
    words = ["--upstream", "fbank", "--suite", folder, "--results", results, "--workers", 1]
    assert benchmark.main(list(map(str, words))) == 0
    assert capsys.readouterr().err.count("same audio as some of train") <= 1
    (score,) = results.glob("fbank@*/*/task@*/seed0/score.json")
    assert warning in json.loads(score.read_text())["result"]["warnings"]
    assert "1 of 2 test utterances are the same audio" in (results / "report.html").read_text()


def test_parts_of_one_file_are_the_same_audio_only_where_they_overlap(folder: Path) -> None:
    soundfile.write(folder / "long.wav", noise(9, 8.0), 16_000)
    rows = labelled(path="long.wav")
    for number, row in enumerate(rows):
        row |= {"from": number, "to": number + 1}
    where = {"target": "label", "start": "from", "end": "to"}
    assert not prepared(folder, "classify", rows, **where).warnings
    rows[6] |= {"from": 2.5, "to": 3.5}
    only(prepared(folder, "classify", rows, **where), "1 of 2 test", "long:2.5-3.5 = long:2.0-3.0")


def test_two_targets_of_one_audio(folder: Path) -> None:
    (folder / "1.wav").write_bytes((folder / "0.wav").read_bytes())
    only(prepared(folder, "classify", labelled(), target="label"), "another target", "0 = 1")


def test_folds_are_asked_one_by_one(folder: Path) -> None:
    (folder / "6.wav").write_bytes((folder / "0.wav").read_bytes())
    rows = labelled()
    for number, row in enumerate(rows):
        row["split"] = f"fold{number // 4}"
    rows[6]["label"] = "a"
    content = {
        "kind": "task", "task": "er", "folds": True, "train": TRAIN,
        "corpus": {"name": "manifest", "root": str(folder), "file": "m.jsonl", "target": "label"},
    }  # fmt: skip
    for number, row in enumerate(rows):
        row["path"] = f"{number}.wav"
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    lines = prepare(recipe.load(folder / "task.yaml"), folder / "results").warnings
    assert any("of 8 test utterances" in line and "6 = 0" in line for line in lines)


# channels and silence ---------------------------------------------------------------------------


def test_opposite_phases_are_told_and_a_channel_mends_it(folder: Path) -> None:
    for number in (0, 3, 6):
        wave = noise(number)
        soundfile.write(folder / f"{number}.wav", numpy.stack([wave, -wave], 1), 16_000)
    found = prepared(folder, "classify", labelled(), target="label")
    cancelled, averaged = found.warnings
    assert "3 of 3 measured utterances are near silent after averaging" in cancelled
    assert "0, 3, 6" in cancelled and "`channel`" in cancelled
    assert "3 of 8 utterances have several channels" in averaged and "in 3 of 3" in averaged
    rows = labelled()
    for number in (0, 3, 6):
        rows[number]["channel"] = number % 2
    mended = prepared(folder, "classify", rows, target="label")
    assert not mended.warnings
    assert {clip.channel for clip in mended.clips} == {None, 0, 1}
    assert mended.revision != found.revision
    assert float(mended.clips[3].load()[0]) == pytest.approx(-noise(3)[0], abs=1e-4)


def test_two_speakers_on_two_channels(folder: Path) -> None:
    soundfile.write(folder / "0.wav", numpy.stack([noise(0), noise(50)], 1), 16_000)
    found = prepared(folder, "classify", labelled(), target="label")
    only(found, "1 of 8 utterances have several channels", "in 1 of 1 measured they differ")
    soundfile.write(folder / "0.wav", numpy.stack([noise(0)] * 2, 1), 16_000)
    assert not prepared(folder, "classify", labelled(), target="label").warnings, "twice the same"


def test_silence_is_counted(folder: Path) -> None:
    soundfile.write(folder / "5.wav", 1e-4 * noise(5), 16_000, subtype="FLOAT")
    found = prepared(folder, "classify", labelled(), target="label")
    only(found, "1 of 8 measured utterances are near silent", "5")


def test_a_large_corpus_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_checks, "MEASURED", 3)
    for number in range(8):
        wave = noise(number)
        soundfile.write(folder / f"{number}.wav", numpy.stack([wave, -wave], 1), 16_000)
    lines = prepared(folder, "classify", labelled(), target="label").warnings
    assert "3 of 3 measured" in lines[0] and "8 of 8 utterances have several" in lines[1]


@pytest.mark.parametrize("value", ["2", "-1", "left", "0.5", "99999"])
def test_a_channel_that_is_none(folder: Path, value: str) -> None:
    rows = labelled()
    rows[2]["channel"] = value
    with pytest.raises(UserError) as caught:
        prepared(folder, "classify", rows, target="label")
    assert "channel" in str(caught.value) and "counted from 0" in str(caught.value)


def test_channels_of_kaldi(folder: Path) -> None:
    soundfile.write(folder / "call.wav", numpy.stack([noise(0), noise(1)], 1), 16_000)
    home = folder / "train"
    home.mkdir()
    (home / "wav.scp").write_text(f"c-A {folder}/call.wav\nc-B {folder}/call.wav\nd 2.wav\n")
    (home / "reco2file_and_channel").write_text("c-A call A\nc-B call B\nd 2 A\n")
    (home / "text").write_text("c-A hello\nc-B bye\nd x\n")
    listed = kaldi.read(folder, "text", dev=None, test=None)
    assert [example.channel for example in listed] == [0, 1, None]
    (home / "reco2file_and_channel").write_text("c-A call A\nc-B call C\n")
    line = fault(kaldi.read, folder, "text", dev=None, test=None)
    assert "reco2file_and_channel:2: 'C' is no channel" in line


def test_channels_of_lhotse(folder: Path) -> None:
    said = {"id": "s", "start": 0, "duration": 1, "text": "hi", "speaker": "a", "channel": 1}
    source = {"type": "file", "channels": [0, 1], "source": "call.wav"}
    recording = {"id": "r", "sources": [source], "duration": 1.0}
    cuts = [
        {"id": f"c{n}", "type": "MonoCut", "start": 0, "duration": 1, "channel": n,
         "supervisions": [said], "recording": recording}
        for n in (0, 1)
    ]  # fmt: skip
    soundfile.write(folder / "call.wav", numpy.stack([noise(0), noise(1)], 1), 16_000)
    (folder / "cuts.jsonl").write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    listed = lhotse.read(folder, "text", train="cuts.jsonl", dev=None, test=None)
    assert [example.channel for example in listed] == [0, 1]


# times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["pc", "sd"])
@pytest.mark.parametrize("factor", [1000, 16_000, 2])
@pytest.mark.parametrize("row", [0, 4, 7])
def test_times_in_another_unit_are_refused(folder: Path, task: str, factor: int, row: int) -> None:
    rows = [{"turns": '[["a", 0.0, 0.4], ["b", 0.4, 0.9]]'} for _ in range(8)]
    assert not prepared(folder, task, rows, target="turns").warnings
    rows[row]["turns"] = json.dumps([["a", 0, 0.4 * factor], ["b", 0.4 * factor, 0.9 * factor]])
    with pytest.raises(UserError, match=f"{SPLITS[row]}: {row}: speech until") as caught:
        prepared(folder, task, rows, target="turns")
    assert ("milliseconds or samples" in str(caught.value)) == (factor > 2)


def test_turns_of_parts_are_asked_too(folder: Path) -> None:
    rows = [{"from": 0.1, "to": 0.9} for _ in range(8)]
    where = {"rttm": "all.rttm", "start": "from", "end": "to"}
    turns = "".join(f"SPEAKER {n} 1 0.2 0.3 <NA> <NA> anna <NA> <NA>\n" for n in range(8))
    (folder / "all.rttm").write_text(turns)
    prepared(folder, "sd", rows, **where)
    (folder / "all.rttm").write_text(turns + "SPEAKER 3 1 3200 4800 <NA> <NA> anna <NA> <NA>\n")
    with pytest.raises(UserError, match=r"all\.rttm: 3: speech until 8000 s in 1\.00 s"):
        prepared(folder, "sd", rows, **where)


@pytest.mark.parametrize(
    "name", ["Anna Maria <NA> <NA>", "Anna Maria", "Anna Maria <NA>", "Anna van Loon <NA> <NA>"]
)
def test_a_speaker_with_a_blank_in_rttm(folder: Path, name: str) -> None:
    (folder / "all.rttm").write_text(f"SPEAKER 0 1 0.2 0.3 <NA> <NA> {name}\n")
    (folder / "m.tsv").write_text("path\tsplit\n0.wav\ttrain\n")
    line = fault(manifest.read, folder, file="m.tsv", rttm="all.rttm")
    assert "all.rttm:1: the speaker 'Anna " in line and "has a blank in its name" in line
    (folder / "all.rttm").write_text("SPEAKER 0 1 0.2 0.3 <NA> <NA> anna 0.87 <NA>\n")
    assert len(manifest.read(folder, file="m.tsv", rttm="all.rttm")) == 1


# targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), "nan", "NaN", "<NA>", "", None])
def test_a_missing_label_is_no_class(folder: Path, value: Any) -> None:
    rows = labelled()
    rows[1]["label"] = value
    with pytest.raises(UserError, match=r"m\.jsonl:2: 'label' is "):
        prepared(folder, "classify", rows, target="label")


@pytest.mark.parametrize("value", ["None", "N/A", "null", "NAN"])
def test_what_may_be_a_missing_label_is_told(folder: Path, value: str) -> None:
    rows = labelled()
    rows[1]["label"] = rows[5]["label"] = value
    only(prepared(folder, "classify", rows, target="label"), f"'{value}' (2)", "1, 5")


def test_bars_and_long_texts_are_told(folder: Path) -> None:
    rows = [{"text": "A CAT"} for _ in range(8)]
    assert not prepared(folder, "asr", rows, target="text").warnings
    rows[2]["text"] = "A|CAT"
    only(prepared(folder, "asr", rows, target="text"), "1 transcripts hold `|`", "2")
    rows[2]["text"] = "AB " * 20
    only(prepared(folder, "asr", rows, target="text"), "1 targets have more", "2 (61 for 50)")
    rows[2]["text"] = "A" * 30  # 30 letters, a blank between each two, `|` and the end
    only(prepared(folder, "asr", rows, target="text"), "2 (61 for 50)")


def test_trials_that_contradict_the_speakers() -> None:
    items = [
        Item("a", "x", trials.write([(1, "b"), (0, "c")])),
        Item("b", "x", trials.write([(0, "a")])),
        Item("c", "y", trials.write([(1, "d")])),
        Item("d", "d", trials.write([])),  # no speaker is named
    ]
    (line,) = asv.TASK.doubts(items)
    assert line.startswith("1 trials contradict the speakers") and "b a" in line
    assert not asv.TASK.doubts(items[:1])
