"""The feature cache: what is read back is what the upstream gave, and a change is never missed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from tests import tiny
from upstream import audio
from upstream.base import Hidden, Upstream
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder
from upstream.features import extract as cache
from upstream.features.clips import Clip, clips
from upstream.features.extract import Features
from upstream.features.store import Store

SECONDS = [0.5, 0.2, 0.9, 0.35]


@pytest.fixture
def some(tmp_path: Path) -> list[Clip]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.wav" for i in range(len(SECONDS))]
    for path, seconds in zip(paths, SECONDS):
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * 16_000)), 16_000)
    found = known(tmp_path, *paths)
    return [*found, found[2].part(0.1, 0.4)]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return tiny.encoder(tmp_path, "hubert")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def known(folder: Path, *paths: Path) -> list[Clip]:
    return clips([(str(path), None, None) for path in paths], folder / "files.json")


def perturbed(folder: Path) -> Encoder:
    """Another upstream with the same CNN."""
    encoder = tiny.encoder(folder, "hubert")
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if not name.startswith("feature_extractor."):
                parameter.mul_(1.1)
    return encoder


def alone(encoder: Upstream, clip: Clip) -> Hidden:
    wav = clip.load()
    with torch.inference_mode():
        return encoder(wav[None], torch.tensor([len(wav)]))


def read(store: Store, upstream: Upstream, kind: cache.Kind, some: list[Clip]) -> Features:
    return store.open(upstream.fingerprint(), kind, some)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


class Plain(Upstream):
    """A user's own class around an encoder: it has no CNN to share."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.num_layers, self.dim, self.stride = encoder.num_layers, encoder.dim, encoder.stride
        self.encoder = [encoder]
        self.sizes: list[int] = []

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        self.sizes.append(len(wavs))
        return self.encoder[0](wavs, lens)


def test_every_kind_is_the_upstreams(encoder: Encoder, some: list[Clip], store: Store) -> None:
    cache.extract(encoder, some, ["mean", "float16", "int8"], store, batch_seconds=1.2)
    means, halves, bytes_ = (read(store, encoder, k, some) for k in ("mean", "float16", "int8"))
    order = [3, 0, 4, 1, 2]
    (m, _), (x, lens), (q, _) = (f.batch(order) for f in (means, halves, bytes_))
    for features in (means, halves, bytes_):
        assert (features.layers, features.dim) == (encoder.num_layers, encoder.dim)
    for row, index in enumerate(order):
        truth = alone(encoder, some[index])
        n = int(truth.lens[0])
        assert lens[row] == n == means.lens[index]
        assert relative(m[:, row], truth.mean()[:, 0]) < 1e-5
        assert relative(x[:, row, :n], truth.layers[:, 0]) < 3e-4
        assert relative(q[:, row, :n], truth.layers[:, 0]) < 1e-2
        for one in (x, q):
            assert one.dtype == torch.float32 and not one[:, row, n:].any()


def test_int8_reports_its_measured_error(encoder: Encoder, some: list[Clip], store: Store) -> None:
    cache.extract(encoder, some, ["int8"], store)
    x, lens = read(store, encoder, "int8", some).batch(range(len(some)))
    errors = []
    for row, n in enumerate(lens.tolist()):
        truth = alone(encoder, some[row]).layers[:, 0]
        noise, power = (t.square().mean(-1) for t in (x[:, row, :n] - truth, truth))
        errors.append(float((noise / power).mean()))
    measured = (sum(errors) / len(errors)) ** 0.5
    assert store.error(encoder.fingerprint(), some) == pytest.approx(measured, rel=1e-3)
    assert 1e-4 < measured < 1e-2


def test_a_silent_frame_survives_int8() -> None:
    x = torch.zeros(2, 3, 4)
    x[0, 0] = torch.tensor([0.0, 1.0, -127.0, 63.4])
    arrays, _ = cache.encode("int8", x)
    assert arrays[""][0, 0].tolist() == [0, 1, -127, 63] and not arrays[""][1].any()


def test_batches_share_one_allocation(encoder: Encoder, some: list[Clip], store: Store) -> None:
    cache.extract(encoder, some, ["mean", "float16"], store)
    for kind in ("mean", "float16"):
        features = read(store, encoder, kind, some)
        x, _ = features.batch([0, 2])
        assert x.untyped_storage().nbytes() == 4 * x.numel()


def test_changed_audio_misses_and_a_copy_hits(
    encoder: Encoder, some: list[Clip], store: Store, tmp_path: Path
) -> None:
    cache.extract(encoder, some, ["mean"], store)
    path, copied = Path(some[0].path), tmp_path / "elsewhere.wav"
    shutil.copy(path, copied)
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed, copy = known(tmp_path, path, copied)
    assert store.missing(encoder.fingerprint(), "mean", [changed, copy]) == [changed]
    with pytest.raises(UserError, match="changed during this run"):
        cache.extract(encoder, some, ["float16"], store)


def test_other_weights_padding_and_normalisation_miss(
    encoder: Encoder, some: list[Clip], store: Store, tmp_path: Path
) -> None:
    cache.extract(encoder, some, ["mean", "cnn"], store)
    shared = encoder.cnn_fingerprint()
    assert shared and store.missing(shared, "cnn", some) == []
    folder = tiny.hf_folder(tmp_path, "hubert")
    same = cache_misses(store, tiny.load(folder), some)
    assert same == (False, False)
    assert cache_misses(store, perturbed(tmp_path), some) == (True, False)
    assert cache_misses(store, tiny.load(folder, normalize=True), some) == (True, True)
    assert tiny.load(folder, padding="s3prl").cnn_fingerprint() is None
    assert store.missing(tiny.load(folder, padding="s3prl").fingerprint(), "mean", some) == some
    with torch.no_grad():
        next(encoder.cnn().parameters()).view(-1)[0] += 1e-6
    assert cache_misses(store, encoder, some) == (True, True)


def cache_misses(store: Store, encoder: Encoder, some: list[Clip]) -> tuple[bool, bool]:
    """Of its means, of its CNN's outputs."""
    cnn = encoder.cnn_fingerprint()
    assert cnn
    means = store.missing(encoder.fingerprint(), "mean", some)
    return bool(means), bool(store.missing(cnn, "cnn", some))


@pytest.mark.parametrize("variant", ["hubert", "wavlm", "wav2vec2-large", "data2vec"])
def test_through_cached_cnn_outputs_is_the_direct_pass(
    variant: str, some: list[Clip], store: Store, tmp_path: Path
) -> None:
    encoder = tiny.encoder(tmp_path, variant)
    cache.extract(encoder, some, ["mean", "int8"], store, share_cnn=True, batch_seconds=1.2)
    direct = Store(tmp_path / "direct")
    cache.extract(encoder, some, ["mean", "int8"], direct, batch_seconds=1.2)
    for kind in ("mean", "int8"):
        found, truth = (read(s, encoder, kind, some).batch(range(5))[0] for s in (store, direct))
        assert torch.equal(found, truth)
    outputs = store.open(encoder.cnn_fingerprint() or "", "cnn", some)
    x, lens = outputs.batch(range(5))
    assert (outputs.layers, outputs.dim) == (1, 16)
    for row, clip in enumerate(some):
        wav = clip.load()
        with torch.inference_mode():
            truth, _, valid = encoder.convolve(wav[None], torch.tensor([len(wav)]))
        assert lens[row] == valid[0]
        assert torch.allclose(x[0, row, : lens[row]], truth[0], atol=1e-5)


def test_a_second_upstream_never_calls_the_shared_cnn(
    encoder: Encoder, some: list[Clip], store: Store, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache.extract(encoder, some, ["float16"], store, share_cnn=True)
    other = perturbed(tmp_path)
    truth = [alone(other, clip).layers[:, 0] for clip in some]

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the CNN is called")

    monkeypatch.setattr(other, "convolve", refuse)
    cache.extract(other, some, ["mean", "float16"], store, share_cnn=True, batch_seconds=0.8)
    x, lens = read(store, other, "float16", some).batch(range(5))
    again, _ = cache.Recomputed(other, some, store).batch([4, 2])
    for row, expected in enumerate(truth):
        assert relative(x[:, row, : lens[row]], expected) < 3e-4
    assert torch.allclose(again[:, 0, : lens[4]], truth[4], atol=1e-5)
    assert torch.allclose(again[:, 1, : lens[2]], truth[2], atol=1e-5)
    with pytest.raises(AssertionError, match="the CNN is called"):
        cache.extract(other, some, ["int8"], store)


def test_outputs_alone_need_no_pass(
    encoder: Encoder, some: list[Clip], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "contextual", None)
    cache.extract(encoder, some, ["cnn"], store)
    assert [entry.kind for entry in store.entries()] == ["cnn"]


def test_recomputed_equals_cached(encoder: Encoder, some: list[Clip], store: Store) -> None:
    cache.extract(encoder, some, ["float16"], store)
    cache.extract(encoder, some[:2], ["cnn"], store)
    cached = read(store, encoder, "float16", some)
    # without a store, and with outputs of all or of some of the batch
    for again in (cache.Recomputed(encoder, some), cache.Recomputed(encoder, some, store)):
        for indices in ([0, 1], [0, 2, 1]):
            (a, la), (b, lb) = cached.batch(indices), again.batch(indices)
            assert torch.equal(la, lb)
            for row, n in enumerate(la):  # heads never look at padded frames
                assert relative(a[:, row, :n], b[:, row, :n]) < 3e-4
        assert (again.layers, again.dim) == (cached.layers, cached.dim)
        assert (again.lens - cached.lens).abs().max() <= 1  # an estimate, to sort by


def test_a_users_own_class_works_everywhere(
    encoder: Encoder, some: list[Clip], store: Store
) -> None:
    plain = Plain(encoder)
    cache.extract(plain, some, ["mean", "float16", "int8"], store, share_cnn=True)
    x, lens = cache.Recomputed(plain, some, store).batch([2, 1])
    y, _ = read(store, plain, "float16", some).batch([2, 1])
    for row, n in enumerate(lens):
        assert relative(y[:, row, :n], x[:, row, :n]) < 3e-4
    assert {entry.kind for entry in store.entries()} == {"mean", "float16", "int8"}


class Interrupting(list[int]):
    """Ctrl-C in the third batch."""

    def append(self, size: int) -> None:
        super().append(size)
        if len(self) == 3:
            raise KeyboardInterrupt


def test_interrupted_extraction_goes_on(
    encoder: Encoder, some: list[Clip], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_SECONDS", 0.9)  # several shards
    plain = Plain(encoder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plain, "sizes", Interrupting())
        cache.extract(plain, some, ["float16"], store, batch_seconds=0.6)
    left = store.missing(plain.fingerprint(), "float16", some)
    assert 0 < len(left) < len(some), "finished shards stay"
    plain.sizes.clear()
    cache.extract(plain, some, ["float16"], store, batch_seconds=0.4)  # other batches
    assert sum(plain.sizes) == len(left)
    x, lens = read(store, plain, "float16", some).batch(range(5))
    for row, clip in enumerate(some):
        assert relative(x[:, row, : lens[row]], alone(encoder, clip).layers[:, 0]) < 3e-4


def test_only_what_a_kind_misses_is_written(
    encoder: Encoder, some: list[Clip], store: Store
) -> None:
    cache.extract(encoder, some[:2], ["mean"], store)
    cache.extract(encoder, some, ["mean", "float16"], store)
    assert {(e.kind, e.clips) for e in store.entries()} == {("mean", 5), ("float16", 5)}
    rows = [len(np.load(p)) for p in store.folder(encoder.fingerprint(), "mean").glob("*.npy")]
    assert sorted(rows) == [2, 3]


def test_shards_are_bounded_and_do_not_depend_on_order() -> None:
    lengths = [1.0, 250.0, 700.0, 300.0, 599.0, 49.0, 51.0]
    made = [Clip("", None, None, s, f"{i:016d}") for i, s in enumerate(lengths)]
    parts = cache.shards(made)
    assert parts == cache.shards(made[::-1])
    assert [[clip.seconds for clip in part] for part in parts] == [
        [700.0], [599.0], [300.0, 250.0], [51.0, 49.0, 1.0],
    ]  # fmt: skip


def test_estimated_bytes_are_those_on_disk(encoder: Encoder, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(64_000), 16_000)
    cache.extract(encoder, known(tmp_path, path), ["mean", "float16", "int8", "cnn"], store)
    for entry in store.entries():
        folder = store.folder(entry.fingerprint, entry.kind)
        size = sum(np.load(array).nbytes for array in folder.glob("*.npy"))
        assert cache.bytes_of(encoder, entry.kind, 4.0) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinite"), (1e5, "too large for float16")]
)
def test_unusable_features_are_refused_naming_the_file(
    some: list[Clip], store: Store, value: float, message: str
) -> None:
    class Broken(Upstream):
        num_layers, dim, stride = 1, 2, 320

        def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
            layers = torch.zeros(1, len(wavs), 3, 2)
            layers[0, lens == 3_200, 1] = value  # the second file alone
            return Hidden(layers, torch.full_like(lens, 3))

    with pytest.raises(UserError, match=rf"1\.wav: .*{message}"):
        cache.extract(Broken(), some, ["float16"], store)
    assert store.missing(Broken().fingerprint(), "float16", some) == some


@pytest.mark.parametrize("share_cnn", [False, True])
def test_a_batch_that_does_not_fit_is_halved(
    encoder: Encoder, some: list[Clip], store: Store, share_cnn: bool,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wavs = [clip.load() for clip in some]
    whole = cache.forward(encoder, wavs)
    for part in ("forward", "convolve", "contextual"):
        real = getattr(encoder, part)

        def small(x: Tensor, *args: Tensor, real=real) -> object:  # type: ignore[no-untyped-def]
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("made up")
            return real(x, *args)

        monkeypatch.setattr(encoder, part, small)
    split = cache.forward(encoder, wavs)
    assert torch.equal(whole.lens, split.lens)
    assert torch.allclose(whole.mean(), split.mean(), atol=1e-4)
    assert "halves" in capsys.readouterr().out
    cache.extract(encoder, some, ["mean"], store, share_cnn=share_cnn)
    means, _ = read(store, encoder, "mean", some).batch(range(5))
    assert torch.allclose(means, whole.mean(), atol=1e-4)


def test_audio_that_cannot_be_read_is_named(
    encoder: Encoder, some: list[Clip], store: Store
) -> None:
    os.remove(some[1].path)
    with pytest.raises(UserError, match=r"1\.wav: no such file"):
        cache.extract(encoder, some, ["mean"], store)
    assert audio.seconds(some[0].path) == 0.5
