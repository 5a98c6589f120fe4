"""SF: encoding, slots and their metrics are s3prl's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from downstream.base import Count, Item, Tally
from downstream.corpora.snips import marked
from downstream.tasks import sf
from downstream.tasks.metrics import cer, wer
from downstream.tasks.slots import nearest, slot_edits, slot_f1, values
from tests.corpora import fault
from tests.optional import optional

s3prl = optional("s3prl.downstream.ctc.metric")
s3prl_text = optional("s3prl.downstream.ctc.text")

REFERENCES = (
    "ADD B-track THE HOLY E-track TO B-playlist MY LIST E-playlist",
    "PLAY B-artist ABBA E-artist",
    "WHAT TIME IS IT",
    "BOOK B-city ROME E-city AND B-city OSLO E-city",
)
HYPOTHESES = (
    "ADD B-track THE HOLE E-track TO B-artist MY LIST E-artist",
    "PLAY ABBA",
    "WHAT TIME B-city IS E-city IT",
    "BOOK B-city ROMA E-city AND OSLO",
)
SLOTS = ("playlist", "playlist_owner", "x")
SUPERB = sf.labels("superb", [])


def slot_cer(reference: str, hypothesis: str) -> Tally:
    return nearest(reference, hypothesis, cer)


def records(references: object, hypotheses: object) -> list:
    pairs = zip(references, hypotheses, strict=True)  # type: ignore[call-overload]
    items, heard = zip(*((Item(str(n), "s", r), h) for n, (r, h) in enumerate(pairs)))
    encoded = [[SUPERB.index[t] for t in sf.split(h)] for h in heard]
    return sf.TASK.records(items, encoded, SUPERB)


def test_golden_values() -> None:
    scores = sf.TASK.score(records(REFERENCES, HYPOTHESES))
    assert list(scores) == ["slot_f1", "slot_cer"]
    assert scores["slot_f1"] == pytest.approx(37.5)
    assert scores["slot_cer"] == pytest.approx(62.96296296296297)
    every = replace(sf.TASK, metrics=("slot_wer", "slot_edit_f1"))
    lines = [
        Count("", "", r, h, *tally, metric=metric)
        for r, h in zip(REFERENCES, HYPOTHESES)
        for metric, tally in (
            ("slot_wer", nearest(r, h, wer)), ("slot_edit_f1", slot_edits(r, h))
        )
    ]  # fmt: skip
    assert every.score(lines) == {"slot_wer": pytest.approx(85.71428571428571), "slot_edit_f1": 0}
    for count, rate in ((wer, 0.38461538461538464), (cer, 0.37583892617449666)):
        errors, total = map(sum, zip(*map(count, REFERENCES, HYPOTHESES)))
        assert errors / total == pytest.approx(rate)


def noise(rng: random.Random, length: int) -> str:
    """Slots that open, close, overlap and stay empty, with single and double spaces."""
    tokens = [
        "B-playlist ",
        " E-playlist",
        "B-playlist_owner ",
        " E-playlist_owner",
        "B-x ",
        " E-x",
    ]
    return "".join(rng.choice([*tokens, *"AB' ", " "]) for _ in range(length))


def sentence(rng: random.Random) -> str:
    slots = [rng.choice([*SLOTS, ""]) for _ in range(rng.randint(1, 4))]
    words = ["".join(rng.choice("AB'") for _ in range(rng.randint(1, 4))) for _ in slots]
    return " ".join(f"B-{s} {w} E-{s}" if s else w for s, w in zip(slots, words))


def test_metrics_are_s3prls_whatever_the_head_says() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        reference, spoilt = sentence(rng), noise(rng, rng.randint(0, 12))
        for heard in (spoilt, sentence(rng), reference):
            f1 = s3prl.slot_type_f1([heard], [reference])
            assert slot_f1(reference, heard) == pytest.approx((1 - f1, 1))
            errors, total = slot_cer(reference, heard)
            if total:
                theirs = s3prl.slot_value_cer([heard], [reference])
                assert errors / total == pytest.approx(theirs), (reference, heard)
                words = nearest(reference, heard, wer)
                theirs = s3prl.slot_value_wer([heard], [reference])
                assert words.errors / words.total == pytest.approx(theirs)
            else:
                assert not values(reference)
            errors, total = slot_edits(reference, heard)
            if total:
                theirs = s3prl.slot_edit_f1_full([heard], [reference])
                assert 100 * (1 - errors / total) == pytest.approx(theirs), (reference, heard)


def test_the_right_answer_has_no_errors_and_no_slots_have_no_characters() -> None:
    for reference in REFERENCES:
        assert slot_f1(reference, reference) == (0, 1)
        assert slot_cer(reference, reference).errors == 0
    assert slot_cer("WHAT TIME IS IT", "B-x A E-x") == (0, 0)
    assert slot_f1("WHAT TIME IS IT", "B-x A E-x") == (1, 1)
    assert slot_cer("B-x AB E-x B-x CD E-x", "B-x CD E-x B-x AB E-x B-x Z E-x") == (0, 4)


def test_superb_has_109_classes_and_the_blank_is_first() -> None:
    assert SUPERB.size == 109 and len(set(SUPERB.symbols)) == 109
    assert SUPERB.symbols[:4] == ("<pad>", "<eos>", "<unk>", " ")
    assert SUPERB.symbols[31:33] == ("B-album", "E-album")
    assert len(sf.SLOTS) == 39


def test_encoding_is_s3prls() -> None:
    theirs = s3prl_text.CharacterTextSlotEncoder(list(sf.CHARACTERS), list(SUPERB.symbols[31:]))
    rng = random.Random(1)
    for _ in range(500):
        tags = [rng.choice(["O", "O", "artist", "city"]) for _ in range(rng.randint(1, 8))]
        words = [rng.choice(["PLAY", "ABBA'S", "&", "A", "X"]) for _ in tags]
        for place in range(1, len(tags) - 1):  # within a slot, or between what is none
            if rng.random() < 0.3 and tags[place - 1] == tags[place] == tags[place + 1]:
                words[place] = rng.choice([".", "?!", "-", ""])
        line = f"BOS {' '.join(words)} EOS\tO {' '.join(tags)} PlayMusic"
        target = marked(words, tags)
        assert SUPERB.encode(sf.normalised(target)) == theirs.encode(line), line
        tokens = [t for t in theirs.encode(line) if t > 1]
        assert SUPERB.decode(SUPERB.encode(target)) == theirs.decode(tokens) == target


def test_marked_text_survives_encoding_in_any_case_and_spacing() -> None:
    for text in REFERENCES:
        assert SUPERB.decode(SUPERB.encode(text)) == text
    assert sf.normalised(" play  B-timeRange nöw E-timeRange") == "PLAY B-timeRange NÖW E-timeRange"
    assert SUPERB.unknown("PLAY B-track NÖW E-track") == ["Ö"]


def test_classes_of_another_corpus_come_from_its_training_targets() -> None:
    known = sf.labels("train", ["TURN B-room KÜCHE E-room OFF", "A"])
    assert known.symbols == (*"<pad> <eos> <unk>".split(), *" ACEFHKNORTUÜ", "B-room", "E-room")
    assert "did you mean room?" in fault(known.encode, "A B-rom Ü E-rom")


@pytest.mark.parametrize(
    "target, message",
    [
        ("PLAY B-artist ABBA", "slot 'artist' is not closed"),
        ("PLAY ABBA E-artist", "E-artist is out of place"),
        ("PLAY B-artist ABBA E-album", "E-album is out of place"),
        ("PLAY B-artist E-artist", "E-artist is out of place"),
        ("PLAY B-artist A B-city ROME E-city E-artist", "B-city is out of place"),
        ("SEND AN E-MAIL", "no other word may begin with B- or E-"),
        ("PLAY B-artits ABBA E-artits", "slot 'artits' is none of SNIPS's 39"),
        ("PLAY B-artits ABBA E-artits", "did you mean artist?"),
    ],
)
def test_each_mistake_in_marked_text_is_one_clear_line(target: str, message: str) -> None:
    assert message in fault(SUPERB.unknown, target)
