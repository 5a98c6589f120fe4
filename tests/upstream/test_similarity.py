"""Measures of similarity: against definitions written out, known cases, silence, coverage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from scipy.signal import lfilter
from torch import Tensor

from upstream import similarity
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.features.clips import Clip
from upstream.measures import Estimate, Moments, estimates
from upstream.similarity import FOLDER, Similarity

Array = NDArray[np.float64]
Pair = tuple[Array, Array]


def of_groups(groups: Sequence[Pair]) -> Moments:
    """The moments of one layer from frames [n, D] and [n, E] of each group."""
    rows = []
    for x, y in ((torch.from_numpy(a), torch.from_numpy(b)) for a, b in groups):
        cosine = x.new_tensor(math.nan)
        if x.shape == y.shape:
            cosine = torch.nn.functional.cosine_similarity(x, y, -1).mean()
        n = len(x)
        products = (x.T @ x / n, x.T @ y / n, y.T @ y / n)
        rows.append([x.mean(0), y.mean(0), *products, cosine])
    means = (torch.stack(each)[:, None] for each in zip(*rows))
    return Moments(torch.tensor([float(len(x)) for x, _ in groups]), *means)


def measured(groups: Sequence[Pair]) -> dict[str, Estimate]:
    return estimates(of_groups(groups))[1]


def random_groups(
    count: int, frames: int, d: int, e: int, seed: int = 0, shared: float = 0.0
) -> list[Pair]:
    rng = np.random.default_rng(seed)
    way = rng.standard_normal((d, e))
    groups = []
    for _ in range(count):
        x = rng.standard_normal((frames, d)) + rng.standard_normal(d)
        groups.append((x, shared * x @ way + rng.standard_normal((frames, e))))
    return groups


def song_hsic(k: Array, other: Array) -> float:
    """Unbiased HSIC of two full kernel matrices (Song et al. 2012, equation 4)."""
    k, other, n = k.copy(), other.copy(), len(k)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(other, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    last = 2 / (n - 2) * (one @ k @ other @ one)
    return float((np.trace(k @ other) + middle - last) / (n * (n - 3)))


def test_cka_of_groups_of_one_frame_is_the_published_unbiased_estimate() -> None:
    groups = random_groups(9, 1, 4, 3, shared=0.7)
    x, y = (np.concatenate(each) for each in zip(*groups))
    k, other = x @ x.T, y @ y.T
    due = song_hsic(k, other) / math.sqrt(song_hsic(k, k) * song_hsic(other, other))
    assert measured(groups)["cka"].value == pytest.approx(due, abs=1e-10)


def test_cka_pairs_frames_of_distinct_groups_alone() -> None:
    """Against sums over tuples of groups, of full kernel matrices block by block."""
    groups = random_groups(6, 5, 4, 3, shared=0.5)

    def hsic(left: list[Array], right: list[Array]) -> float:
        g = range(len(left))
        k = {(a, b): left[a] @ left[b].T for a in g for b in g}
        m = {(a, b): right[a] @ right[b].T for a in g for b in g}
        two = [np.mean(k[p] * m[p]) for p in itertools.permutations(g, 2)]
        three = [
            np.mean(k[a, b].mean(1) * m[a, c].mean(1)) for a, b, c in itertools.permutations(g, 3)
        ]
        four = [k[a, b].mean() * m[c, d].mean() for a, b, c, d in itertools.permutations(g, 4)]
        return float(np.mean(two) + np.mean(four) - 2 * np.mean(three))

    x, y = (list(each) for each in zip(*groups))
    due = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert measured(groups)["cka"].value == pytest.approx(due, abs=1e-10)
    moved = [(a + 5, b - 3) for a, b in groups]
    assert measured(moved)["cka"].value == pytest.approx(due, abs=1e-8), "shifts have no say"


def test_pwcca_is_that_of_whitening_by_qr() -> None:
    """With groups that are all alike, held-out frames are the frames: the textbook's PWCCA."""
    x, y = random_groups(1, 400, 5, 7, shared=0.3)[0]
    qx, qy = (np.linalg.qr(each - each.mean(0))[0] for each in (x, y))
    u, s, _ = np.linalg.svd(qx.T @ qy)
    assert np.allclose(np.cos(subspace_angles(qx, qy))[::-1], s)
    weights = np.abs((qx @ u).T @ (x - x.mean(0))).sum(1)[:5]
    due = (weights * s).sum() / weights.sum()
    assert measured([(x, y)] * 10)["pwcca"].value == pytest.approx(due, abs=1e-6)


def test_the_same_and_its_linear_images() -> None:
    groups = random_groups(10, 60, 8, 8)
    x = [each for each, _ in groups]
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    matrix = rng.standard_normal((8, 8))
    images = {
        "same": [(a, a) for a in x],
        "rotated": [(a, 3 * a @ rotation + 2) for a in x],
        "mapped": [(a, a @ matrix + 1) for a in x],
    }
    found = {name: measured(pairs) for name, pairs in images.items()}
    for measure in ("cka", "pwcca", "cosine"):
        assert found["same"][measure].value == pytest.approx(1, abs=1e-6)
    for name in ("rotated", "mapped"):
        assert found[name]["pwcca"].value == pytest.approx(1, abs=1e-6)
        assert found[name]["cosine"].value < 0.9
    assert found["rotated"]["cka"].value == pytest.approx(1, abs=1e-6)
    assert found["mapped"]["cka"].value < 0.9, "CKA heeds how much each direction varies"
    assert found["same"]["cka"].high <= 1


def test_independent_features_are_not_alike_however_few_and_slow() -> None:
    """Frames that follow each other closely, more dimensions than utterances."""
    rng = np.random.default_rng(0)
    values, biased, framewise = [], [], []
    for _ in range(20):
        noise = rng.standard_normal((2, 10, 80, 30))
        slow = lfilter([math.sqrt(1 - 0.95**2)], [1, -0.95], noise, axis=2)[:, :, 20:]
        groups = [(slow[0, g], slow[1, g]) for g in range(10)]
        values.append(measured(groups)["cka"].value)
        x, y = (each.reshape(-1, 30) for each in slow)
        x, y = x - x.mean(0), y - y.mean(0)
        xx, xy, yy = (((a.T @ b) ** 2).sum() for a, b in ((x, x), (x, y), (y, y)))
        biased.append(xy / math.sqrt(xx * yy))
        k, other = x @ x.T, y @ y.T
        framewise.append(song_hsic(k, other) / math.sqrt(song_hsic(k, k) * song_hsic(other, other)))
    assert np.mean(biased) > 0.4
    assert np.mean(framewise) > 0.3, "leaving out a frame's own product alone is not enough"
    assert abs(np.mean(values)) < 0.05
    few = measured(random_groups(10, 40, 20, 20))
    assert abs(few["pwcca"].value) < 0.1


def test_intervals_cover() -> None:
    """Speakers who differ, slow frames: the true values lie in 95 % of the intervals."""
    rng = np.random.default_rng(0)
    d, speakers, frames, own = 6, 20, 40, 0.5
    mix = rng.standard_normal((d, d)) * np.linspace(2, 0.3, d)
    other = mix + 0.5 * rng.standard_normal((d, d))
    variance = 1 + 0.5**2
    xx, xy, yy = (variance * a.T @ b for a, b in ((mix, mix), (mix, other), (other, other)))
    xx, yy = xx + own**2 * np.eye(d), yy + own**2 * np.eye(d)
    cka = (xy**2).sum() / math.sqrt((xx**2).sum() * (yy**2).sum())
    z = math.sqrt(variance) * rng.standard_normal((400_000, d))
    x, y = (z @ a + own * rng.standard_normal(z.shape) for a in (mix, other))
    cosine = float(np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)))
    hits, widths = {"cka": 0, "cosine": 0}, []
    for _ in range(200):
        noise = rng.standard_normal((speakers, frames + 20, d))
        slow = lfilter([math.sqrt(1 - 0.8**2)], [1, -0.8], noise, axis=1)[:, 20:]
        z = slow + 0.5 * rng.standard_normal((speakers, 1, d))
        x, y = (z @ a + own * rng.standard_normal(z.shape) for a in (mix, other))
        found = measured([(x[g::10].reshape(-1, d), y[g::10].reshape(-1, d)) for g in range(10)])
        for name, true in (("cka", cka), ("cosine", cosine)):
            hits[name] += found[name].low <= true <= found[name].high
        widths.append(found["cka"].high - found["cka"].low)
    assert 0.92 <= hits["cka"] / 200 <= 0.99
    assert 0.92 <= hits["cosine"] / 200 <= 0.98
    assert np.mean(widths) < 0.2


class Frames:
    """Features of utterances [L, T_i, D], padded with NaN."""

    error = 0.0

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states
        self.layers, _, self.dim = states[0].shape
        self.lens = torch.tensor([each.shape[1] for each in states])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        lens = self.lens[list(indices)]
        x = torch.full((self.layers, len(lens), int(lens.max()), self.dim), math.nan)
        for row, index in enumerate(indices):
            x[:, row, : lens[row]] = self.states[index]
        return x, lens


def utterances(folder: Path, count: int = 6, stride: int = 320) -> tuple[list[Clip], list[Tensor]]:
    """Clips of noise, the frames 2 to 4 of each silent, and random states [2, T, 3] of them."""
    rng = np.random.default_rng(0)
    clips, states = [], []
    for number in range(count):
        frames = 8 + 3 * number
        wav = 0.1 * rng.standard_normal(frames * stride)
        wav[2 * stride : 5 * stride] *= 1e-3
        path = folder / f"{number}.wav"
        soundfile.write(path, wav, 16_000, "FLOAT")
        clips.append(Clip(str(path), None, None, len(wav) / 16_000, f"{number:016x}"))
        states.append(torch.from_numpy(rng.standard_normal((2, frames, 3))).float())
    return clips, states


LAYERS = [[0, 0], [1, 1]]


def test_padding_silence_order_and_batches_have_no_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, states = utterances(tmp_path)
    others = [each + 0.5 * each.flip(-1) for each in states]
    groups = [0, 1, 2, 3, 4, 4]

    def found(order: list[int], x: list[Tensor], y: list[Tensor]) -> Moments:
        features = (Frames([x[i] for i in order]), Frames([y[i] for i in order]))
        chosen = [clips[i] for i in order]
        return similarity.moments(features, (320, 320), chosen, [groups[i] for i in order], LAYERS)

    base = found([0, 1, 2, 3, 4, 5], states, others)
    assert base.frames.tolist() == [5, 8, 11, 14, 17 + 20]
    for each, due in zip(base, found([5, 3, 1, 0, 2, 4], states, others)):
        torch.testing.assert_close(each, due, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(similarity, "BATCH", 1)
    for each, due in zip(base, found([0, 1, 2, 3, 4, 5], states, others)):
        torch.testing.assert_close(each, due, rtol=1e-5, atol=1e-6)
    for each in states:
        each[:, 2:5] = 1e4
    for each, due in zip(base, found([0, 1, 2, 3, 4, 5], states, others)):
        torch.testing.assert_close(each, due, rtol=1e-5, atol=1e-6)


def test_finer_frames_are_averaged(tmp_path: Path) -> None:
    clips, states = utterances(tmp_path)
    fine = [each.repeat_interleave(2, 1) for each in states]
    for each in fine:  # another frame at the end, which has no partner
        each[:, ::2] += 1
        each[:, 1::2] -= 1
    fine = [torch.cat([each, each[:, :1]], 1) for each in fine]
    groups = [0, 1, 2, 3, 4, 4]
    features = (Frames(states), Frames(fine))
    found = similarity.moments(features, (320, 160), clips, groups, LAYERS)
    torch.testing.assert_close(found.xx, found.yy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cosine, torch.ones(5, 2))
    with pytest.raises(UserError, match="160 and of 400 samples"):
        similarity.require_strides(160, 400)


def test_audio_that_cannot_be_compared(tmp_path: Path) -> None:
    clips, states = utterances(tmp_path)
    groups = [0, 1, 2, 3, 4, 4]
    short = [each[:, :4] for each in states]
    with pytest.raises(UserError, match=r"\.wav: \d+ frames of one upstream, 4 of the other"):
        similarity.moments((Frames(states), Frames(short)), (320, 320), clips, groups, LAYERS)
    soundfile.write(clips[3].path, np.zeros(9000), 16_000)
    with pytest.raises(UserError, match=r"3\.wav: holds nothing but silence"):
        similarity.moments((Frames(states), Frames(states)), (320, 320), clips, groups, LAYERS)
    constant = [torch.ones_like(each) for each in states]
    soundfile.write(clips[3].path, np.ones(320 * 17) * 0.1, 16_000)
    found = similarity.moments(
        (Frames(states), Frames(constant)), (320, 320), clips, groups, LAYERS
    )
    with pytest.raises(UserError, match="hardly varies"):
        estimates(found)


def test_silence_is_relative_and_zeros_are_silent() -> None:
    wav = torch.ones(10 * 320)
    wav[:320] *= 0.016
    wav[320:640] *= 0.02
    wav[640:960] = 0
    for loudness in (1.0, 1e-4):
        heard = similarity.sounding(wav * loudness, 320, 11)
        assert heard.tolist() == [False, True, False] + [True] * 7 + [False]
    assert not similarity.sounding(torch.zeros(3200), 320, 10).any()


def test_units_are_dealt_whole_and_in_any_order() -> None:
    units = [f"s{i % 23}" for i in range(60)]
    groups = similarity.deal(units)
    assert similarity.deal(units[::-1]) == groups[::-1]
    assert sorted(set(groups)) == list(range(10))
    assert len({(unit, group) for unit, group in zip(units, groups)}) == 23
    assert sorted(set(similarity.deal(list("abcdef")))) == list(range(6))
    with pytest.raises(UserError, match="4 utterances are too few"):
        similarity.deal(list("abcd"))


def test_layers_are_paired_by_depth() -> None:
    assert similarity.paired_layers(3, 3) == [[0, 0], [1, 1], [2, 2]]
    assert similarity.paired_layers(3, 5) == [[0, 0], [0, 1], [1, 2], [2, 3], [2, 4]]
    assert similarity.paired_layers(1, 3) == [[0, 0], [0, 1], [0, 2]]
    assert similarity.paired_layers(1, 1) == [[0, 0]]


def test_only_whole_files_are_read(tmp_path: Path) -> None:
    one = Estimate(0.5, 0.4, 0.6)
    kept = Similarity(
        reference="a", other="<b>", fingerprints=["1", "2"], corpus="demo: er", audio="3",
        utterances=9, frames=99, unit="speakers", units=9, layers=[[0, 0], [1, 1]],
        measures={"cka": [one, one]}, mean={"cka": one}, floor={"cka": [one, one]},
        weights={"all": 0.1},
    )  # fmt: skip
    folder = tmp_path / FOLDER
    assert similarity.similarities(tmp_path) == []
    disk.write_checked(folder / "a.json", dataclasses.asdict(kept))
    disk.write_checked(folder / "b.json", ["foreign"])
    disk.write_checked(folder / "c.json", {**dataclasses.asdict(kept), "layers": [[0, 0]]})
    disk.write_checked(folder / "d.json", {**dataclasses.asdict(kept), "later": 1})
    (folder / "e.json").write_text(json.dumps(dataclasses.asdict(kept)))
    (folder / "f.json").write_bytes((folder / "a.json").read_bytes().replace(b"0.5", b"0.6"))
    assert similarity.similarities(tmp_path) == [kept]
