"""The corpora of the suite `open`: small copies, whole and faulty; what pre-training hears."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from downstream import recipe
from downstream.corpora import emodb, fsdd, speechocean762
from downstream.recipe import read_corpus
from downstream.tasks import trials
from tests.corpora import fault, splits, wav
from upstream.common import PROJECT
from upstream.common.schema import read_yaml

SAMPLE = Path(os.environ.get("SPEECH_SAMPLE", PROJECT.parent / "shared" / "speech"))
OPEN = PROJECT / "recipes" / "open"

# speechocean762 -----------------------------------------------------------------------------------


def part(root: Path, name: str, speakers: list[str], each: int = 20) -> None:
    """A folder of Kaldi's files with its audio."""
    folder = root / name
    folder.mkdir(parents=True)
    ids = [f"{speaker}{number:05d}" for speaker in speakers for number in range(each)]
    rows = {
        "wav.scp": [f"{i}\tWAVE/SPEAKER{i[:4]}/{i}.WAV" for i in ids],
        "text": [f"{i}\tA BEAR'S {i}" for i in ids],
        "utt2spk": [f"{i} {i[:4]}" for i in ids],
    }
    for file, lines in rows.items():
        (folder / file).write_text("\n".join(lines) + "\n")
    for name in ids:
        wav(root / "WAVE" / f"SPEAKER{name[:4]}" / f"{name}.WAV")
    (root / "resource").mkdir(exist_ok=True)
    with (root / "resource" / "text-phone").open("a") as file:
        for name in ids:
            file.write(f"{name}.0\tAH0_S\n{name}.1\tB_B EH1_I R_I S_E\n")


@pytest.fixture
def ocean(tmp_path: Path) -> Path:
    part(tmp_path, "train", ["0001", "0002", "0003", "0018"])
    part(tmp_path, "test", ["0004", "0006", "0007", "0019"])
    return tmp_path


def test_both_folders_are_read_and_the_targets_differ(ocean: Path) -> None:
    rows = {
        target: speechocean762.read(ocean, target, split_by="speaker", check=False)
        for target in ("text", "phones", "speaker", "trials")
    }
    text = {e.id: e for e in rows["text"]}
    first = text["000100000"]
    assert first.path == str(ocean / "WAVE" / "SPEAKER0001" / "000100000.WAV")
    assert (first.target, first.speaker) == ("A BEAR'S 000100000", "0001")
    assert len(text) == 160 and {e.target for e in rows["phones"]} == {"AH B EH R S"}
    assert all(e.target == e.speaker for e in rows["speaker"])
    for example in rows["trials"]:
        pairs = trials.read(example.target)
        assert (pairs is None) == (example.split == "train")
        for label, other in pairs or ():
            assert label == (text[other].speaker == example.speaker)
            assert text[other].split == example.split
    assert {e.id: e.split for e in rows["trials"]} == {e.id: e.split for e in rows["text"]}


def test_speakers_are_apart_by_the_rule_that_is_written_down(ocean: Path) -> None:
    for example in speechocean762.read(ocean, "text", split_by="speaker", check=False):
        digest = hashlib.sha256(example.speaker.encode()).hexdigest()
        share = int(digest[:8], 16) / 16**8
        assert example.split == ("test" if share < 0.35 else "dev" if share < 0.5 else "train")


def test_rows_of_each_speaker_are_split_60_15_25(ocean: Path) -> None:
    rows = speechocean762.read(ocean, "speaker", split_by="row", check=False)
    for speaker in {e.speaker for e in rows}:
        of_speaker = [e for e in rows if e.speaker == speaker]
        assert splits(of_speaker) == {"train": 12, "dev": 3, "test": 5}
        order = sorted(of_speaker, key=lambda e: hashlib.sha256(e.id.encode()).hexdigest())
        assert [e.split for e in order] == ["test"] * 5 + ["dev"] * 3 + ["train"] * 12


def test_an_utterance_has_the_same_split_in_a_partial_copy(ocean: Path, tmp_path: Path) -> None:
    part(tmp_path / "less", "train", ["0001", "0019"])
    for split_by in ("speaker", "row", "both"):
        whole = speechocean762.read(ocean, "text", split_by=split_by, check=False)
        less = speechocean762.read(tmp_path / "less", "text", split_by=split_by, check=False)
        split_of = {e.id: e.split for e in whole}
        assert len(less) == (20 if split_by == "both" else 40) and all(
            e.split == split_of[e.id] for e in less
        )


def test_what_may_be_heard_is_train_by_both_rules(ocean: Path) -> None:
    rules = [
        {e.id: e.split for e in speechocean762.read(ocean, "text", split_by=rule, check=False)}
        for rule in ("speaker", "row", "both")
    ]
    for name, split in rules[2].items():
        assert rules[0][name] == "train" and rules[1][name] == split
    heard = {name for name, split in rules[2].items() if split == "train"}
    assert heard == {n for n in rules[0] if rules[0][n] == rules[1][n] == "train"} and heard


def test_a_copy_that_is_not_whole_is_refused_unless_asked_for(
    ocean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = speechocean762.read
    line = fault(read, ocean, "text", split_by="row")
    assert "160 utterances of 8 speakers, 5000 of 250 expected" in line and "check: false" in line
    monkeypatch.setattr(speechocean762, "SPEAKERS", 8)
    monkeypatch.setattr(speechocean762, "UTTERANCES", 160)
    assert len(read(ocean, "text", split_by="row")) == 160
    os.remove(ocean / "WAVE" / "SPEAKER0003" / "000300007.WAV")
    assert "1 of 160 audio files are missing" in fault(read, ocean, "text", split_by="row")
    assert len(read(ocean, "text", split_by="row", check=False)) == 159


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train/text", "000100000 A", "has no line for 000100001"),
        ("train/utt2spk", "", "has no line for 000100000"),
        ("train/wav.scp", "000100000", "wav.scp:1: nothing after the id '000100000'"),
        ("test/text", "1 A\n1 B", "text:2: '1' comes a second time"),
        ("resource/text-phone", "x.0 AH0_S", "has no line for 000100000"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(
    file: str, content: str, message: str, ocean: Path
) -> None:
    (ocean / file).write_text(content)
    line = fault(speechocean762.read, ocean, "phones", split_by="row", check=False)
    assert message in line and file.rpartition("/")[2] in line


def test_missing_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "trian").mkdir()
    for check in (True, False):
        line = fault(speechocean762.read, tmp_path, "text", split_by="row", check=check)
        assert "train: no such folder; did you mean trian?" in line


# EmoDB and FSDD -----------------------------------------------------------------------------------


def emotions(folder: Path) -> None:
    for speaker in emodb.FOLD_OF:
        for letter in emodb.EMOTIONS:
            wav(folder / f"{speaker}a01{letter}a.wav")
    (folder / "readme.txt").write_text("x")


@pytest.mark.parametrize("inside", ["wav", "."])
def test_emodb(inside: str, tmp_path: Path) -> None:
    emotions(tmp_path / inside)
    four = emodb.read(tmp_path, check=False)
    seven = emodb.read(tmp_path, classes=7, check=False)
    assert Counter(e.target for e in four) == dict.fromkeys("angry happy neutral sad".split(), 10)
    assert len({e.target for e in seven}) == 7 and len(seven) == 70
    by_fold = defaultdict(set)
    for example in seven:
        by_fold[example.split].add(example.speaker)
    assert sorted(by_fold) == [f"fold{k}" for k in range(1, 6)]
    assert all(len(speakers) == 2 for speakers in by_fold.values())
    assert {e.id: e.target for e in four}["03a01Wa"] == "angry"
    assert "8 utterances in fold1, 81 expected" in fault(emodb.read, tmp_path)


def test_emodb_sizes_are_those_of_the_whole() -> None:
    assert {n: sum(sizes.values()) for n, sizes in emodb.SIZES.items()} == {4: 339, 7: 535}


def test_an_eleventh_speaker_is_refused(tmp_path: Path) -> None:
    wav(tmp_path / "17a01Wa.wav")
    assert "speaker 17 is none of EmoDB's ten" in fault(emodb.read, tmp_path, check=False)


@pytest.mark.parametrize("inside", ["recordings", "."])
def test_fsdd(inside: str, tmp_path: Path) -> None:
    for speaker in ("theo", "lucas"):
        for take in (0, 10):
            wav(tmp_path / inside / f"7_{speaker}_{take}.wav")
    (tmp_path / inside / "7_theo_x.wav").write_text("no recording")
    examples = fsdd.read(tmp_path, check=False)
    assert splits(examples) == {"theo": 2, "lucas": 2} and {e.target for e in examples} == {"7"}
    assert all(e.split == e.speaker for e in examples)
    assert "0 utterances in george, 500 expected" in fault(fsdd.read, tmp_path)


@pytest.mark.parametrize("read", [emodb.read, fsdd.read])
def test_an_empty_folder_says_so(read: object, tmp_path: Path) -> None:
    assert "no utterances" in fault(read, tmp_path, check=False)
    assert "no such folder" in fault(read, tmp_path / "wav", check=False)


# what pre-training hears --------------------------------------------------------------------------


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_pretraining_hears_nothing_that_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file that dev or test of `open` or `sample` has, nor a copy of one."""
    if not SAMPLE.exists():
        pytest.skip(f"no real speech at {SAMPLE}; set SPEECH_SAMPLE")
    names = {"speechocean762": "speechocean762", "emodb": "emodb4", "fsdd": "fsdd"}
    for name, folder in names.items():
        (tmp_path / name).symlink_to(SAMPLE / folder)
    monkeypatch.setenv("SPEECH_OPEN", str(tmp_path))
    monkeypatch.setenv("SPEECH_SAMPLE", str(SAMPLE))
    unheard = set()
    for suite, options in (("open", {"corpus.check": False}), ("sample", {})):
        for name, path in recipe.suite(suite).items():
            if name == "sf":  # made-up speech
                continue
            found = recipe.examples(recipe.load(path, options), tmp_path / "results")
            unheard |= {digest(e.path) for e in found if e.split != "train"}
    heard = set()
    for corpus in read_yaml(OPEN / "pretrain.yaml")["real"]:
        examples = read_corpus(corpus, "real", tmp_path)
        heard |= {digest(e.path) for e in examples if e.split == "train"}
    assert len(heard) > 700 and len(unheard) > 1500 and not heard & unheard
