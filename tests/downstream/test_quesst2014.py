"""The reader of QUESST 2014 on a miniature of its layout, and the strings of digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from downstream.corpora import quesst2014, strings
from downstream.tasks import trials
from tests.corpora import fault, splits, wav

LISTS = {
    "utterances": ("Audio/quesst14_{}.wav", ["nnenglish", "nnenglish", "czech", "nnenglish"]),
    "dev": ("dev_queries/quesst14_dev_{}.wav", ["nnenglish", "czech"]),
    "eval": ("eval_queries/quesst14_eval_{}.wav", ["nnenglish", "nnenglish"]),
}
TRUTH = {
    "dev": [(0, "dev_0"), (2, "dev_0"), (3, "dev_0"), (2, "dev_1")],
    "eval": [(1, "eval_0")],
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "quesst"
    for name, (pattern, languages) in LISTS.items():
        lines = []
        for number, language in enumerate(languages):
            wav(root / pattern.format(number))
            lines.append(f"quesst14Database/{pattern.format(number)} {language}\n")
        (root / "scoring").mkdir(exist_ok=True)
        (root / "scoring" / f"language_key_{name}.lst").write_text("".join(lines))
    for part, pairs in TRUTH.items():
        folder = root / "scoring" / f"groundtruth_quesst14_{part}"
        folder.mkdir()
        rows = ["SPKR-INFO quesst14_0 1 <NA> <NA> <NA> unknown speaker <NA>\n"]
        rows += [f"LEXEME quesst14_{d} 1 0.00 1.2 quesst14_{q} lex s 0.5\n" for d, q in pairs]
        (folder / f"quesst14_{part}.rttm").write_text("".join(rows))
    return root


def test_queries_documents_and_what_is_true(corpus: Path) -> None:
    examples = quesst2014.read(corpus, "trials")
    assert splits(examples) == {"dev test": 3, "dev": 1, "test": 2}
    pairs = {e.id: trials.read(e.target) for e in examples}
    assert pairs["quesst14_0"] == []
    assert pairs["quesst14_dev_0"] == [(1, "quesst14_0"), (1, "quesst14_3")], "English ones"
    assert pairs["quesst14_eval_0"] == [(1, "quesst14_1")]
    assert pairs["quesst14_eval_1"] == [(0, "quesst14_0")], "a query all the same"
    assert all(Path(e.path).is_file() and e.speaker == e.id for e in examples)
    assert len(quesst2014.read(corpus, "trials", language=None)) == 8


def test_what_is_missing_is_named(corpus: Path, tmp_path: Path) -> None:
    scoring = corpus / "scoring"
    assert "no such folder" in fault(quesst2014.read, tmp_path / "other", "trials")
    assert "nothing in 'slovak'" in fault(quesst2014.read, corpus, "trials", language="slovak")
    (corpus / "Audio" / "quesst14_3.wav").unlink()
    assert "1 of 3 audio files are missing" in fault(quesst2014.read, corpus, "trials")
    partial = {e.id: e.target for e in quesst2014.read(corpus, "trials", check=False)}
    assert trials.read(partial["quesst14_dev_0"]) == [(1, "quesst14_0")]
    key = scoring / "language_key_dev.lst"
    key.write_text("quesst14Database/dev_queries/quesst14_dev_0.wav\n")
    assert f"{key}:1: " in fault(quesst2014.read, corpus, "trials", check=False)
    truth = scoring / "groundtruth_quesst14_dev" / "quesst14_dev.rttm"
    truth.write_text("nothing\n")
    assert "no LEXEME line" in fault(quesst2014.read, corpus, "trials", check=False)
    truth.unlink()
    assert "quesst14_dev.rttm: no such file" in fault(
        quesst2014.read, corpus, "trials", check=False
    )


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    folder = tmp_path / "digits"
    folder.mkdir()
    rows = ["file\tdigit\tspeaker"]
    for speaker in "abcd":
        for digit in range(3):
            for take in range(3):
                name = f"{digit}_{speaker}_{take}.wav"
                soundfile.write(folder / name, np.full(800, 0.1 * (digit + 1)), 8000)
                rows.append(f"{name}\t{digit}\t{speaker}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_strings_hold_what_their_trials_say(digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "r"
    options = {"source": str(digits), "documents": 8, "digits": 2, "queries": 1}
    examples = strings.read(root, "trials", **options)
    assert splits(examples) == {"dev test": 8, "dev": 6, "test": 6}
    documents = {e.id: e for e in examples if e.split == "dev test"}
    said: dict[str, set[str]] = {name: set() for name in documents}
    for query in examples:
        for label, name in trials.read(query.target) or []:
            said[name] |= {query.id[0]} if label else set()
    for name, example in documents.items():
        wave, rate = soundfile.read(example.path)
        levels = {str(round(10 * level) - 1) for level in wave[2000::800] if level > 0.05}
        assert rate == 16_000 and len(wave) == 2 * 1600 + 3 * 1600
        assert levels == said[name]
    assert {e.speaker for e in examples if e.split == "dev"} == {"a", "b"}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.wav")}
    next(iter(before)).unlink()
    assert strings.read(root, "trials", **options) == examples
    kept = {p for p in root.rglob("*.wav") if before.get(p) == p.stat().st_mtime_ns}
    assert len(kept) == 7, "only the one that was missing is written again"
    assert strings.read(root, "trials", **{**options, "seed": 1}) != examples
    assert "no such folder" in fault(strings.read, root, "trials", source=str(tmp_path / "no"))
    options["queries"] = 3
    assert "3 recordings of a digit by a speaker, more than 3" in fault(
        strings.read, root, "trials", **options
    )
    (digits / "manifest.tsv").write_text("path\tdigit\nx.wav\t1\n")
    assert "must have the columns" in fault(strings.read, root, "trials", **options)
