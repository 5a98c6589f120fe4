"""Other scripts than Latin: one spelling, characters as tokens, CER, and scores by language."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import recipe
from downstream.base import Count
from downstream.report.results import read_cell
from downstream.run import cell as cells
from downstream.run.prepare import prepare
from downstream.tasks import asr
from downstream.tasks.metrics import cer, wer
from tests.downstream.test_tasks import Spectra

SENTENCES = {
    "zh": "今天天气很好",
    "th": "สวัสดีครับ",
    "ar": "السَّلامُ عَلَيْكُم",
    "hi": "नमस्ते दुनिया",
    "ja": "カメラを 見る",
    "ko": "안녕하세요 여러분",
    "el": "Καλημέρα σας",
    "de": "Grüße an die Straße",
    "tr": "Iğdır'ın İli ılık",
    "vi": "Tiếng Việt",
}


@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_every_script_survives_its_tokens(text: str) -> None:
    target = asr.normalised(text)
    for task in (asr.TASK, asr.TED):
        labels = task.labels("train", [target])
        assert labels.decode(labels.encode(target)) == target
        assert not labels.unknown(target)
    assert cer(target, target).errors == wer(target, target).errors == 0
    assert wer(target, target).total == len(text.split())
    typed_apart = unicodedata.normalize("NFD", text)
    assert asr.normalised(typed_apart) == target


@given(st.text(max_size=20))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_text_has_one_spelling(text: str) -> None:
    target = asr.normalised(text)
    assert asr.normalised(target) == target
    for form in ("NFC", "NFD"):
        assert asr.normalised(unicodedata.normalize(form, text)) == target
    assert target == " ".join(target.split())


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("straße", "STRASSE"),
        ("STRASSE", "STRASSE"),
        ("ﬁn", "FIN"),
        ("ıi", "II"),
        ("ὀδυσσεύς", "ὈΔΥΣΣΕΎΣ"),
        ("α\u0345\u0301", "ΆΙ"),
        (" 今天\u3000天气\u00a0 好\n", "今天 天气 好"),
        ("e\u0301te\u0301", "ÉTÉ"),
    ],
)
def test_odd_letters(text: str, target: str) -> None:
    assert asr.normalised(text) == unicodedata.normalize("NFC", target)


def test_cer_counts_what_wer_cannot() -> None:
    assert wer("今天天气", "今天天汽") == (1, 1)
    assert cer("今天天气", "今天天汽") == (1, 4)


@pytest.fixture
def bilingual(tmp_path: Path, tones: Path) -> Path:
    """The tones, the words of every second one in Chinese."""
    words = {"low": "低低低低", "mid": "中中中中", "high": "高高高高"}
    header, *rows = (tones / "manifest.tsv").read_text().splitlines()
    lines = [f"{header}\twords\tlanguage"]
    for number, row in enumerate(rows):
        label = row.split("\t")[3]
        said = (f"a {label}\ten", f"{words[label]}\tzh")[number % 2]
        lines.append(f"{row}\t{said}")
    (tones / "bilingual.tsv").write_text("\n".join(lines) + "\n")
    corpus = {
        "name": "manifest", "root": str(tones), "file": "bilingual.tsv", "target": "words",
        "group": "language",
    }  # fmt: skip
    train = {"steps": 10, "batch": 6, "lr": [0.03], "eval_every": 5}
    head = {"projector": 16, "hidden": 16, "depth": 1}
    content = {"kind": "task", "task": "asr", "corpus": corpus, "train": train, "head": head}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**content, "metric": ["cer", "wer"]}))
    return path


def test_two_languages_end_to_end(bilingual: Path, tmp_path: Path) -> None:
    prepared = prepare(recipe.load(bilingual), tmp_path / "r")
    assert not prepared.warnings
    identity = cells.Identity("spectra", "0" * 12, "")
    result = cells.run(identity, prepared, 0, Spectra(prepared), tmp_path / "r")
    folder = cells.cell(identity, prepared, 0).folder(tmp_path / "r")
    records = [r for r in read_cell(folder / "score.json").predictions if isinstance(r, Count)]
    assert {r.metric for r in records} == {"cer", "wer"} and {r.group for r in records} == {
        "en",
        "zh",
    }
    letters = [r for r in records if r.metric == "cer"]
    assert sum(r.total for r in letters) == sum(len(r.reference) for r in letters)
    assert {r.total for r in records if r.metric == "wer" and r.group == "zh"} == {1}
    assert result.metric == "cer"
    rate = 100 * sum(r.errors for r in letters) / sum(r.total for r in letters)
    assert result.score == pytest.approx(rate)


def test_words_without_spaces_are_a_warning(
    bilingual: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (tones / "bilingual.tsv").read_text()
    joined = table
    for label, word in {"low": "低", "mid": "中", "high": "高"}.items():
        joined = joined.replace(f"a {label}", f"{word}甲乙丙丁戊己庚辛壬")
    (tones / "joined.tsv").write_text(joined)
    change = {"corpus.file": "joined.tsv", "metric": ["wer", "cer"]}
    (warning,) = prepare(recipe.load(bilingual, change), tmp_path).warnings
    assert "72 of 72 targets are one word, of 7 characters on average" in warning
    assert "`metric: [cer]`" in warning and warning in capsys.readouterr().err
    assert not prepare(recipe.load(bilingual, {**change, "metric": ["cer"]}), tmp_path).warnings
    short = {"corpus.file": "manifest.tsv", "corpus.target": "text", "corpus.group": "label"}
    assert not prepare(recipe.load(bilingual, {**short, "metric": ["wer"]}), tmp_path).warnings
