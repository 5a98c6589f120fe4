"""The feature cache: what is read back is what the upstream gave, and a change is never missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests import tiny
from upstream import audio, cache
from upstream.base import Hidden, Upstream
from upstream.cache import Clip
from upstream.encoders import Encoder
from upstream.errors import UserError


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    rng = np.random.default_rng(0)
    found = []
    for i, seconds in enumerate([0.5, 0.2, 0.9, 0.35]):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * 16_000)), 16_000)
        found.append(Clip(str(path), None, None))
    return [*found, Clip(found[2].path, 0.1, 0.4)]


@pytest.fixture
def encoder() -> Encoder:
    return tiny.encoder("hubert")


def alone(encoder: Encoder, clip: Clip) -> Hidden:
    wav = audio.load(*clip)
    with torch.inference_mode():
        return encoder(wav[None], torch.tensor([len(wav)]))


def test_means_and_frames_are_the_upstreams(
    encoder: Encoder, clips: list[Clip], tmp_path: Path
) -> None:
    place = tmp_path / "cache"
    cache.extract(encoder, clips, ["mean", "frames"], place, batch_seconds=1.2)
    means, frames = cache.opened(clips, "mean", place), cache.opened(clips, "frames", place)
    order = [3, 0, 4, 1, 2]
    x, lens = frames.batch(order)
    m, _ = means.batch(order)
    for row, index in enumerate(order):
        truth = alone(encoder, clips[index])
        n = int(truth.lens[0])
        assert lens[row] == n
        assert torch.allclose(m[:, row], truth.mean()[:, 0], atol=1e-4)
        assert torch.allclose(x[:, row, :n], truth.layers[:, 0], atol=5e-3, rtol=2e-3)  # float16
        assert (x[:, row, n:] == 0).all()


def test_recomputed_frames_equal_cached_ones(
    encoder: Encoder, clips: list[Clip], tmp_path: Path
) -> None:
    cache.extract(encoder, clips, ["frames"], tmp_path / "c")
    cached = cache.opened(clips, "frames", tmp_path / "c")
    again = cache.Recomputed(encoder, clips)
    (a, la), (b, lb) = cached.batch([0, 2, 1]), again.batch([0, 2, 1])
    assert torch.equal(la, lb)
    for row, n in enumerate(la):  # heads never look at padded frames
        assert torch.allclose(a[:, row, :n], b[:, row, :n], atol=5e-3, rtol=2e-3)


def test_interrupted_extraction_goes_on(
    encoder: Encoder, clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SECONDS", 0.5)  # several shards
    place, calls = tmp_path / "c", []

    class Stopping(Upstream):
        num_layers, dim, stride = encoder.num_layers, encoder.dim, encoder.stride

        def forward(self, wavs: torch.Tensor, lens: torch.Tensor) -> Hidden:
            calls.append(len(wavs))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return encoder(wavs, lens)

    with pytest.raises(KeyboardInterrupt):
        cache.extract(Stopping(), clips, ["frames"], place)
    assert not cache.complete(clips, "frames", place)
    first = calls[0]
    calls[:] = [0, 0]
    cache.extract(Stopping(), clips, ["frames"], place, batch_seconds=0.4)  # other batches
    assert cache.complete(clips, "frames", place)
    assert sum(calls) == len(clips) - first, "finished shards are not computed again"
    cache.extract(encoder, clips, ["frames"], tmp_path / "whole")
    whole, resumed = (cache.opened(clips, "frames", p) for p in (tmp_path / "whole", place))
    assert torch.allclose(whole.batch(range(5))[0], resumed.batch(range(5))[0], atol=1e-3)


def test_key_changes_with_file_and_window(clips: list[Clip]) -> None:
    before = cache.key(clips)
    assert cache.key(clips[:-1]) != before
    assert cache.key([*clips[:-1], clips[-1]._replace(end=0.41)]) != before
    soundfile.write(clips[0].path, np.zeros(8_000), 16_000)
    assert cache.key(clips) != before


def test_nan_features_are_refused_naming_the_file(clips: list[Clip], tmp_path: Path) -> None:
    class Broken(Upstream):
        num_layers, dim, stride = 1, 2, 320

        def forward(self, wavs: torch.Tensor, lens: torch.Tensor) -> Hidden:
            return Hidden(torch.full((1, len(wavs), 3, 2), float("nan")), torch.full_like(lens, 3))

    with pytest.raises(UserError, match="NaN or infinite hidden states"):
        cache.extract(Broken(), clips, ["mean"], tmp_path / "c")


def test_a_batch_that_does_not_fit_is_halved(
    encoder: Encoder, clips: list[Clip], capsys: pytest.CaptureFixture[str]
) -> None:
    class Small(Upstream):
        num_layers, dim, stride = encoder.num_layers, encoder.dim, encoder.stride

        def forward(self, wavs: torch.Tensor, lens: torch.Tensor) -> Hidden:
            if len(wavs) > 2:
                raise torch.cuda.OutOfMemoryError("made up")
            return encoder(wavs, lens)

    wavs = [audio.load(*clip) for clip in clips]
    whole, split = cache.forward(encoder, wavs), cache.forward(Small(), wavs)
    assert torch.equal(whole.lens, split.lens)
    assert torch.allclose(whole.mean(), split.mean(), atol=1e-4)
    assert "halves" in capsys.readouterr().out
