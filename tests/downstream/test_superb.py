"""SUPERB whole: its ten recipes, each on a made-up copy of its corpus in the original layout."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import benchmark
from downstream.recipe import RECIPES, load
from downstream.report import superb
from downstream.report.results import load_results
from downstream.tasks import ks
from tests import tiny

PITCHES = (200, 350, 600, 1000, 1800)
RATE = 16_000


def tone(path: Path, pitch: float, seconds: float = 0.5, seed: int = 0) -> np.ndarray:
    """A noisy tone, written where it is said, and its samples."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng([seed, int(pitch)]).standard_normal(len(time))
    wav = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * noise
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, RATE)
    return wav


def librispeech(root: Path) -> None:
    words = ["LOW", "MID", "HIGH"]
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        for speaker in range(3):
            folder = root / part / f"{len(part)}{speaker}" / "1"
            lines = []
            for number in range(3):
                name = f"{len(part)}{speaker}-1-{number:04}"
                tone(folder / f"{name}.flac", PITCHES[number], seed=speaker)
                lines.append(f"{name} {words[number]}\n")
            (folder / f"{folder.parent.name}-1.trans.txt").write_text("".join(lines))
    (root / "librispeech-lexicon-200k-g2p.txt").write_text("LOW L OW1\nMID M IH1 D\nHIGH HH AY1\n")
    (root / "librispeech-lexicon-allothers-g2p.txt").write_text("LOWER L OW1 ER0\n")


def speech_commands(root: Path) -> None:
    train = root / "speech_commands_v0.01"
    for number, word in enumerate(("yes", "no", "bed")):
        for speaker in range(20):
            tone(train / word / f"{speaker:08x}_nohash_0.wav", PITCHES[number], seed=speaker)
    tone(train / "_background_noise_" / "pink.wav", 50, 20.0)
    for number, word in enumerate(("yes", "no", "_unknown_", "_silence_")):
        for speaker in range(3):
            tone(root / "speech_commands_test_set_v0.01" / word / f"{speaker}.wav", PITCHES[number])


def fluent(root: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = [["path", "speakerId", "action", "object", "location"]]
        for speaker in range(3):
            for number, action in enumerate(("up", "down", "off")):
                path = f"wavs/speakers/{split}{speaker}/{split}{speaker}-{number}.wav"
                tone(root / path, PITCHES[number], seed=speaker)
                rows.append(
                    [path, f"{split}{speaker}", action, "lights", ["all", "none"][number % 2]]
                )
        (root / "data").mkdir(exist_ok=True)
        with (root / "data" / f"{split}_data.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def snips(root: Path) -> None:
    lines = []
    for folder, speakers in (
        ("train", ("Ivy", "Joey")),
        ("valid", ("Amy", "Nicole")),
        ("test", ("Emma", "Brian")),
    ):
        for speaker in speakers:
            for number in range(3):
                name = f"{speaker}-snips-{folder}-{number}"
                tone(root / folder / f"{name}.wav", PITCHES[number], 1.0, seed=len(speaker))
                lines.append(f"{name} BOS PLAY {'ABC'[number]} EOS\tO O artist PlayMusic\n")
    (root / "all.iob.snips.txt").write_text("".join(lines))


def voxceleb1(root: Path) -> None:
    split, names = [], []
    for speaker in range(6):
        for video in range(3):
            name = f"id1{speaker:04}/v{video}/00001.wav"
            home = "test" if speaker >= 4 else "dev"
            tone(root / home / "wav" / name, PITCHES[speaker % 5] + 7 * speaker, 2.2, seed=video)
            split.append(f"{video + 1} {name}\n")
            names.append(name)
    (root / "iden_split.txt").write_text("".join(split))
    tested = names[12:]
    trials = [
        f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n"
        for i, a in enumerate(tested) for b in tested[i + 1 :]
    ]  # fmt: skip
    (root / "voxceleb1_test_v2.txt").write_text("".join(trials))


def librimix(root: Path) -> None:
    for part in ("train", "dev", "test"):
        folder = root / part
        tables: dict[str, list[str]] = {
            name: [] for name in ("wav.scp", "segments", "utt2spk", "reco2dur")
        }
        for number in range(3):
            name = f"{part}{number}"
            first, second = (
                tone(folder / f"{name}-{k}.wav", PITCHES[number + k], 1.0, seed=number)
                for k in (0, 2)
            )
            mixed = np.concatenate([first, np.zeros(RATE // 2)])
            mixed[RATE // 2 :] += second
            soundfile.write(folder / f"{name}.wav", mixed / 2, RATE)
            tables["wav.scp"].append(f"{name} {folder / name}.wav")
            tables["segments"] += [f"{name}a {name} 0.0 1.0", f"{name}b {name} 0.5 1.5"]
            tables["utt2spk"] += [f"{name}a {part}s{number}", f"{name}b {part}t{number}"]
            tables["reco2dur"].append(f"{name} 1.5")
        for table, lines in tables.items():
            (folder / table).write_text("".join(f"{line}\n" for line in lines))


def iemocap(root: Path) -> None:
    for session in range(1, 6):
        place, lines = root / f"Session{session}", []
        for number, emotion in enumerate(("neu", "hap", "ang", "sad", "exc", "neu")):
            dialogue = f"Ses0{session}F_impro01"
            name = f"{dialogue}_{'FM'[number % 2]}{number:03}"
            tone(
                place / "sentences" / "wav" / dialogue / f"{name}.wav",
                PITCHES[number % 5],
                seed=session,
            )
            lines.append(f"[0.0 - 1.0]\t{name}\t{emotion}\t[2.5, 2.5, 2.5]\n")
        labels = place / "dialog" / "EmoEvaluation" / f"Ses0{session}F_impro01.txt"
        labels.parent.mkdir(parents=True)
        labels.write_text("".join(lines))


def quesst2014(root: Path) -> None:
    scoring = root / "scoring"
    lists: dict[str, list[str]] = {"utterances": [], "dev": [], "eval": []}
    for number, pitch in enumerate(PITCHES):
        before = tone(root / "x.wav", 100, 0.4, seed=number)
        inside = tone(root / "x.wav", pitch, 0.5, seed=number)
        audio = root / "Audio" / f"quesst14_{number:05}.wav"
        audio.parent.mkdir(exist_ok=True)
        soundfile.write(audio, np.concatenate([before, inside, before]), RATE)
        lists["utterances"].append(f"quesst14Database/Audio/{audio.name} nnenglish\n")
    for part in ("dev", "eval"):
        truth = scoring / f"groundtruth_quesst14_{part}"
        truth.mkdir(parents=True)
        lines = []
        for number in range(3):
            name = f"quesst14_{part}_{number}"
            tone(root / f"{part}_queries" / f"{name}.wav", PITCHES[number], 0.4, seed=9)
            lists[part].append(f"quesst14Database/{part}_queries/{name}.wav nnenglish\n")
            lines.append(f"LEXEME quesst14_{number:05} 1 0 0 {name} lex 0.5 <NA>\n")
        (truth / f"quesst14_{part}.rttm").write_text("".join(lines))
    for part, lines in lists.items():
        (scoring / f"language_key_{part}.lst").write_text("".join(lines))


CORPORA: dict[str, Callable[[Path], None]] = {
    "LIBRISPEECH": librispeech, "SPEECH_COMMANDS": speech_commands, "FLUENT": fluent,
    "SNIPS": snips, "VOXCELEB1": voxceleb1, "LIBRI2MIX": librimix, "IEMOCAP": iemocap,
    "QUESST2014": quesst2014,
}  # fmt: skip
TASKS = "pr asr ks qbe sid asv sd er ic sf".split()
SHORT = {"steps": 6, "batch": 4, "accumulate": 1, "eval_every": 3, "lr": [1e-3], "seeds": 3}
HEADS = {"asr": "projector: 8, hidden: 8", "sf": "projector: 8, hidden: 8", "sd": "hidden: 8"}
EQUAL = {"asv": "speaker", "sd": "speakers"}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SUPERB's recipes, their corpora as found here, a few steps each, small heads."""
    folder = tmp_path / "superb"
    folder.mkdir()
    for variable, make in CORPORA.items():
        root = tmp_path / "corpora" / variable.lower()
        root.mkdir(parents=True)
        make(root)
        monkeypatch.setenv(variable, str(root))
    monkeypatch.setattr(ks, "CLASSES", ("yes", "no", ks.UNKNOWN, ks.SILENCE))
    return folder


def shortened(name: str, folder: Path) -> None:
    import yaml

    recipe = yaml.safe_load((RECIPES / "superb" / f"{name}.yaml").read_text())
    recipe["corpus"]["check"] = False
    if "train" in recipe:
        recipe["train"] |= SHORT
    if name in HEADS:
        recipe["head"] = recipe.get("head", {}) | yaml.safe_load("{" + HEADS[name] + "}")
    if name == "asv":
        recipe["corpus"]["dev_speakers"] = 2
    if "crop" in recipe:
        recipe["crop"] |= {"seconds": 1.5, "per_utterance": 1}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def test_all_ten_tasks_run_and_make_the_score(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in TASKS:
        shortened(name, suite)
        assert load(suite / f"{name}.yaml").task == name
    results = tmp_path / "r"
    bases = [str(tiny.hf_folder(tmp_path, "hubert", seed)) for seed in (0, 1)]
    words = ["--suite", str(suite), "--results", str(results), "--workers", "1"]
    assert benchmark.main(["--upstream", ",".join(bases), *words, "--reference", bases[0]]) == 0
    shown = capsys.readouterr().out
    for heading in "WER PER ACC EER DER MTWV F1 CER".split():
        assert f" {heading} " in shown, heading
    cells = load_results(results)
    assert {cell.cell.task for cell in cells} == set(TASKS)
    assert len(cells) == 2 * (9 * 3 + 1), "nothing is trained in QbE: one cell"
    for cell in cells:
        assert math.isfinite(cell.score.score), cell.cell.task
        heads = list(cell.folder.glob("head*.safetensors"))
        assert len(heads) == {"qbe": 0, "er": 5}.get(cell.cell.task, 1)
    assert "superb_score leaderboard-2022 ↑" in shown and "superb_score speech-ft ↑" in shown

    assert benchmark.main(["compare", *bases, "--results", str(results), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    overall = {row["task"]: row for row in rows if row["metric"] == superb.METRIC}
    assert overall.keys() == {f"{superb.METRIC} {name}" for name in superb.sets()}
    by_task = {(row["task"], row["metric"]): row["score"] for row in rows}
    expected = []
    for task, constants in superb.sets()["leaderboard-2022"].items():
        each = [(by_task[task, c.metric] - c.fbank) / (c.best - c.fbank) for c in constants]
        expected.append(1000 * sum(each) / len(each))
    row = overall[f"{superb.METRIC} leaderboard-2022"]
    assert row["score"] == pytest.approx(sum(expected) / 10)
    assert row["difference"] == pytest.approx(row["score"] - row["reference_score"])
