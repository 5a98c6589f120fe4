"""Blocks of audio that all heads hear in one order: what a batch is, and that scores stay."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from downstream import recipe
from downstream.report.results import load_results
from downstream.run import execute
from downstream.run.prepare import Prepared, prepare
from downstream.run.schedule import Request, RunOptions, Work, survey
from downstream.run.window import Blocks, Dealt
from tests import tiny
from upstream.base import Hidden
from upstream.encoder.encoder import Encoder
from upstream.features.clips import Clip


def clip(number: int, seconds: float) -> Clip:
    return Clip(f"{number}.wav", None, None, seconds, f"{number:016x}")


def audio(count: int, seed: int = 0) -> list[Clip]:
    rng = random.Random(seed)
    return [clip(number, rng.uniform(1, 15)) for number in range(count)]


def test_an_epoch_deals_every_utterance_once_to_blocks_of_one_length() -> None:
    clips = audio(200)
    blocks = Blocks(clips, range(10, 200), 3.0)
    wanted = sum(c.seconds for c in clips[10:]) / blocks.count
    assert wanted <= 180 < wanted * blocks.count / (blocks.count - 1)
    epochs = []
    for epoch in range(5):
        hands = [blocks[epoch * blocks.count + k] for k in range(blocks.count)]
        assert sorted(i for hand in hands for i in hand) == list(range(10, 200))
        for number, hand in enumerate(hands):
            assert len(hand) == blocks.size(number)
            assert abs(sum(clips[i].seconds for i in hand) - wanted) < 15
            assert sum(clips[i].seconds for i in hand) <= blocks.most
            assert [-clips[i].seconds for i in hand] == sorted(-clips[i].seconds for i in hand)
        epochs.append(hands)
    assert len({tuple(map(tuple, hands)) for hands in epochs}) == 5, "each epoch anew"
    neighbours = {j for hands in epochs for hand in hands if 50 in hand for j in hand}
    assert len(neighbours) > 3 * blocks.size(0), "with others each time"
    assert Blocks(clips, range(10, 200), 3.0)[7] == blocks[7]


def test_tasks_with_the_same_audio_have_the_same_blocks() -> None:
    """Whatever else they have, and in whatever order."""
    clips = audio(60)
    others = [clip(900, 3.0), *reversed(clips), clip(901, 4.0)]
    one, two = Blocks(clips, range(60), 2.0), Blocks(others, range(1, 61), 2.0)
    assert one.keys == two.keys
    for number in range(3 * one.count):
        assert one.block(number) == two.block(number)


def test_batches_of_a_head_come_block_by_block_in_its_own_order() -> None:
    blocks = Blocks(audio(200), range(200), 4.0)
    one, two = Dealt(blocks, 8, 1), Dealt(blocks, 8, 2)
    an_epoch = len(one.places)
    for epoch in range(3):
        drawn = [one[epoch * an_epoch + k] for k in range(an_epoch)]
        assert sorted(i for batch in drawn for i in batch) == list(range(200))
    numbers = [one.block(number) for number in range(3 * an_epoch)]
    assert numbers == sorted(numbers) and set(numbers) == set(range(3 * blocks.count))
    orders = set()
    for block in range(3 * blocks.count):
        mine = [one[n] for n in range(3 * an_epoch) if one.block(n) == block]
        theirs = [two[n] for n in range(3 * an_epoch) if two.block(n) == block]
        assert sorted(mine) == sorted(theirs)
        assert sorted(i for batch in mine for i in batch) == sorted(blocks[block])
        assert max(map(len, mine)) - min(map(len, mine)) <= 1 and 6 <= len(mine[0]) <= 10
        orders.add(mine == theirs)
    assert False in orders
    assert Dealt(blocks, 8, 1)[an_epoch + 3] == one[an_epoch + 3], "no history"


@pytest.mark.parametrize("minutes", [0.05, 1.0, 1e9])
def test_windows_of_any_size(minutes: float) -> None:
    """Of one utterance, or of the whole training set, in which each epoch differs too."""
    blocks = Blocks(audio(30), range(30), minutes)
    stream = Dealt(blocks, 4, 0)
    drawn = [stream[k] for k in range(len(stream.places))]
    assert sorted(i for batch in drawn for i in batch) == list(range(30))
    assert blocks.count == {0.05: 30, 1e9: 1}.get(minutes, blocks.count)


def test_an_epoch_hears_one_crop_of_a_long_utterance_whatever_the_seed() -> None:
    clips = [clip(0, 20.0), *audio(9), *(clip(50 + k, 8.0) for k in range(4))]
    windows = {0: [10, 11, 12, 13]}
    blocks = Blocks(clips, range(10), 0.5, windows)
    heard = []
    for epoch in range(8):
        once = [i for k in range(blocks.count) for i in blocks[epoch * blocks.count + k]]
        (crop,) = [i for i in once if i >= 10]
        assert sorted(once) == [*range(1, 10), crop]
        heard.append(crop)
    assert heard == windows[0] * 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("base"), "hubert")


@pytest.fixture
def pair(tmp_path: Path, tones: Path) -> Path:
    """Two tasks on the same words: 36 to train on, in three blocks; two seeds each."""
    folder = tmp_path / "pair"
    folder.mkdir()
    corpus = f"corpus: {{name: manifest, root: {tones}, target: text}}\nkind: task\n"
    (folder / "letters.yaml").write_text(
        f"{corpus}task: asr\nhead: {{projector: 8, hidden: 8, depth: 1}}\n"
        "train: {steps: 15, batch: 6, accumulate: 2, lr: [3.0e-2], eval_every: 10, seeds: 2,"
        " specaug: true, window: 0.1}\n"
    )
    (folder / "words.yaml").write_text(
        f"{corpus}task: pr\n"
        "train: {steps: 27, batch: 4, lr: [1.0e-2, 1.0e-3], eval_every: 10, seeds: 2, window: 0.1}"
    )
    return folder


def prepared(suite: Path, results: Path, names: str, **change: Any) -> list[Prepared]:
    files = recipe.suite(str(suite))
    return [prepare(recipe.load(files[name], change), results) for name in names.split()]


def work(
    base: Path, suite: Path, how: RunOptions, names: str = "letters words", seeds: int | None = None
) -> Work:
    return survey([Request("tiny", str(base))], prepared(suite, how.results, names), seeds, how)


def settings(results: Path, **options: Any) -> RunOptions:
    return RunOptions(results, **{"workers": 1, "device": "cpu", "features": "recompute"} | options)


def predictions(results: Path) -> dict[str, str]:
    """Of every cell, as they stand in its file."""
    return {
        f"{one.cell.task} {one.cell.seed}": (one.folder / "predictions.jsonl").read_text()
        for one in load_results(results)
    }


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many utterances the encoder was given, batch by batch."""
    sizes, forward = list[int](), Encoder.contextual

    def counted(self: Encoder, x: Tensor, kept: Tensor, lens: Tensor) -> Hidden:
        sizes.append(len(x))
        return forward(self, x, kept, lens)

    monkeypatch.setattr(Encoder, "contextual", counted)
    return sizes


DEV, TEST = 12, 24
EVALUATED = 2 * (2 * DEV + TEST) + 2 * (3 * DEV + TEST)


def test_one_pass_an_epoch_feeds_all_and_scores_are_those_of_each_alone(
    base: Path, pair: Path, tmp_path: Path, passed: list[int]
) -> None:
    """30 batches of 6 and 27 of 4 are 15 and 9 blocks of 12."""
    how = settings(tmp_path / "together")
    execute.run(work(base, pair, how), how)
    assert sum(passed) == 15 * 12 + EVALUATED
    shared = predictions(how.results)
    assert set(shared) == {"letters 0", "letters 1", "words 0", "words 1"}
    assert len({line for text in shared.values() for line in text.splitlines()}) > 30

    passed.clear()
    alone = settings(tmp_path / "alone")
    for name in ("letters", "words"):
        for seeds in (1, 2):
            execute.run(work(base, pair, alone, name, seeds), alone)
    assert sum(passed) == 2 * (15 + 9) * 12 + EVALUATED
    assert predictions(alone.results) == shared

    kept = settings(tmp_path / "kept", features="auto")
    execute.run(work(base, pair, kept), kept)
    assert predictions(kept.results) == shared
    assert {entry.kind for entry in kept.store.entries()} == {"float16"}


def test_evaluated_frames_are_kept_where_those_of_training_do_not_fit(
    base: Path, pair: Path, tmp_path: Path, passed: list[int]
) -> None:
    how = settings(tmp_path / "r", features="auto", cache_gb=0.00025)
    execute.run(work(base, pair, how), how)
    assert {(entry.kind, entry.clips) for entry in how.store.entries()} == {("float16", 36)}
    assert sum(passed) == 15 * 12 + 36
