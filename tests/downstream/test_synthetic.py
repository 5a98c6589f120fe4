"""The made-up corpus: deterministic, resumable, speakers kept apart, phones from the engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from downstream.base import CORPORA
from downstream.corpora import speak, synthetic
from downstream.corpora.speak import Line
from downstream.tasks import sf
from upstream.common import PROJECT
from upstream.common.errors import UserError

pytest.importorskip("espeakng_loader")

SMALL = {"part": "digits", "scale": 0.02}  # 2 speakers per split: 48 utterances


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    synthetic.read(root, "text", **SMALL)
    return root


def bytes_of(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_registry_knows_it() -> None:
    assert CORPORA["synthetic"] is synthetic.read


def test_the_grammar_has_107_words() -> None:
    words = [word for kind in synthetic.WORDS.values() for word in kind.split()]
    assert len(words) == len(set(words)) == 107
    assert {kind for pattern in synthetic.PATTERNS for kind in pattern.split()} == set(
        synthetic.WORDS
    )


@pytest.mark.parametrize(
    ("part", "utterances", "speakers"),
    [
        ("sentences", (1300, 200, 780), (65, 20, 52)),
        ("speakers", (1200, 180, 600), (60, 60, 60)),
        ("digits", (540, 90, 240), (45, 15, 40)),
        ("commands", (540, 90, 240), (45, 15, 40)),
        ("pretrain", (7200, 0, 0), (480, 0, 0)),
    ],
)
def test_counts_and_speakers(
    part: str, utterances: tuple[int, ...], speakers: tuple[int, ...]
) -> None:
    planned = synthetic.plan(part)
    counts = Counter(item.split for item in planned)
    assert tuple(counts[split] for split in ("train", "dev", "test")) == utterances
    who = {s: {i.speaker for i in planned if i.split == s} for s in ("train", "dev", "test")}
    assert tuple(len(who[split]) for split in ("train", "dev", "test")) == speakers
    if part == "speakers":
        assert who["train"] == who["dev"] == who["test"]
    else:
        assert not (who["train"] & who["test"] or who["train"] & who["dev"])
        assert not who["dev"] & who["test"]
    assert len({item.id for item in planned}) == len(planned)


def test_no_voice_serves_two_parts() -> None:
    parts = synthetic.PARTS.keys() - {"commands"}  # which has the voices of digits
    voices = [{item.line.voice for item in synthetic.plan(part)} for part in parts]
    assert sum(map(len, voices)) == len(set.union(*voices))


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_no_voice_serves_two_splits_of_disjoint_speakers(scale: float) -> None:
    for part in ("sentences", "digits", "commands"):
        planned = synthetic.plan(part, scale=scale)
        voices = [{i.line.voice for i in planned if i.split == s} for s in ("train", "dev", "test")]
        assert sum(map(len, voices)) == len(set.union(*voices)), part


def test_commands_have_the_slots_that_their_words_tell() -> None:
    texts = [item.line.text for item in synthetic.plan("commands")]
    known = sf.labels("train", [synthetic.slots(text) for text in texts])
    assert {t[2:] for t in known.symbols if t[:2] == "B-"} == set(synthetic.SLOTS)
    told = synthetic.slots("wake anna at one two")
    assert told == "WAKE B-name ANNA E-name AT B-number ONE TWO E-number"
    words = [word for slot in synthetic.SLOTS.values() for word in slot.split()]
    outside = {*synthetic.COMMANDS.replace(",", "").split()} - set(synthetic.SLOTS)
    assert len(words) == len(set(words)) and not outside & set(words)
    assert {word for text in texts for word in text.split()} == outside | set(words)


def test_the_plan_depends_on_the_seed_alone() -> None:
    assert synthetic.plan("digits", 3, 0.1) == synthetic.plan("digits", 3, 0.1)
    assert synthetic.plan("digits", 3, 0.1) != synthetic.plan("digits", 4, 0.1)


def test_prosody_is_balanced_and_follows_its_rules() -> None:
    planned = synthetic.plan("sentences")
    counts = Counter(item.prosody for item in planned)
    assert set(counts) == set(synthetic.PROSODY)
    assert min(counts.values()) > 0.2 * len(planned)

    def median(style: str, field: str) -> float:
        return float(np.median([getattr(i.line, field) for i in planned if i.prosody == style]))

    assert median("flat", "range") < 0.5 * median("lively", "range")
    assert median("slow-low", "rate") < 0.8 * median("fast-loud", "rate")
    assert median("slow-low", "pitch") < 0.8 * median("lively", "pitch")


def test_examples(root: Path) -> None:
    examples = synthetic.read(root, "text", **SMALL)
    assert [e.id for e in examples] == [i.id for i in synthetic.plan("digits", scale=0.02)]
    vocabulary = set(synthetic.DIGITS.upper().split())
    assert {word for e in examples for word in e.target.split()} <= vocabulary
    for example in examples:
        wav, rate = soundfile.read(example.path, dtype="float32")
        assert rate == 16_000 and wav.ndim == 1 and 0.25 < len(wav) / rate < 4
        assert 0.005 < np.sqrt((wav**2).mean()) < 0.3
        assert soundfile.info(example.path).subtype == "PCM_16"
        assert example.speaker and 2 <= len(example.target.split()) <= 4


def test_the_same_seed_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    synthetic.read(tmp_path, "text", **SMALL)
    assert bytes_of(tmp_path) == bytes_of(root)
    synthetic.read(tmp_path / "other", "text", seed=1, **SMALL)
    flac = [f for n, f in bytes_of(tmp_path / "other").items() if n.endswith("flac")]
    assert not set(flac) & set(bytes_of(root).values())


def test_a_missing_shard_is_spoken_again_and_the_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "SHARD", 20)
    synthetic.read(tmp_path, "text", **SMALL)
    whole = bytes_of(tmp_path)
    first, second, third = sorted(tmp_path.rglob("*.jsonl"))
    times = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    second.unlink()
    next(tmp_path.rglob("digits-002-dev-000.flac")).write_bytes(b"half a f")
    synthetic.read(tmp_path, "text", **SMALL)
    assert bytes_of(tmp_path) == whole
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == times


def test_killed_in_the_middle_the_same_call_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from downstream.corpora import synthetic; synthetic.SHARD = 10; "
        "synthetic.read(pathlib.Path(sys.argv[1]), 'text', part='digits', scale=0.02)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True)
    while not list(tmp_path.rglob("*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.rglob("*.jsonl")))
    assert 1 <= done < 5
    subprocess.run(command, cwd=PROJECT, check=True)
    subprocess.run([*command[:-1], str(tmp_path / "whole")], cwd=PROJECT, check=True)

    def finished(folder: Path) -> dict[str, bytes]:  # a killed worker may leave a half-written file
        files = bytes_of(folder).items()
        return {name: data for name, data in files if name.endswith((".flac", ".jsonl"))}

    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")


def test_phones_are_the_engines_own_and_accent_correct() -> None:
    _, american = speak.say("the garden river", "en-us+f3")
    _, british = speak.say("the garden river", "en-gb-x-rp+f3")
    assert " ".join(american) == "ð ə ɡ ɑːɹ d ə n ɹ ɪ v ɚ"
    assert " ".join(british) != " ".join(american)
    assert "ɚ" not in british


def test_pitch_rate_and_vocal_tract_do_what_they_say() -> None:
    slow, _ = speak.say("the garden river", "en+m3", rate=120)
    fast, _ = speak.say("the garden river", "en+m3", rate=200)
    assert len(slow) > 1.3 * len(fast)
    with pytest.raises(UserError, match="no voice 'en-gb-x-nowhere'"):
        speak.say("hello", "en-gb-x-nowhere")

    def centroid(tract: float) -> float:
        line = Line("", "the garden river", "en+m3", 50, 50, 160, tract, 0, 0, [1])
        wav, _ = speak.record(line)
        power = np.abs(np.fft.rfft(wav)) ** 2
        return float((power * np.arange(len(power))).sum() / power.sum() / len(power))

    assert centroid(1.14) > 1.05 * centroid(0.88)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("text", "digit"), "no part 'digit'; did you mean digits?"),
        (("phone", "sentences"), "part 'sentences' has no target 'phone'; did you mean phones?"),
        (("speaker", "digits"), "part 'digits' has no target 'speaker'; there is: text"),
    ],
)
def test_a_wrong_name_is_one_line(options: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        synthetic.read(tmp_path, options[0], part=options[1])


def test_a_missing_engine_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    speak.engine.cache_clear()
    with pytest.raises(
        UserError,
        match=r"needs espeakng-loader, which is not installed: pip install -e '\.\[demo\]'",
    ):
        synthetic.read(tmp_path, "text", **SMALL)
    assert not list(tmp_path.iterdir())
