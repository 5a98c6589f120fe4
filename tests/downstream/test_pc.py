"""Phone classification: s3prl's head and loss, frames against counting, TIMIT, a run end to end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from downstream import recipe as recipes
from downstream.base import Item
from downstream.corpora import folder, timit
from downstream.run import cell
from downstream.run.prepare import prepare
from downstream.tasks import pc
from downstream.tasks.frame_labels import FrameLabels
from downstream.tasks.segments import read, write
from tests import tiny
from tests.optional import optional
from upstream.common.errors import UserError
from upstream.features.provide import provide
from upstream.features.store import Store

s3prl = optional("s3prl.downstream.phone_linear.model")

TRAIN = [write([("aa", 0.0, 0.5), ("b", 0.5, 0.7)]), write([("iy", 0.0, 0.4)])]
LABELS = pc.labels("train", TRAIN)


def test_head_loss_and_gradients_are_s3prls() -> None:
    torch.manual_seed(0)
    head, model = FrameLabels(1, 6, 3), s3prl.Model(6, 3)
    model.linear.load_state_dict(head.linear.state_dict())
    x, lens = torch.randn(2, 10, 6), torch.tensor([10, 7])
    targets = [[(0, 0, 4), (2, 5, 99)], [(1, 0, 3), (0, 3, 20)]]
    labels = torch.tensor([[0] * 4 + [-100] + [2] * 5, [1] * 3 + [0] * 4 + [-100] * 3])
    ours, reference = head(x[None], lens), model(x)
    assert (ours - reference).abs().max() < 1e-6
    loss = head.loss(ours, lens, targets)
    due = torch.nn.CrossEntropyLoss()(reference.reshape(-1, 3), labels.reshape(-1))
    assert loss.item() == pytest.approx(due.item(), abs=1e-6)
    gradients = torch.autograd.grad(loss, list(head.linear.parameters()))
    expected = torch.autograd.grad(due, list(model.linear.parameters()))
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients, expected))
    assert [row.tolist() for row in head.predict(ours, lens)] == [
        reference[0].argmax(-1).tolist(),
        reference[1, :7].argmax(-1).tolist(),
    ]
    silent = head.loss(head(x[None], lens), lens, [[], []])
    assert silent.item() == 0 and torch.autograd.grad(silent, head.linear.weight)[0].eq(0).all()


def test_a_frame_has_the_label_of_its_middle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ends = np.cumsum(rng.integers(1, 9, 12)) / 100 + 0.003
        names = rng.choice(["aa", "b", "iy"], 12).tolist()
        target = write(zip(names, [0.0, *ends[:-1].tolist()], ends.tolist()))
        rows = pc._rows(LABELS.encode(target), 60)
        for frame, number in enumerate(rows.tolist()):
            middle = (frame + 0.5) * 0.02
            said = [who for who, a, b in read(target) if a <= middle < b]
            assert [LABELS.symbols[number]] == said if number >= 0 else not said


def test_classes_become_segments_and_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 3, int(rng.integers(1, 40))).repeat(2)
        assert (pc._rows(LABELS.encode(LABELS.decode(ids)), len(ids)) == ids).all()
    assert LABELS.decode(np.array([0, 0, 2])) == write([("aa", 0.0, 0.04), ("iy", 0.04, 0.06)])


def test_wrong_frames_are_counted_by_hand() -> None:
    # 9 frames, 3 of b, 2 without a label, 2 of a label that training did not have; the last one
    # has no output, so that it counts as the one before it
    target = write([("b", 0.0, 0.06), ("zz", 0.1, 0.14), ("iy", 0.14, 0.18)])
    item = Item("u", "s", target, 0.18)
    (line,) = pc.TASK.records([item], [np.array([1, 1, 0, 0, 0, 0, 0, 2])], LABELS)
    assert (line.errors, line.total) == (3.0, 7.0)  # type: ignore[union-attr]
    assert pc.TASK.score([line]) == {"frame_accuracy": pytest.approx(100 * 4 / 7)}
    assert LABELS.unknown(target) == ["zz"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ('[["aa", 0.0, 0.2], ["b", 0.1, 0.3]]', "'aa' and 'b' at 0.1 s: a frame has one label"),
        ('[["aa", 0.2, 0.1]]', "not a stretch of time"),
        ("aa b", "does not say who"),
    ],
)
def test_bad_segments_are_one_line(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        LABELS.encode(target) if "one label" not in message else LABELS.unknown(target)
    assert "\n" not in str(caught.value)


# --- TIMIT ----------------------------------------------------------------------------------------


def made(root: Path, speaker: str, lines: str, sentence: str = "SX9", upper: bool = True) -> Path:
    place = root / speaker
    names = [f"{sentence}.WAV", f"{sentence}.PHN"]
    if not upper:
        place, names = root / speaker.lower(), [name.lower() for name in names]
    place.mkdir(parents=True, exist_ok=True)
    soundfile.write(place / names[0], np.zeros(4000), 16_000, format="NIST", subtype="PCM_16")
    (place / names[1]).write_text(lines)
    return place / names[1]


def test_timit_is_read_as_it_unpacks(tmp_path: Path) -> None:
    lines = "0 1600 h#\n1600 2400 ix\n2400 2880 q\n2880 3200 zh\n3200 4000 pau\n"
    made(tmp_path, "TRAIN/DR1/FCJF0", lines)
    made(tmp_path, "TRAIN/DR1/FCJF0", lines, "SA1")
    made(tmp_path, "TEST/DR1/FAKS0", lines)
    made(tmp_path, "TEST/DR1/MDAB0", lines)
    examples = timit.read(tmp_path, check=False)
    assert [(e.id, e.speaker, e.split) for e in examples] == [
        ("fcjf0-sx9", "fcjf0", "train"),
        ("faks0-sx9", "faks0", "dev"),
        ("mdab0-sx9", "mdab0", "test"),
    ]
    folded = [["sil", 0.0, 0.1], ["ih", 0.1, 0.15], ["sh", 0.18, 0.2], ["sil", 0.2, 0.25]]
    assert [list(segment) for segment in read(examples[0].target)] == folded
    whole = timit.read(tmp_path, phones=61, check=False)[0].target
    assert [who for who, _, _ in read(whole)] == ["h#", "ix", "q", "zh", "pau"]
    lower = tmp_path / "lower"
    made(lower / "train", "DR1/FCJF0", lines, upper=False)
    made(lower / "test", "DR1/MDAB0", lines, upper=False)
    assert [e.split for e in timit.read(lower, check=False)] == ["train", "test"]


def test_timits_61_phones_are_39() -> None:
    plain = (
        "aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# "
        "hh hv ih ix iy jh k kcl l m n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh"
    ).split()
    assert len(plain) == 61 and timit.FOLDED.keys() < set(plain)
    assert len({timit.FOLDED.get(phone, phone) for phone in plain if phone != "q"}) == 39
    assert Counter(name[0] for name in timit.CORE) == {"m": 16, "f": 8}


def test_a_broken_timit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TRAIN: no such folder"):
        timit.read(tmp_path)
    phones = made(tmp_path, "TRAIN/DR1/FCJF0", "0 1600 h#\n")
    made(tmp_path, "TEST/DR1/MDAB0", "0 1600 h#\n")
    with pytest.raises(UserError, match="1 utterances in train, 3696 expected"):
        timit.read(tmp_path)
    phones.write_text("0 1600 h#\n0.1 0.2 aa\n")
    with pytest.raises(UserError, match=r"SX9.PHN:2: '0.1 0.2 aa' is not `<first sample>"):
        timit.read(tmp_path, check=False)
    phones.unlink()
    with pytest.raises(UserError, match=r"SX9.WAV: has no SX9.PHN beside it"):
        timit.read(tmp_path, check=False)


def test_a_folder_of_audio_is_split_by_names(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / f"{number % 3}" / f"{number}.{'WAV' if number % 2 else 'flac'}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "0" / "._3.wav").touch()
    before = {e.id: e.split for e in folder.read(tmp_path, dev=0.2)}
    assert len(before) == 40 and 2 < Counter(before.values())["dev"] < 16
    (tmp_path / "0" / "more.wav").touch()
    after = {e.id: e.split for e in folder.read(tmp_path, dev=0.2)}
    assert after.items() > before.items() and len(after) == 41
    with pytest.raises(UserError, match=r"0 audio files, of which `dev: 0\.05` leaves none"):
        (tmp_path / "empty").mkdir()
        folder.read(tmp_path / "empty")


# --- end to end -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> recipes.Recipe:
    """Tones of three pitches one after the other, in an order of their own in each utterance."""
    rng = np.random.default_rng(0)
    pitch: dict[str, float] = {"low": 200, "mid": 600, "high": 1800}
    rows = ["path\tspeaker\tsplit\tphones"]
    for number in range(24):
        order = rng.permutation(list(pitch)).tolist()
        ends = (np.cumsum(rng.integers(8, 16, 3)) / 100).tolist()
        target = list(zip(order, [0.0, *ends], ends))
        wav = np.concatenate(
            [np.sin(2 * np.pi * pitch[who] * np.arange(a, b, 1 / 16_000)) for who, a, b in target]
        )
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * wav, 16_000)
        split = "train" if number < 16 else "dev" if number < 20 else "test"
        rows.append(f"{number}.wav\ts{number}\t{split}\t{write(target)}")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    path = tmp_path / "pc.yaml"
    path.write_text(
        f"kind: task\ntask: pc\ncorpus: {{name: manifest, root: {tmp_path}, target: phones}}\n"
        "train: {steps: 60, batch: 8, lr: [1.0e-1], eval_every: 20}\n"
        "crop: {seconds: 0.3, per_utterance: 2}\n"
    )
    return recipes.load(path)


def test_tones_in_time_are_told_apart(recipe: recipes.Recipe, tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path, "hubert")
    prepared = prepare(recipe, tmp_path / "r")
    features = provide(encoder, prepared.clips, prepared.kind, Store(tmp_path / "r" / "cache"))
    identity = cell.Identity("tiny", encoder.fingerprint(), "tiny")
    score = cell.run(identity, prepared, 0, features, tmp_path / "r")
    assert score.metric == "frame_accuracy" and score.better == "higher"
    assert score.score > 60, "a third would be chance"


def test_metrics_of_other_records_are_refused(recipe: recipes.Recipe) -> None:
    def load(metric: str) -> Any:
        return recipes.load(Path(recipe.path), {"metric": [metric]})

    assert load("frame_accuracy").kind_of_task().metric is pc.FRAME_ACCURACY
    with pytest.raises(UserError, match="metric"):
        load("wer")
