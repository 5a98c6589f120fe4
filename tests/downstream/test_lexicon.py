"""Words to phones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from downstream.base import Example
from downstream.corpora import manifest
from downstream.tasks import lexicon
from upstream.common import PROJECT
from upstream.common.errors import UserError

SAMPLE = Path(os.environ.get("SPEECH_SAMPLE", PROJECT.parent / "shared" / "speech"))

CMU = """;;; older releases begin like this
a AH0
a(2) EY1
cat K AE1 T # the animal
cat(2) K AH0 T
the DH AH0
it's IH1 T S
"""
LIBRISPEECH = "CAT\tK AA1 T\nSAT\tS AE1 T\nSAT\tS AA1 T\n"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "cmu.dict").write_text(CMU)
    (tmp_path / "ls.txt").write_text(LIBRISPEECH)
    return [tmp_path / "cmu.dict", tmp_path / "ls.txt"]


def example(id: str, text: str) -> Example:
    return Example(id, f"{id}.flac", None, None, text, "s", "train")


def phones(text: str, files: list[Path]) -> str:
    return lexicon.to_phones([example("u", text)], files)[0].target


def test_the_symbols_of_superb() -> None:
    assert len(lexicon.PHONES) == len(set(lexicon.PHONES)) == 71
    assert len(lexicon.CONSONANTS) == 24 and len(lexicon.VOWELS) == 15


def test_the_first_file_and_the_first_pronunciation_win(files: list[Path]) -> None:
    assert phones("THE CAT SAT", files) == "DH AH0 K AE1 T S AE1 T"
    assert phones("THE CAT SAT", files[::-1]) == "DH AH0 K AA1 T S AE1 T"
    assert phones("A a it's", files) == "AH0 AH0 IH1 T S"


def test_a_word_may_come_again(files: list[Path]) -> None:
    assert phones("A CAT A CAT", files) == "AH0 K AE1 T AH0 K AE1 T"


def test_lexicon_of_one_word(files: list[Path]) -> None:
    assert lexicon.Lexicon(files)("cat") == "K AE1 T"
    assert lexicon.Lexicon(files)("dog") is None
    assert lexicon.Lexicon(files)("a(2)") is None


def test_examples_keep_everything_but_the_target(files: list[Path]) -> None:
    before = [example("u1", "THE CAT"), example("u2", "SAT")]
    after = lexicon.to_phones(before, files)
    assert [e.target for e in after] == ["DH AH0 K AE1 T", "S AE1 T"]
    assert [e._replace(target="") for e in after] == [e._replace(target="") for e in before]


def test_all_missing_words_in_one_line(files: list[Path]) -> None:
    texts = ["THE DOG", "BIRD DOG", "FOX OX", "HEN CAT", "GOOSE EWE"]
    with pytest.raises(UserError) as caught:
        lexicon.to_phones([example(f"u{i}", text) for i, text in enumerate(texts)], files)
    line = str(caught.value)
    assert line.startswith("7 words")
    assert "DOG (u0), BIRD (u1), FOX (u2), OX (u2), HEN (u3);" in line
    assert "GOOSE" not in line and "\n" not in line and str(files[0]) in line


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("cat K AE T\n", ":1: 'cat' has an unknown phone 'AE'; did you mean AE"),
        ("a AH0\n\ncat\n", ":3: 'cat' has no phones"),
        ("caté K\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_broken_lexicon(tmp_path: Path, content: str | bytes, fault: str) -> None:
    path = tmp_path / "broken.dict"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"broken\.dict") as caught:
        lexicon.Lexicon([path])
    assert fault in str(caught.value)


def test_a_missing_lexicon_has_a_near_match(files: list[Path]) -> None:
    with pytest.raises(UserError, match=r"cmv\.dict: no such file; did you mean cmu\.dict\?"):
        lexicon.Lexicon([files[0].with_name("cmv.dict")])


def test_cmudict_on_real_transcripts() -> None:
    """All but the rare words and names of three audiobooks are in CMUdict."""
    if not SAMPLE.exists() and "SPEECH_SAMPLE" not in os.environ:
        pytest.skip(f"no real speech at {SAMPLE}; set SPEECH_SAMPLE")
    examples = manifest.read(SAMPLE / "librispeech_asr", "text", path="file", dev=0.2, test=0.2)
    words = {word for e in examples for word in e.target.split()}
    cmu = lexicon.Lexicon([SAMPLE / "cmudict" / "cmudict.dict"])
    missing = {word for word in words if cmu(word) is None}
    assert len(words) == 521 and len(missing) == 18
    assert {"NORTHANGER", "HOLOFERNES", "UNPROPITIOUS"} < missing
    assert cmu("ADVERTISED") == "AE1 D V ER0 T AY2 Z D"


MFA = """the\tð ə
the\t0.4\t0.2\t1.0\t1.0\tð iː
cat\t0.3\t0.2\t1.0\t1.0\tk a t
cat\t0.7\t0.2\t1.0\t1.0\tkʰ æ t
Über\t1.0\tyː b ɐ
# a comment\tx
name(2)\tx
"""
LEXICONP = "CAT 0.25 k 2 t\nCAT 0.5 k { t\nDOG d 9 g # a comment\n"


def test_any_phones_with_probabilities(tmp_path: Path) -> None:
    """MFA's dictionaries and Kaldi's, in IPA and X-SAMPA, where 2 and 9 are vowels."""
    (tmp_path / "mfa.dict").write_text(MFA)
    (tmp_path / "lexiconp.txt").write_text(LEXICONP)
    one = lexicon.Lexicon([tmp_path / "mfa.dict"], None)
    assert one("the") == "ð ə" and one("CAT") == "kʰ æ t" and one("über") == "yː b ɐ"
    assert one("U\u0308BER") == "yː b ɐ", "typed as two characters"
    assert one("name") is one("#") is None
    two = lexicon.Lexicon([tmp_path / "lexiconp.txt"], None)
    assert two("cat") == "k { t" and two("dog") == "d 9 g"
    with pytest.raises(UserError, match=r"unknown phone .*`tokens: train` takes any phones"):
        lexicon.Lexicon([tmp_path / "mfa.dict"])


@pytest.mark.parametrize("tokens", ["train", "superb"])
def test_a_recipe_with_phones_of_its_own(tmp_path: Path, tones: Path, tokens: str) -> None:
    from downstream import recipe
    from downstream.run.prepare import prepare

    (tmp_path / "ipa.dict").write_text("low\tl əʊ\nmid\t0.9\tm ɪ d\nhigh\th aɪ\n")
    (tmp_path / "pr.yaml").write_text(
        f"kind: task\ntask: pr\ntokens: {tokens}\nlexicon: [ipa.dict]\n"
        f"corpus: {{name: manifest, root: {tones}, target: text}}\n"
        "train: {steps: 1, batch: 1, lr: [0.1], eval_every: 1}\n"
    )
    if tokens == "train":
        found = prepare(recipe.load(tmp_path / "pr.yaml"), tmp_path / "results")
        assert found.labels("").symbols[3:] == ("aɪ", "d", "h", "l", "m", "əʊ", "ɪ")
        assert not found.warnings
    else:
        with pytest.raises(UserError, match=r"ipa\.dict:1: 'low' has an unknown phone"):
            prepare(recipe.load(tmp_path / "pr.yaml"), tmp_path / "results")
