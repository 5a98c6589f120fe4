"""Kaldi data directories and Lhotse cuts: what they say, and one line for what cannot be used."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from downstream.base import Example
from downstream.corpora import kaldi, lhotse
from downstream.tasks import trials
from tests.corpora import fault, wav
from upstream.common.errors import UserError

# Kaldi ------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, name in (("train", "a"), ("dev", "b"), ("test", "c")):
        wav(tmp_path / "wav" / f"{name}.wav")
        folder = tmp_path / split
        folder.mkdir()
        (folder / "wav.scp").write_text(f"rec.{name}  wav/{name}.wav\n")
        (folder / "segments").write_text(
            f"{name}1 rec.{name} 0 0.004\n{name}2 rec.{name} 0.005 -1\n"
        )
        (folder / "text").write_text(f"{name}1 hello\tworld\n{name}2 Grüße\n")
        (folder / "utt2spk").write_text(f"{name}1 s{name}\n{name}2 s{name}\n")
        (folder / "utt2lang").write_text(f"{name}1 en\n{name}2 de\n")
        (folder / "spk2gender").write_text(f"s{name} f\n")
        (folder / "rttm").write_text(f"SPEAKER rec.{name} 1 0.003 0.004 <NA> <NA> x <NA> <NA>\n")
        (folder / "trials").write_text(f"{name}1 {name}2 nontarget\n")
    return tmp_path


def test_kaldi(data: Path) -> None:
    examples = kaldi.read(data, "text", group="utt2lang")
    path = str(data / "wav" / "a.wav")
    assert examples[:2] == [
        Example("a1", path, 0.0, 0.004, "hello\tworld", "sa", "train", "en"),
        Example("a2", path, 0.005, None, "Grüße", "sa", "train", "de"),
    ]
    assert [e.split for e in examples] == ["train"] * 2 + ["dev"] * 2 + ["test"] * 2
    assert {e.target for e in kaldi.read(data, "spk2gender")} == {"f"}
    assert [e.target for e in kaldi.read(data, "utt2lang", dev=None)] == ["en", "de"] * 2
    os.remove(data / "test/segments")
    for name in ("text", "utt2spk"):
        (data / "test" / name).write_text("rec.c HI\n")
    assert kaldi.read(data, "text")[-1] == Example(
        "rec.c", str(data / "wav/c.wav"), None, None, "HI", "HI", "test"
    )


def test_turns_and_trials_of_kaldi(data: Path) -> None:
    targets = [json.loads(e.target) for e in kaldi.read(data, "rttm")]
    assert targets[:2] == [[["x", 0.003, 0.004]], [["x", 0.0, 0.002]]]
    examples = kaldi.read(data, "trials")
    assert examples[0].target == "sa"
    assert [trials.read(e.target) for e in examples[2:4]] == [[(0, "b2")], []]


def test_the_same_audio_in_dev_and_test_is_of_both(data: Path) -> None:
    examples = kaldi.read(data, "text", train=None, test="dev")
    assert [e.split for e in examples] == ["dev test"] * 2
    assert "is already at" in fault(kaldi.read, data, "text", dev="train")


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("wav.scp", "rec.b sph2pipe -f wav x.sph |", "is a command, which is not run"),
        ("wav.scp", "rec.b touch hacked |\nrec.c x", "is a command, which is not run"),
        ("wav.scp", "rec.d wav/b.wav", "wav.scp has no recording 'rec.b'; did you mean"),
        ("wav.scp", "rec.b wav/z.wav", "segments:1: no audio file"),
        ("wav.scp", "rec.b wav/b.wav\nrec.b wav/b.wav", "wav.scp:2: 'rec.b' is already on line 1"),
        ("wav.scp", "", "holds no lines"),
        ("segments", "b1 rec.b 0", "segments:1: is not `utterance recording start end`"),
        ("segments", "b1 rec.b 2 1", "segments:1: the part ends at 1 s"),
        ("segments", "b1 rec.b nan 1", "segments:1: the start is 'nan'"),
        ("segments", "b1 rec.b 0 -2", "segments:1: the end is '-2'"),
        ("text", "b1 hi", "dev/text: says nothing of 'b2'"),
        ("text", "b1 hi\nb2", "dev/text:2: says nothing of 'b2'"),
        ("text", "b1 hi\nb2 hi\nb3 hi", "dev/text:3: segments has no 'b3'; run utils/fix_data_dir"),
        ("utt2spk", "b1 s", "dev/utt2spk: says nothing of 'b2'"),
        ("utt2lang", "b1 en", "dev/utt2lang: says nothing of 'b2'"),
    ],
)
def test_faults_of_kaldi(data: Path, file: str, content: str, part: str) -> None:
    (data / "dev" / file).write_text(content + "\n")
    line = fault(kaldi.read, data, "text", group="utt2lang")
    assert part in line, line
    assert not (data / "hacked").exists()


def test_what_is_missing_of_kaldi(data: Path) -> None:
    assert "see `test` in the recipe" in fault(kaldi.read, data, "text", test="tst")
    assert "utt2age: no such file" in fault(kaldi.read, data, "utt2age")
    os.remove(data / "dev/utt2spk")
    assert {e.speaker for e in kaldi.read(data, "text")} >= {"b1", "b2"}
    assert "no utt2spk beside it" in fault(kaldi.read, data, "spk2gender")
    os.mkfifo(data / "dev/utt2spk")
    assert "is a pipe" in fault(kaldi.read, data, "text")


# Lhotse -----------------------------------------------------------------------------------------


def cut(name: str, **changes: Any) -> dict[str, Any]:
    """A cut as Lhotse 1.33 writes it."""
    said = {
        "id": f"{name}-s", "recording_id": name, "start": 0.0, "duration": 0.01, "channel": 0,
        "text": "hello", "language": "en", "speaker": "s1", "gender": "F",
        "custom": {"emotion": "sad"},
    }  # fmt: skip
    source = {"type": "file", "channels": [0], "source": "wav/a.wav"}
    recording = {
        "id": name, "sources": [source], "sampling_rate": 16000, "num_samples": 160,
        "duration": 0.01, "channel_ids": [0],
    }  # fmt: skip
    whole = {
        "id": f"{name}-0", "start": 0, "duration": 0.01, "channel": 0, "supervisions": [said],
        "recording": recording, "type": "MonoCut",
    }  # fmt: skip
    return {**whole, **changes}


def write(folder: Path, *cuts: dict[str, Any]) -> None:
    content = "".join(json.dumps(c) + "\n" for c in cuts)
    (folder / "cuts_train.jsonl.gz").write_bytes(gzip.compress(content.encode()))


@pytest.fixture
def cuts(tmp_path: Path) -> Path:
    wav(tmp_path / "wav" / "a.wav")
    write(tmp_path, cut("r1"), cut("r2", start=0.002, duration=0.008))
    said = cut("x")["supervisions"][0]
    late = {**said, "start": 0.008, "duration": 0.5, "speaker": "s2"}
    early = {**said, "start": -0.1, "duration": 0.102}
    (tmp_path / "cuts_dev.jsonl").write_text(json.dumps(cut("r3", supervisions=[late, early])))
    return tmp_path


def read(folder: Path, target: str, **options: Any) -> list[Example]:
    return lhotse.read(folder, target, **{"dev": None, "test": None, **options})


def test_lhotse(cuts: Path) -> None:
    path = str(cuts / "wav/a.wav")
    assert read(cuts, "text", group="language") == [
        Example("r1-0", path, None, None, "hello", "s1", "train", "en"),
        Example("r2-0", path, 0.002, 0.01, "hello", "s1", "train", "en"),
    ]
    assert [e.target for e in read(cuts, "emotion")] == ["sad", "sad"]
    (turns,) = read(cuts, "turns", train=None, dev="cuts_dev.jsonl")
    assert turns.speaker == "s1 + s2"
    assert json.loads(turns.target) == [["s1", 0.0, 0.002], ["s2", 0.008, 0.01]]


def change(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Another value in the recording, its source or the supervision."""

    def apply(content: dict[str, Any]) -> None:
        place: Any = {
            "cut": content,
            "recording": content["recording"],
            "source": content["recording"]["sources"][0],
            "said": content["supervisions"][0],
        }[name]
        place.update(changes)

    return apply


@pytest.mark.parametrize(
    ("apply", "part"),
    [
        (change("cut", type="MixedCut"), "cuts_train.jsonl.gz:1: a MixedCut is not one piece"),
        (change("cut", supervisions=[]), ":1: 0 supervisions, one is needed; make one cut of each"),
        (change("cut", duration="x"), ":1: not a cut of Lhotse"),
        (change("cut", duration=-1), ":1: the cut lasts from 0 to -1 s"),
        (change("cut", start=float("nan")), ":1: the cut lasts from nan"),
        (change("cut", recording=None), ":1: not a cut of Lhotse"),
        (change("recording", transforms=[{"name": "Speed"}]), "has transforms (Speed)"),
        (change("source", type="command", source="touch hacked"), "is a command, not a file"),
        (change("source", type="url", source="http://x"), "is a url, not a file"),
        (change("source", channels=[1, 2]), "its channel 0 is none of the file's ([1, 2])"),
        (change("cut", channel=2), "its channel 2 is none of the file's ([0])"),
        (change("said", text=float("nan")), "has no 'text'"),
        (change("source", source="wav/z.wav"), ":1: no audio file"),
        (change("said", text=None), "has no 'text' (it has: speaker, language, gender, emotion)"),
        (change("said", text=" "), "has no 'text'"),
        (change("said", duration=0.5), "words may be cut off"),
        (change("said", start=-0.5), "words may be cut off"),
    ],
)
def test_faults_of_lhotse(cuts: Path, apply: Any, part: str) -> None:
    content = cut("r1")
    apply(content)
    write(cuts, content)
    line = fault(read, cuts, "text")
    assert part in line, line


def packed(content: bytes) -> bytes:
    """The same bytes in every process: they are in the names of tests."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"not gzip", "cannot be read"),
        (packed(b"x" * 1000)[:-20], "cannot be read"),
        (packed(b"\xff\xfe{}"), ":1: not a line of JSON"),
        (packed(b"[1]\n"), ":1: not an object"),
        (packed(b'{"a":' * 100_000), ":1: not a line of JSON"),
        (packed(b"0" * (1 << 25)), ":1: longer than"),
        (packed(b""), "holds no cuts"),
        (None, "is a pipe"),
    ],
)
def test_hostile_cuts(cuts: Path, content: bytes | None, part: str) -> None:
    path = cuts / "cuts_train.jsonl.gz"
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)
    line = fault(read, cuts, "text")
    assert part in line, line


def test_cuts_of_one_id(cuts: Path) -> None:
    write(cuts, cut("r1"), cut("r1"))
    assert "cuts_train.jsonl.gz:2: id 'r1-0' is already at" in fault(read, cuts, "text")


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested dicts and lists stand."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield (*above, key)
            yield from places(content[key], (*above, key))


@pytest.mark.parametrize("target", ["text", "turns"])
def test_any_value_of_a_cut_may_be_wrong(cuts: Path, target: str) -> None:
    whole = json.dumps(cut("r1"))
    for place in places(json.loads(whole)):
        for value in (
            None,
            True,
            -1,
            10**30,
            float("nan"),
            "",
            "\0",
            "\ud800",
            [],
            {},
            [[]],
            "é" * 300,
        ):
            content = json.loads(whole)
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (cuts / "odd.jsonl").write_text(json.dumps(content))
            try:
                read(cuts, target, train="odd.jsonl", group="language")
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500, (place, value)
