"""LibriSpeech, VoxCeleb1 and IEMOCAP: tiny corpora in their original layouts, and faulty copies."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import pytest

from downstream.base import CORPORA, Example
from downstream.corpora import iemocap, librispeech, voxceleb1
from tests.corpora import fault, splits, wav
from upstream.common.schema import bind

READERS = """librispeech voxceleb1 iemocap speech_commands fluent_speech_commands snips
    manifest kaldi lhotse"""


@pytest.mark.parametrize("name", READERS.split())
def test_a_signature_is_a_schema(name: str) -> None:
    root, target, *options = inspect.signature(CORPORA[name]).parameters.values()
    hints = get_type_hints(CORPORA[name])  # without bounds
    assert hints[root.name] is Path
    columns = {"manifest": str | list[str] | None, "kaldi": str, "lhotse": str}
    column = name in columns and hints[target.name] == columns[name]
    assert column or get_origin(hints[target.name]) is Literal
    simple = (str, bool, str | None, float | None, int | None, Literal["row", "speaker"])
    simple += (str | list[str] | None,)
    for option in options:
        assert option.kind is option.KEYWORD_ONLY and hints[option.name] in simple


# LibriSpeech ------------------------------------------------------------------------------------


@pytest.fixture
def libri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part, speakers in (("train-clean-100", "19 26"), ("dev-clean", "84"), ("test-clean", "61")):
        for speaker in speakers.split():
            chapter = tmp_path / part / speaker / "198"
            for number in range(3):
                wav(chapter / f"{speaker}-198-{number:04d}.flac")
            lines = [f"{speaker}-198-{number:04d} THE CAT'S {number}\n" for number in range(3)]
            (chapter / f"{speaker}-198.trans.txt").write_text("".join(lines))
    sizes = {"train-clean-100": 6, "dev-clean": 3, "test-clean": 3, "test-other": 3}
    monkeypatch.setattr(librispeech, "SIZES", sizes)
    return tmp_path


def test_librispeech(libri: Path) -> None:
    examples = librispeech.read(libri, "text")
    assert splits(examples) == {"train": 6, "dev": 3, "test": 3}
    path = str(libri / "train-clean-100/19/198/19-198-0001.flac")
    assert examples[1] == Example("19-198-0001", path, None, None, "THE CAT'S 1", "19", "train")
    assert all(os.path.exists(example.path) for example in examples)
    speakers = librispeech.read(libri, "speaker")
    assert Counter(e.target for e in speakers) == {"19": 3, "26": 3, "84": 3, "61": 3}


def test_librispeech_sizes_are_the_published_ones() -> None:
    assert [librispeech.SIZES[part] for part in ("train-clean-100", "dev-clean", "test-clean")] == [
        28539,
        2703,
        2620,
    ]
    train = [size for part, size in librispeech.SIZES.items() if part.startswith("train")]
    assert sum(train) == 281241


def test_librispeech_names_what_is_missing(libri: Path) -> None:
    line = fault(librispeech.read, libri, "text", dev="dev-claen")
    assert "did you mean dev-clean?" in line
    line = fault(librispeech.read, libri, "text", test="test-other")
    assert f"{libri / 'test-other'}: no such folder; did you mean test-clean?" in line
    (libri / "dev-clean/84/198/84-198-0001.flac").unlink()
    line = fault(librispeech.read, libri, "text")
    assert f"{libri / 'dev-clean'}: 1 of 3 audio files" in line and "84-198-0001.flac" in line
    assert "`check: false`" in line
    assert splits(librispeech.read(libri, "text", check=False))["dev"] == 2
    (libri / "train-clean-100/26/198/26-198.trans.txt").unlink()
    line = fault(librispeech.read, libri, "text")
    assert f"{libri / 'train-clean-100'}: 3 utterances in train, 6 expected" in line
    for path in (libri / "dev-clean/84/198").glob("*.flac"):
        path.unlink()
    assert "none of the 3" in fault(librispeech.read, libri, "text", check=False)
    assert "no such folder" in fault(librispeech.read, libri / "nowhere", "text")


def test_librispeech_line_without_words(libri: Path) -> None:
    (libri / "test-clean/61/198/61-198.trans.txt").write_text("61-198-0000 HI\n61-198-0001\n")
    assert "61-198.trans.txt:2: no words" in fault(librispeech.read, libri, "text")


# VoxCeleb1 --------------------------------------------------------------------------------------

IDEN = """1 id10001/v1/00001.wav
1 id10002/v2/00001.wav
2 id10001/v1/00002.wav
3 id10002/v2/00002.wav
"""


@pytest.fixture
def vox_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxceleb1, "SIZES", {"train": 2, "dev": 1, "test": 1})
    monkeypatch.setattr(voxceleb1, "SPEAKERS", 2)


def test_voxceleb1_sizes_are_the_published_ones() -> None:
    assert sum(voxceleb1.SIZES.values()) == 153516 and voxceleb1.SPEAKERS == 1251


@pytest.mark.usefixtures("vox_sizes")
@pytest.mark.parametrize("homes", [("wav", "wav"), ("dev/wav", "test/wav")])
@pytest.mark.parametrize("name", ["iden_split.txt", "veri_test_class.txt"])
def test_voxceleb1(tmp_path: Path, homes: tuple[str, str], name: str) -> None:
    for home, speaker, video in zip(homes, ("id10001", "id10002"), ("v1", "v2")):
        for number in (1, 2):
            wav(tmp_path / home / speaker / video / f"{number:05d}.wav")
    (tmp_path / name).write_text(IDEN)
    examples = voxceleb1.read(tmp_path, "speaker")
    assert splits(examples) == {"train": 2, "dev": 1, "test": 1}
    path = str(tmp_path / homes[1] / "id10002/v2/00001.wav")
    assert examples[1] == Example(
        "id10002/v2/00001", path, None, None, "id10002", "id10002", "train"
    )
    assert all(os.path.exists(example.path) for example in examples)


@pytest.mark.usefixtures("vox_sizes")
def test_voxceleb1_names_what_is_missing(tmp_path: Path) -> None:
    assert "neither iden_split.txt nor" in fault(voxceleb1.read, tmp_path, "speaker")
    (tmp_path / "iden_split.txt").write_text(IDEN)
    assert "dev/wav" in fault(voxceleb1.read, tmp_path, "speaker")
    for name in IDEN.split()[1:6:2]:
        wav(tmp_path / "wav" / name)
    line = fault(voxceleb1.read, tmp_path, "speaker")
    assert "1 of 4 audio files" in line and "id10002/v2/00002.wav" in line
    assert splits(voxceleb1.read(tmp_path, "speaker", check=False)) == {"train": 2, "dev": 1}
    (tmp_path / "iden_split.txt").write_text(IDEN.replace("3 id", "2 id"))
    assert "2 utterances in dev, 1 expected" in fault(voxceleb1.read, tmp_path, "speaker")
    (tmp_path / "iden_split.txt").write_text(IDEN + "4 id10001/v1/00001.wav\n")
    assert "iden_split.txt:5: '4 id10001" in fault(voxceleb1.read, tmp_path, "speaker")
    line = fault(voxceleb1.read, tmp_path, "speaker", split_file="idem_split.txt")
    assert "did you mean iden_split.txt?" in line


def test_a_target_that_a_corpus_lacks_is_seen_in_the_recipe() -> None:
    line = fault(bind, voxceleb1.read, {"target": "emotion"}, "corpus", ("root",))
    assert line == "corpus: target: 'emotion' is not one of speaker"


# IEMOCAP ----------------------------------------------------------------------------------------

LABELS = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes0{k}F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\tSes0{k}F_impro01_M000\texc\t[2.5000, 2.5000, 2.5000]
C-F1:\tExcited;\t()

[14.8872 - 18.0175]\tSes0{k}F_impro01_F001\tfru\t[2.5000, 2.5000, 2.5000]
[19.2900 - 20.7875]\tSes0{k}F_impro01_FXX0\txxx\t[2.5000, 3.0000, 2.5000]
[21.3257 - 24.7400]\tSes0{k}F_impro01_M001\tang\t[1.5000, 4.0000, 2.5000]
"""


@pytest.fixture
def emo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for k in range(1, 6):
        session = tmp_path / f"Session{k}"
        labels = session / "dialog" / "EmoEvaluation"
        labels.mkdir(parents=True)
        (labels / f"Ses0{k}F_impro01.txt").write_text(LABELS.format(k=k))
        (labels / f"._Ses0{k}F_impro01.txt").write_bytes(b"\0\5\x16\7\xff")
        (labels / f"Ses0{k}M_script01_1b.txt").write_text(
            f"[1.0 - 2.0]\tSes0{k}M_script01_1b_F003\tsad\t[1.0, 2.0, 2.0]\n"
        )
        for name in ("F_impro01_F000", "F_impro01_M000", "F_impro01_M001", "M_script01_1b_F003"):
            dialogue = name.rpartition("_")[0]
            wav(session / "sentences" / "wav" / f"Ses0{k}{dialogue}" / f"Ses0{k}{name}.wav")
    monkeypatch.setattr(iemocap, "SIZES", {f"session{k}": 4 for k in range(1, 6)})
    return tmp_path


def test_iemocap(emo: Path) -> None:
    examples = iemocap.read(emo, "emotion")
    assert splits(examples) == {f"session{k}": 4 for k in range(1, 6)}
    first = [(e.id, e.target, e.speaker) for e in examples if e.split == "session1"]
    assert first == [
        ("Ses01F_impro01_F000", "neu", "Ses01F"),
        ("Ses01F_impro01_M000", "hap", "Ses01M"),
        ("Ses01F_impro01_M001", "ang", "Ses01M"),
        ("Ses01M_script01_1b_F003", "sad", "Ses01F"),
    ]
    assert len({e.speaker for e in examples}) == 10
    assert all(os.path.exists(example.path) for example in examples)


def test_iemocap_names_what_is_missing(emo: Path) -> None:
    (emo / "Session3/sentences/wav/Ses03F_impro01/Ses03F_impro01_M001.wav").unlink()
    line = fault(iemocap.read, emo, "emotion")
    assert "1 of 20 audio files" in line and "Ses03F_impro01_M001.wav" in line
    assert splits(iemocap.read(emo, "emotion", check=False))["session3"] == 3
    (emo / "Session4/dialog").rename(emo / "Session4/Dialog")
    assert "0 utterances in session4, 4 expected" in fault(iemocap.read, emo, "emotion")
    assert "original layout" in fault(iemocap.read, emo / "Session1", "emotion", check=False)
    assert "no such folder" in fault(iemocap.read, emo / "Nowhere", "emotion")


def test_iemocap_sizes_are_the_published_ones() -> None:
    assert list(iemocap.SIZES.values()) == [1085, 1023, 1151, 1031, 1241]
    assert sum(iemocap.SIZES.values()) == 5531
