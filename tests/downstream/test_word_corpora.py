"""Speech Commands, Fluent Speech Commands, Audio SNIPS: small copies, whole and faulty."""

from __future__ import annotations

import os
import random
import sys
import types
from collections import Counter
from pathlib import Path

import numpy
import pytest
import soundfile

from downstream.base import Example
from downstream.corpora import fluent_speech_commands, snips, speech_commands
from tests.corpora import fault, splits, wav
from tests.optional import required

# Speech Commands --------------------------------------------------------------------------------

TRAIN, TEST = "speech_commands_v0.01", "speech_commands_test_set_v0.01"


def second(path: Path, seconds: float = 1.0) -> None:
    wav(path)
    soundfile.write(path, numpy.zeros(int(16000 * seconds), dtype=numpy.float32), 16000)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = random.Random(0)
    for folder in ("yes", "bed"):
        for _ in range(30):
            wav(tmp_path / TRAIN / folder / f"{rng.randrange(16**8):08x}_nohash_0.wav")
    for name, length in (("pink_noise", 20.7), ("dude_miaowing", 12.0)):
        second(tmp_path / TRAIN / "_background_noise_" / f"{name}.wav", length)
    for name in ("yes/37fc5d97_nohash_0", "_unknown_/bed_37fc5d97_nohash_1.wav", "_silence_/1035"):
        wav(tmp_path / TEST / f"{name}.wav")
    words = Counter(map(speech_commands.subset, os.listdir(tmp_path / TRAIN / "yes")))
    words += Counter(map(speech_commands.subset, os.listdir(tmp_path / TRAIN / "bed")))
    monkeypatch.setattr(speech_commands, "SIZES", {k: words[k] for k in ("train", "dev")})
    monkeypatch.setattr(speech_commands, "TESTED", {"test": 3})
    monkeypatch.setattr(speech_commands, "NOISES", 2)
    return tmp_path


def test_the_split_of_words_is_s3prls(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: types.ModuleType(name) for name in ("librosa", "librosa.util", "pandas")}
    others["librosa.util"].find_files = None  # type: ignore[attr-defined]
    others["pandas"].DataFrame = object  # type: ignore[attr-defined]
    for name, module in others.items():  # which s3prl's corpora import for other things
        monkeypatch.setitem(sys.modules, name, module)
    SpeechCommandsV1 = required("s3prl.dataio.corpus.speech_commands").SpeechCommandsV1

    examples = speech_commands.read(commands, "word")
    ours = {(e.split, Path(e.path)) for e in examples if "nohash" in e.id and e.split != "test"}
    train, dev = SpeechCommandsV1.split_dataset(commands / TRAIN)
    theirs = {("train", path) for _, path in train} | {("dev", path) for _, path in dev}
    assert ours == theirs and len(theirs) < 60 and len(dev) > 1, "some are test, some are dev"


def test_the_rule_tests_on_the_speakers_of_the_test_archive() -> None:
    names = """3ff840aa 95ba4996 d7467392 5ff3f9a1 412c675c 4f8ef132 b737ee80 37fc5d97 422d3197
        4a0e2c16 0c40e715 8a325749 7dc95912 8625475c 7192fddc 9d171fee 8494fba8""".split()
    assert {speech_commands.subset(f"{name}_nohash_0.wav") for name in names} == {"test"}


def test_the_rule_keeps_a_speakers_takes_of_a_word_together() -> None:
    for name in ("0a7c2a8d", "00f0204f", "bed"):
        takes = {speech_commands.subset(f"{name}_nohash_{take}.wav") for take in range(9)}
        assert len(takes) == 1
    names = (f"{number:08x}_nohash_0.wav" for number in range(20_000))
    shares = Counter(map(speech_commands.subset, names))
    assert shares["dev"] == pytest.approx(2000, abs=150) and 1850 < shares["test"] < 2150


def test_classes_speakers_and_silence(commands: Path) -> None:
    examples = {e.id: e for e in speech_commands.read(commands, "word")}
    labels = Counter(e.target for e in examples.values() if e.split != "test")
    assert set(labels) == {"yes", "_unknown_", "_silence_"} and labels["_silence_"] == 32
    tested = [(e.target, e.speaker) for e in examples.values() if e.split == "test"]
    assert tested == [
        ("_silence_", "_silence_/1035"),
        ("_unknown_", "37fc5d97"),
        ("yes", "37fc5d97"),
    ]
    path = str(commands / TRAIN / "_background_noise_" / "pink_noise.wav")
    name, noise = "_background_noise_/pink_noise", "_background_noise_/pink_noise:{}"
    last, first = examples[noise.format(19)], examples[noise.format(0)]
    assert last == Example(noise.format(19), path, 19.0, 20.0, "_silence_", name, "dev")
    assert first.split == "train" and noise.format(20) not in examples
    pieces = [(e.path, e.start, e.split) for e in examples.values() if e.target == "_silence_"]
    assert len({piece[:2] for piece in pieces if piece[1] is not None}) == 32, "none in both"
    assert Counter(split for *_, split in pieces) == {"train": 29, "dev": 3, "test": 1}


def test_speech_commands_names_what_is_missing(commands: Path) -> None:
    def line(**options: object) -> str:
        return fault(speech_commands.read, commands, "word", **options)

    assert "did you mean speech_commands_v0.01?" in line(train="speech_command_v0.01")
    assert "holds 'bed', which is no class" in line(test=TRAIN)
    files = sorted((commands / TRAIN / "yes").iterdir())
    next(file for file in files if speech_commands.subset(file.name) == "train").unlink()
    assert "utterances in train" in line() and "`check: false`" in line()
    assert speech_commands.read(commands, "word", check=False)
    (commands / TRAIN / "_background_noise_" / "pink_noise.wav").unlink()
    speech_commands.SIZES.clear()
    assert "1 noise files, 2 expected" in line()
    (commands / TEST / "yes" / "37fc5d97_nohash_0.wav").unlink()
    second(commands / TRAIN / "_background_noise_" / "pink_noise.wav")
    assert "2 utterances in test, 3 expected" in line()


def test_speech_commands_sizes_are_the_published_ones() -> None:
    words = 64721  # of the archive; 6835 are those that its own rule tests on
    assert sum(speech_commands.SIZES.values()) + 6835 == words


# Fluent Speech Commands -------------------------------------------------------------------------

HEADER = ",path,speakerId,transcription,action,object,location\n"
ROW = '{0},wavs/speakers/{1}/{0}.wav,{1},"Lights, please",{2}\n'


@pytest.fixture
def fluent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    for name, speakers in (("train", "ab"), ("valid", "c"), ("test", "d")):
        rows = [ROW.format(f"{s}1", s, "activate,lights,kitchen") for s in speakers]
        (tmp_path / "data" / f"{name}_data.csv").write_text(HEADER + "".join(rows))
        for speaker in speakers:
            wav(tmp_path / "wavs" / "speakers" / speaker / f"{speaker}1.wav")
    monkeypatch.setattr(fluent_speech_commands, "SIZES", {"train": 2, "dev": 1, "test": 1})
    return tmp_path


def test_fluent_speech_commands(fluent: Path) -> None:
    examples = fluent_speech_commands.read(fluent, "intent")
    assert splits(examples) == {"train": 2, "dev": 1, "test": 1}
    path = str(fluent / "wavs/speakers/b/b1.wav")
    intent = "activate ; lights ; kitchen"
    assert examples[1] == Example("b1", path, None, None, intent, "b", "train")


def test_fluent_speech_commands_names_what_is_missing(fluent: Path) -> None:
    assert sum(fluent_speech_commands.SIZES.values()) == 4
    file = fluent / "data" / "test_data.csv"
    whole = file.read_text()

    def line(text: str) -> str:
        file.write_text(text)
        return fault(fluent_speech_commands.read, fluent, "intent")

    assert f"{file}: no column 'location'" in line(whole.replace(",location", ",locations"))
    assert f"{file}:2: 'location' is empty" in line(whole.replace(",kitchen", ""))
    assert f"{file}: after line 1: not valid CSV" in line(whole.replace('please"', "please"))
    assert "0 utterances in test, 1 expected" in line(HEADER)
    assert "1 of 4 audio files are missing" in line(whole.replace("d1.wav", "d2.wav"))
    file.unlink()
    assert str(file) in fault(fluent_speech_commands.read, fluent, "intent")
    assert "data: no such folder" in fault(fluent_speech_commands.read, fluent / "wavs", "intent")


# Audio SNIPS ------------------------------------------------------------------------------------

LINE = "{} BOS PLAY R & B FROM LED ZEPPELIN EOS\tO O genre genre genre O artist artist PlayMusic\n"
TEXT = "PLAY B-genre R AND B E-genre FROM B-artist LED ZEPPELIN E-artist"


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ["Ivy-snips-train-0", "Joey-snips-train-7", "Amy-snips-valid-0", "Brian-snips-test-0"]
    for name in names:
        wav(tmp_path / name.split("-")[2] / name.partition("-")[0] / f"{name}.wav")
    others = ["Ivy-snips-valid-0", "Amy-snips-train-3"]  # of this split, but not of SUPERB's
    (tmp_path / snips.TEXTS).write_text("".join(map(LINE.format, names + others)))
    monkeypatch.setattr(snips, "SIZES", {"train": 2, "dev": 1, "test": 1})
    return tmp_path


def test_snips(heard: Path) -> None:
    examples = snips.read(heard, "slots")
    assert splits(examples) == {"train": 2, "dev": 1, "test": 1}
    path = str(heard / "valid" / "Amy" / "Amy-snips-valid-0.wav")
    assert examples[2] == Example("Amy-snips-valid-0", path, None, None, TEXT, "Amy", "dev")


def test_snips_names_what_is_missing(heard: Path) -> None:
    (heard / "test" / "Brian" / "Brian-snips-test-0.wav").unlink()
    assert "1 of 4 audio files are missing" in fault(snips.read, heard, "slots")
    assert splits(snips.read(heard, "slots", check=False)) == {"train": 2, "dev": 1}
    text = heard / snips.TEXTS
    text.write_text(text.read_text().replace("ZEPPELIN EOS\tO O", "ZEPPELIN EOS\tO", 1))
    assert f"{text}:1: 9 words and 8 tags" in fault(snips.read, heard, "slots")
    text.write_text("Ivy-snips-train-0 PLAY IT\n")
    assert f"{text}:1: 2 words and 1 tags" in fault(snips.read, heard, "slots")
    text.write_text(LINE.format("Ivy-snips-train-0"))
    assert "1 utterances in train, 2 expected" in fault(snips.read, heard, "slots")
    (heard / "valid").rename(heard / "dev")
    assert "valid: no such folder" in fault(snips.read, heard, "slots")
    text.unlink()


def test_snips_sizes_are_the_published_ones() -> None:
    assert [len(each) for each in snips.SPEAKERS.values()] == [8, 4, 4]
    assert list(snips.SIZES.values()) == [104672, 2800, 2800]


def test_punctuation_is_not_spoken_and_neighbours_of_one_kind_are_one_slot() -> None:
    words = ". PLAY , THE - WALL ? NOW".split()
    tags = "O O O album album album album O".split()
    assert snips.marked(words, tags) == "PLAY B-album THE WALL E-album NOW"
    assert snips.marked(["A", "", "B", "."], ["x", "O", "x", "y"]) == "B-x A E-x B-x B E-x"
