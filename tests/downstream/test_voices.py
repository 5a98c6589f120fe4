"""The corpora of verification and diarization, and a cell of each from audio to score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import recipe
from downstream.base import AND, Example
from downstream.corpora import librimix, manifest, mixtures, pairs, voxceleb1_trials
from downstream.tasks import trials
from downstream.tasks.segments import read
from tests.corpora import fault, splits
from tests.downstream.test_tasks import score
from upstream import audio

# --- trials by rule -------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=2, max_size=6), st.integers(1, 5))
def test_pairs_are_balanced_and_true(sizes: list[int], each: int) -> None:
    examples = [
        Example(f"{who}-{n}", "", None, None, "", f"s{who}", "dev")
        for who, size in enumerate(sizes)
        for n in range(size)
    ]
    done = pairs.paired(examples, each)
    assert {e.id for e in done} == {e.id for e in examples}
    assert pairs.paired(examples[::-1], each) == done
    speaker = {e.id: e.speaker for e in examples}
    against = Counter()
    for example in done:
        asked = trials.read(example.target) or []
        assert len(set(asked)) == len(asked)
        same = [other for label, other in asked if label]
        assert len(same) == min(each, sizes[int(example.speaker[1])] - 1)
        assert example.id not in same and {speaker[o] for o in same} <= {example.speaker}
        others = [other for label, other in asked if not label]
        assert example.speaker not in {speaker[o] for o in others}
        against.update((example.speaker, speaker[o]) for o in others)
    for who in range(len(sizes)):
        counts = [against[f"s{who}", f"s{k}"] for k in range(len(sizes)) if k != who]
        assert len(sizes) < 3 or max(counts) - min(counts) <= sizes[who]


def test_too_few_speakers_make_no_trials() -> None:
    lone = [Example(f"a{n}", "", None, None, "", "a", "dev") for n in range(3)]
    assert "3 utterances of 1 speakers" in fault(pairs.paired, lone, 2)
    assert "two utterances of one" in fault(
        pairs.paired, [lone[0], lone[1]._replace(speaker="b")], 2
    )


# --- VoxCeleb1 ------------------------------------------------------------------------------------


def voxceleb(root: Path, *, merged: bool = False) -> Path:
    """Six speakers of three videos, two of them in trials, files of 3 s (one of 1 s)."""
    for who in range(6):
        part = "wav" if merged else "test/wav" if who < 2 else "dev/wav"
        for video in range(3):
            place = root / part / f"id{who}" / f"v{video}" / "00001.wav"
            place.parent.mkdir(parents=True)
            length = 1 if (who, video) == (5, 0) else 3
            soundfile.write(place, np.zeros(16000 * length, np.float32), 16000)
    lines = [
        "1 id0/v0/00001.wav id0/v1/00001.wav",
        "0 id0/v0/00001.wav id1/v0/00001.wav",
        "1 id1/v0/00001.wav id1/v2/00001.wav",
        "0 id1/v0/00001.wav id0/v2/00001.wav",
    ]
    (root / "voxceleb1_test_v2.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("merged", [False, True])
def test_voxceleb1_holds_speakers_out_for_dev(
    merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voxceleb1_trials, "TRIALS", 4)
    monkeypatch.setattr(voxceleb1_trials, "SPEAKERS", 4)
    monkeypatch.setattr(voxceleb1_trials, "UTTERANCES", 12)
    root = voxceleb(tmp_path, merged=merged)
    examples = voxceleb1_trials.read(root, dev_speakers=2)
    assert all(Path(e.path).is_file() for e in examples)
    by_split = {part: {e.speaker for e in examples if e.split == part} for part in splits(examples)}
    assert by_split["test"] == {"id0", "id1"}
    assert by_split["train"] | by_split["dev"] == {"id2", "id3", "id4", "id5"}
    assert not by_split["train"] & by_split["dev"] and len(by_split["dev"]) == 2
    assert {e.target for e in examples if e.split == "train"} == by_split["train"]
    assert "id5/v0/00001" not in {e.id for e in examples}, "a second is too short to train on"
    (first,) = [e for e in examples if e.id == "id0/v0/00001"]
    assert trials.read(first.target) == [(1, "id0/v1/00001"), (0, "id1/v0/00001")]
    (only,) = [e for e in examples if e.id == "id1/v2/00001"]
    assert trials.read(only.target) == []

    theirs = voxceleb1_trials.read(root, dev_speakers=0)
    assert splits(theirs) == {"train": 11, "dev test": 5}


def test_voxceleb1_that_is_not_whole_is_one_line(tmp_path: Path) -> None:
    root = voxceleb(tmp_path)
    read = voxceleb1_trials.read
    assert "4 trials, 37720 expected; complete the copy" in fault(read, root)
    (root / "test/wav/id1/v2/00001.wav").unlink()
    found = read(root, check=False, dev_speakers=2)
    asked = [t for e in found if e.split == "test" for t in trials.read(e.target) or []]
    assert sorted(asked) == [(0, "id0/v2/00001"), (0, "id1/v0/00001"), (1, "id0/v1/00001")]
    (root / "voxceleb1_test_v2.txt").write_text("1 id0/v0/00001.wav\n")
    assert "voxceleb1_test_v2.txt:1: '1 id0/v0/00001.wav' is not" in fault(read, root)
    (root / "voxceleb1_test_v2.txt").unlink()
    assert "no such file" in fault(read, root)
    assert "holds none of the folders" in fault(read, tmp_path / "dev" / "wav")


# --- Libri2Mix ------------------------------------------------------------------------------------


def kaldi(root: Path, **changes: str) -> Path:
    """Three recordings, one of 100 s; every file's text may be changed."""
    for split in ("train", "dev", "test"):
        folder = root / split
        folder.mkdir(parents=True)
        files = {
            "wav.scp": f"r1 wav/r1.wav\nr2 {root}/{split}/wav/r2.wav\n",
            "segments": "u1 r1 0 3.25\nu2 r1 2 7.5\nu3 r2 0 90.0\nu4 r2 35.5 85\nu5 r2 70 99\n",
            "utt2spk": "u1 61\nu2 70\nu3 70\nu4 61\nu5 61\n",
            "reco2dur": "r1 7.5\nr2 100.02\n",
        }
        for name, text in {**files, **changes}.items():
            (folder / name).write_text(text)
        for name in ("r1", "r2"):
            (folder / "wav").mkdir(exist_ok=True)
            (folder / "wav" / f"{name}.wav").touch()
    return root


def test_libri2mix_in_parts_of_forty_seconds_but_whole_in_test(tmp_path: Path) -> None:
    examples = librimix.read(kaldi(tmp_path), check=False)
    assert splits(examples) == {"train": 4, "dev": 4, "test": 2}
    found = {(e.split, e.id): e for e in examples}
    short, last = found["train", "r1"], found["dev", "r2:80-100.02"]
    assert read(short.target) == [("61", 0, 3.25), ("70", 2, 7.5)]
    assert (short.start, short.end, short.speaker) == (None, None, AND.join(["61", "70"]))
    assert (last.start, last.end) == (80, 100.02)
    assert read(last.target) == [("70", 0, 10), ("61", 0, 5), ("61", 0, 19)]
    assert found["test", "r2"].end is None and Path(found["test", "r2"].path).is_file()


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("wav.scp", "r1 sox r1.wav -t wav - |\n", "wav.scp:1: is a command"),
        ("wav.scp", "r1 a.wav\nr1 b.wav\n", "wav.scp:2: 'r1' is already on line 1"),
        ("wav.scp", "r9 a.wav\n", "wav.scp:1: recording 'r9' is not in reco2dur"),
        ("wav.scp", "r1\n", "wav.scp:1: 'r1' is not a name and what belongs to it"),
        ("segments", "u1 r1 0\n", "segments:1: not `<utterance> <recording> <start> <end>`"),
        ("segments", "u1 r1 zero 1\n", "segments:1: 'zero' is not a time"),
        ("segments", "u9 r1 0 1\n", "segments:1: utterance 'u9' has no speaker in utt2spk"),
        ("segments", "u3 r2 0 1\n", "wav.scp:1: recording 'r1' is not in segments"),
        ("reco2dur", "r1 long\n", "reco2dur:1: 'long' is not a time"),
    ],
)
def test_kaldi_files_with_faults_are_one_line(
    file: str, text: str, line: str, tmp_path: Path
) -> None:
    assert line in fault(librimix.read, kaldi(tmp_path, **{file: text}), check=False)


def test_libri2mix_is_counted(tmp_path: Path) -> None:
    kaldi(tmp_path)
    assert "2 utterances in train, 13900 expected" in fault(librimix.read, tmp_path)
    (tmp_path / "dev" / "reco2dur").unlink()
    assert "reco2dur: no such file" in fault(librimix.read, tmp_path, check=False)


# --- mixtures, and cells from audio to score ------------------------------------------------------


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten speakers, each a band of noise of its own, eight files of half a second or more."""
    folder = tmp_path_factory.mktemp("voices")
    rng, rows = np.random.default_rng(0), ["path\tspeaker"]
    for who in range(10):
        for number in range(8):
            time = np.arange(int(16000 * rng.uniform(0.5, 0.9))) / 16000
            tone = np.sin(2 * np.pi * (150 + 350 * who) * time + rng.uniform(0, 6))
            wave = 0.2 * tone + 0.02 * rng.standard_normal(len(time))
            soundfile.write(folder / f"{who}-{number}.wav", wave, 16000)
            rows.append(f"{who}-{number}.wav\ts{who}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return folder


def mixed(root: Path, voices: Path, **options: Any) -> list[Example]:
    sizes = {"train_mixtures": 6, "test_mixtures": 4, "seconds": 0.6}
    shares = {"dev": 0.2, "test": 0.3}
    return mixtures.read(root, source=str(voices), **{**sizes, **shares, **options})


def test_mixtures_are_the_same_everywhere_and_finished_once(tmp_path: Path, voices: Path) -> None:
    examples = mixed(tmp_path / "a", voices)
    assert splits(examples) == {"train": 6, "dev": 2, "test": 4}
    heard = {part: {e.speaker for e in examples if e.split == part} for part in ("train", "test")}
    who = {part: {name for pair in heard[part] for name in pair.split(AND)} for part in heard}
    assert not who["train"] & who["test"] and len(who["test"]) == 3
    for example in examples:
        wave, (first, second) = audio.load(example.path), read(example.target)
        assert first.start == 0 and second.start < first.end and first.speaker != second.speaker
        assert max(first.end, second.end) == pytest.approx(len(wave) / 16000, abs=1e-4)
        assert {first.speaker, second.speaker} == set(example.speaker.split(AND))
    again = mixed(tmp_path / "b", voices)
    assert [Path(e.path).read_bytes() for e in again] == [
        Path(e.path).read_bytes() for e in examples
    ]
    before = {e.path: Path(e.path).stat().st_mtime_ns for e in examples}
    assert mixed(tmp_path / "a", voices) == examples
    (Path(examples[0].path).parent / "made").unlink()  # killed before the end
    assert mixed(tmp_path / "a", voices) == examples
    assert {e.path for e in mixed(tmp_path / "a", voices, seed=1)}.isdisjoint(before)
    assert "one speaker" in fault(mixed, tmp_path / "a", voices, dev=0.1)


def test_a_recordings_speakers_are_those_of_its_rttm(tmp_path: Path) -> None:
    """Its score rests on both: recordings are no independent sample of speakers."""
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(80000, np.float32), 16000)
    (tmp_path / "manifest.tsv").write_text("path\tsplit\na.wav\ttest\nb.wav\ttest\n")
    lines = [("a", 0, 2, "ann"), ("a", 1, 2, "bo"), ("b", 0, 2, "ann")]
    rows = [f"SPEAKER {r} 1 {s} {n} <NA> <NA> {who} <NA> <NA>\n" for r, s, n, who in lines]
    (tmp_path / "all.rttm").write_text("".join(rows))
    examples = manifest.read(tmp_path, rttm="all.rttm")
    assert [e.speaker for e in examples] == ["ann + bo", "ann"]
    (tmp_path / "manifest.tsv").write_text("path\tsplit\twho\na.wav\ttest\tx\nb.wav\ttest\ty\n")
    examples = manifest.read(tmp_path, rttm="all.rttm", speaker="who")
    assert [e.speaker for e in examples] == ["x", "y"]


@pytest.mark.parametrize(
    ("task", "metric", "cure"),
    [
        ("asv", "wer", "eer"),
        ("sd", "eer", "der"),
        ("qbe", "accuracy", "mtwv"),
        ("asr", "eer", "wer"),
    ],
)
def test_a_metric_of_other_records_is_refused(
    task: str, metric: str, cure: str, tmp_path: Path, tones: Path
) -> None:
    path = tmp_path / f"{task}.yaml"
    train = "" if task == "qbe" else "train: {steps: 1, batch: 1, lr: [1.0e-2], eval_every: 1}\n"
    corpus = f"corpus: {{name: manifest, root: {tones}, target: text}}\n"
    path.write_text(f"kind: task\ntask: {task}\nmetric: [{metric}]\n{corpus}{train}")
    line = fault(recipe.load, path)
    assert f"metric: '{metric}' cannot score task '{task}', which has {cure}" in line


def test_a_cell_of_verification(tmp_path: Path, voices: Path) -> None:
    (tmp_path / "asv.yaml").write_text(
        "kind: task\ntask: asv\n"
        f"corpus: {{name: paired, root: {voices}, dev: 0.2, test: 0.4}}\n"
        "head: {width: 8, pooled: 8}\n"
        "train: {steps: 40, batch: 8, lr: [1.0e-2], eval_every: 20, optimizer: AdamW, clip: 1000}\n"
    )
    result, records = score(tmp_path, tmp_path / "r", "asv")
    assert result.metric == "eer" and result.score < 40 and result.speakers == 4
    assert result.n == len(records) == 4 * 8 * 8
    assert all(-1.001 < r.score < 1.001 for r in records)  # type: ignore[union-attr]


def test_a_cell_of_diarization(tmp_path: Path, voices: Path) -> None:
    (tmp_path / "sd.yaml").write_text(
        "kind: task\ntask: sd\n"
        f"corpus: {{name: mixtures, root: $RESULTS/mixtures, source: {voices}, dev: 0.2, test: 0.3,"
        " train_mixtures: 6, test_mixtures: 4, seconds: 0.6}\n"
        "crop: {seconds: 0.5, per_utterance: 2}\n"
        "head: {hidden: 8}\n"
        "train: {steps: 20, batch: 4, lr: [1.0e-2], eval_every: 10}\n"
    )
    result, records = score(tmp_path, tmp_path / "r", "sd")
    assert result.metric == "der" and 0 < result.score < 110 and result.speakers == 3
    assert len(records) == 4 and all(read(r.hypothesis) is not None for r in records)  # type: ignore
    assert result.chosen[""].keys() == {"threshold", "median", "dev"}
