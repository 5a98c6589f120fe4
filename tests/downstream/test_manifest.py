"""The manifest reader: three kinds of table, one clear line for each fault, and real speech."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from downstream.base import Example
from downstream.corpora import manifest
from tests.corpora import fault, wav
from upstream import audio
from upstream.common import PROJECT
from upstream.common.schema import bind

SAMPLE = Path(os.environ.get("SPEECH_SAMPLE", PROJECT.parent / "shared" / "speech"))


def table(folder: Path, lines: list[str], name: str = "manifest.tsv") -> Path:
    """A manifest with tabs for `|`, and its audio a.wav ... h.wav."""
    for letter in "abcdefgh":
        wav(folder / "audio" / f"{letter}.wav")
    separator = "," if name.endswith(".csv") else "\t"
    (folder / name).write_text("\n".join(lines).replace("|", separator) + "\n")
    return folder


ROWS = ["path|text|speaker|split"]
ROWS += ["audio/a.wav|HI|s1|train", "audio/b.wav|HO|s2|valid", "audio/c.wav|HA|s3|test"]


@pytest.mark.parametrize("name", ["manifest.tsv", "manifest.csv", "manifest.jsonl"])
def test_the_three_kinds_of_table(tmp_path: Path, name: str) -> None:
    lines = ROWS
    if name.endswith(".jsonl"):
        header = ROWS[0].split("|")
        lines = [json.dumps(dict(zip(header, row.split("|")))) for row in ROWS[1:]]
    table(tmp_path, lines, name)
    expected = [
        Example("audio/a", str(tmp_path / "audio/a.wav"), None, None, "HI", "s1", "train"),
        Example("audio/b", str(tmp_path / "audio/b.wav"), None, None, "HO", "s2", "dev"),
        Example("audio/c", str(tmp_path / "audio/c.wav"), None, None, "HA", "s3", "test"),
    ]
    assert manifest.read(tmp_path, "text", file=name) == expected
    elsewhere = manifest.read(Path("/"), "text", file=str(tmp_path / name))
    assert elsewhere == expected


def test_spreadsheet_habits(tmp_path: Path) -> None:
    """A byte order mark, CRLF, quoted commas and line breaks, a blank line at the end."""
    table(tmp_path, [])
    text = '\ufeffpath,text,split\r\naudio/a.wav,"A, B\nC",train\r\naudio/b.wav,D,test\r\n\r\n'
    (tmp_path / "m.csv").write_bytes(text.encode())
    examples = manifest.read(tmp_path, "text", file="m.csv")
    assert [e.target for e in examples] == ["A, B\nC", "D"]
    (tmp_path / "m.csv").write_bytes(text.replace("/b", "/z").encode())
    assert "m.csv:4: no audio file" in fault(manifest.read, tmp_path, "text", file="m.csv")
    (tmp_path / "m.csv").write_text('path,text,split\naudio/a.wav,"A,train\n')
    assert "not valid CSV" in fault(manifest.read, tmp_path, "text", file="m.csv")


def test_a_json_cell_is_only_text(tmp_path: Path) -> None:
    cell = '{"drink": "iced mocha", "milk": " soy"}'
    table(tmp_path, ["path|slots_json|split", f"audio/a.wav|{cell}|train"])
    (example,) = manifest.read(tmp_path, "slots_json")
    assert example.target == cell


def test_names_of_columns_and_parts_of_a_recording(tmp_path: Path) -> None:
    lines = ["key|wave|from|to|who|word|set"]
    lines += ["k1|audio/a.wav|0|0.005|s1|HI|train", "k2|audio/a.wav|0.005||s2|HO|fold9"]
    table(tmp_path, [*lines[:2], lines[2].replace("fold9", "dev")])
    columns = {"path": "wave", "start": "from", "end": "to", "speaker": "who", "split": "set"}
    one, two = manifest.read(tmp_path, "word", id="key", **columns)
    path = str(tmp_path / "audio/a.wav")
    assert one == Example("k1", path, 0.0, 0.005, "HI", "s1", "train")
    assert two == Example("k2", path, 0.005, None, "HO", "s2", "dev")
    assert [len(audio.load(e.path, e.start, e.end)) for e in (one, two)] == [80, 80]
    ids = [e.id for e in manifest.read(tmp_path, "word", **columns)]
    assert ids == ["audio/a:0.0-0.005", "audio/a:0.005-end"]
    table(tmp_path, lines)
    assert "partly folds" in fault(manifest.read, tmp_path, "word", id="key", **columns)


def test_without_a_speaker_column_each_utterance_is_its_own(tmp_path: Path) -> None:
    table(tmp_path, [row.replace("speaker", "person") for row in ROWS])
    assert [e.speaker for e in manifest.read(tmp_path, "text")] == ["audio/a", "audio/b", "audio/c"]
    assert "no column 'persn'; did you mean person?" in fault(
        manifest.read, tmp_path, "text", speaker="persn"
    )


@pytest.mark.parametrize(
    ("rows", "options", "parts"),
    [
        (ROWS, {"path": "pth"}, ["no column 'pth'; did you mean path?", "path, text, speaker"]),
        (ROWS, {"id": "utterance"}, ["no column 'utterance'; there is: path, speaker, split"]),
        (ROWS, {"split": "subset"}, ["no column 'subset'"]),
        (ROWS, {"dev": 0.1}, ["`split: null`"]),
        (ROWS, {"file": "manifst.tsv"}, ["no such file; did you mean manifest.tsv?"]),
        (ROWS, {"file": "manifest.xlsx"}, ["unknown kind of table"]),
        ([*ROWS, "audio/d.wav|HU|s1"], {}, [":5: 3 fields", "4 columns"]),
        ([*ROWS, "audio/d.wav||s1|train"], {}, [":5: 'text' is empty"]),
        ([*ROWS, "audio/d.wav|HU||train"], {}, [":5: 'speaker' is empty"]),
        ([*ROWS, "audio/d.wav|HU|s1|tain"], {}, [":5: unknown split 'tain'; did you mean train?"]),
        ([*ROWS, "audio/z.wav|HU|s1|dev"], {}, [":5: no audio file", "z.wav", "1 of 4"]),
        ([*ROWS, ROWS[1]], {}, [":5: id 'audio/a' is already on line 2"]),
        (["path|text|text"], {}, [":1: two columns are named 'text'"]),
        (ROWS[:1], {}, ["holds no rows"]),
        (["path|text|end", "audio/a.wav|A|1,5"], {"end": "end"}, [":2: 'end' is '1,5'"]),
        (["path|text|end", "audio/a.wav|A|0"], {"end": "end"}, [":2: the part ends at 0 s"]),
        (["path|text", "audio/a.wav|A"], {}, ["manifest.tsv: no split column", "`folds`"]),
        (["path|text", "audio/a.wav|A"], {"dev": 0.5}, ["1 rows are too few for `dev: 0.5`"]),
        (["path|text", "audio/a.wav|A"], {"dev": 1.5}, ["dev: 1.5 must be above 0 and below 1"]),
        (["path|text", "audio/a.wav|A"], {"dev": 0.5, "test": 0.5}, ["nothing for train"]),
        (["path|text", "audio/a.wav|A"], {"split_by": "speaker"}, ["needs a column of speakers"]),
        (["path|text", "audio/a.wav|A"], {"split_by": "spaeker"}, ["not one of row, speaker"]),
        (["path|text", "audio/a.wav|A"], {"folds": 5}, ["goes with `split_by: speaker`"]),
    ],
)
def test_one_clear_line(tmp_path: Path, rows: list[str], options: Any, parts: list[str]) -> None:
    def read(root: Path) -> None:
        manifest.read(root, "text", **bind(manifest.read, options, "corpus", ("root", "target")))

    line = fault(read, table(tmp_path, rows))
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"path": "audio/a.wav", ', "m.jsonl:2: not valid JSON"),
        ("[1, 2]", "m.jsonl:2: not an object"),
        ('{"path": "audio/a.wav", "text": ["A"]}', "m.jsonl:2: 'text' holds a list"),
        ('{"path": "audio/b.wav"}', "m.jsonl:2: 'text' is empty"),
        ('{"path": "audio/b.wav", "text": null}', "m.jsonl:2: 'text' is empty"),
    ],
)
def test_broken_json_lines(tmp_path: Path, line: str, part: str) -> None:
    table(tmp_path, ['{"path": "audio/a.wav", "text": 7}', line], "m.jsonl")
    assert part in fault(manifest.read, tmp_path, "text", file="m.jsonl", dev=0.5)


@pytest.mark.parametrize(
    ("folder", "target", "rows", "speakers"),
    [
        ("librispeech_asr", "text", 66, 3),
        ("librispeech_sid", "speaker", 100, 10),
        ("fsdd", "digit", 600, 6),
        ("emodb4", "emotion", 339, 10),
        ("coffee_intent", "slots_json", 60, 60),
    ],
)
def test_real_speech(folder: str, target: str, rows: int, speakers: int) -> None:
    if not SAMPLE.exists() and "SPEECH_SAMPLE" not in os.environ:
        pytest.skip(f"no real speech at {SAMPLE}; set SPEECH_SAMPLE")
    examples = manifest.read(SAMPLE / folder, target, path="file", dev=0.1, test=0.2)
    assert len(examples) == rows and len({e.speaker for e in examples}) == speakers
    splits = Counter(e.split for e in examples)
    assert abs(splits["dev"] - rows / 10) <= 1
    assert abs(splits["test"] - rows / 5) <= 1
    wave = audio.load(examples[0].path)
    assert len(wave) == pytest.approx(16000 * audio.seconds(examples[0].path), abs=1)
    assert 0.01 < wave.abs().max() <= 1
