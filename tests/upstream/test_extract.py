"""The feature cache: what is read back is what the upstream gave, and a change is never missed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from tests import tiny
from upstream import audio
from upstream.base import Hidden, Upstream
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder
from upstream.features import extract as cache
from upstream.features.clips import Clip, clips
from upstream.features.codec import Features
from upstream.features.forward import forward
from upstream.features.provide import in_order, provide
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
    assert read(store, encoder, "int8", some).error == pytest.approx(measured, rel=1e-3)
    assert 1e-4 < measured < 1e-2


def test_a_silent_frame_survives_int8() -> None:
    x = torch.zeros(2, 1, 3, 4)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, -127.0, 63.4])
    rows = cache.encode("int8", x, torch.tensor([3])).arrays["rows"]
    assert rows[0, 0, 0].tolist() == [0, 1, -127, 63] and not rows[1].any()


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
    recomputed = provide(other, some, "float16", store, where="recompute")
    again, _ = recomputed.batch([4, 2])
    for row, expected in enumerate(truth):
        assert relative(x[:, row, : lens[row]], expected) < 3e-4
    assert relative(again[:, 0, : lens[4]], truth[4]) < 3e-4
    assert relative(again[:, 1, : lens[2]], truth[2]) < 3e-4
    with pytest.raises(AssertionError, match="the CNN is called"):
        cache.extract(other, some, ["int8"], store)


def test_outputs_alone_need_no_pass(
    encoder: Encoder, some: list[Clip], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "contextual", None)
    cache.extract(encoder, some, ["cnn"], store)
    assert [entry.kind for entry in store.entries()] == ["cnn"]


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("outputs", [0, 2, 5])
def test_recomputed_frames_are_as_kept_ones(
    encoder: Encoder, some: list[Clip], store: Store, kind: cache.Kind, outputs: int
) -> None:
    """Bit by bit where the batches are the same, whether all, some or no outputs are kept."""
    for clip in some[:outputs]:  # each in a batch of its own, here and below
        cache.extract(encoder, [clip], ["cnn"], store)
    again = provide(encoder, some, kind, store, where="recompute")
    assert not store.folder(encoder.fingerprint(), kind).exists()
    for clip in some:
        cache.extract(encoder, [clip], [kind], store)
    kept = provide(encoder, some, kind, store)
    for index in range(len(some)):
        (a, la), (b, lb) = kept.batch([index]), again.batch([index])
        assert torch.equal(la, lb) and torch.equal(a, b)
    assert again.error == pytest.approx(kept.error) and (kept.error > 0) == (kind == "int8")
    for indices in ([0, 1], [0, 2, 1]):
        (a, la), (b, lb) = kept.batch(indices), again.batch(indices)
        assert torch.equal(la, lb) and a.shape == b.shape and relative(a, b) < 2e-3
        for row, n in enumerate(la):
            assert not b[:, row, n:].any()
    assert (again.layers, again.dim) == (kept.layers, kept.dim)
    assert (again.lens - kept.lens).abs().max() <= 1  # an estimate, to sort by


def test_recomputed_outputs_of_the_cnn_are_as_kept_ones(
    encoder: Encoder, some: list[Clip], store: Store
) -> None:
    again = provide(encoder, some, "cnn", store, where="recompute")
    kept = provide(encoder, some, "cnn", store, where="cache")
    (a, la), (b, lb) = kept.batch([0, 2]), again.batch([0, 2])
    assert torch.equal(la, lb) and torch.allclose(a, b, atol=1e-5)
    assert (again.layers, again.dim) == (kept.layers, kept.dim) == (1, 16)


def test_where_features_come_from(
    encoder: Encoder, some: list[Clip], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = encoder.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda _: 1_000)
        provide(encoder, some, "float16", store)
        assert store.missing(fingerprint, "float16", some) == some, "no room for frames"
        provide(encoder, some, "mean", store, where="recompute")
        assert store.missing(fingerprint, "mean", some) == [], "means always are kept"
        provide(encoder, some[:2], "float16", store, where="cache")
        assert store.missing(fingerprint, "float16", some) == some[2:]
    provide(encoder, some, "float16", store, name="tiny", share_cnn=True)
    assert store.missing(fingerprint, "float16", some) == []
    assert {entry.kind for entry in store.entries()} == {"mean", "float16", "cnn"}
    monkeypatch.setattr(encoder, "forward", None)
    x, _ = provide(encoder, some, "float16", store).batch([1, 0])
    assert x.shape[:2] == (encoder.num_layers, 2)


@pytest.mark.parametrize("where", ["cache", "recompute"])
def test_batches_in_order_are_the_batches(
    encoder: Encoder, some: list[Clip], store: Store, where: Any
) -> None:
    features = provide(encoder, some, "float16", store, where=where)
    order = [[0, 1], [2], [4, 3], [1], [0], [2, 3], [1]]
    batches = list(in_order(features, order))
    assert [indices for indices, _, _ in batches] == order
    for indices, x, lens in batches:
        expected = features.batch(indices)
        assert torch.equal(x, expected[0]) and torch.equal(lens, expected[1])


def test_recomputed_batches_may_be_trained_on(
    encoder: Encoder, some: list[Clip], store: Store
) -> None:
    x, _ = provide(encoder, some, "float16", store, where="recompute").batch([0])
    weight = torch.ones(1, requires_grad=True)
    (x * weight).sum().backward()
    assert weight.grad is not None


class Unfaithful(Upstream):
    """Promises two layers of three numbers and gives what the test says."""

    num_layers, dim, stride = 2, 3, 160
    source = "mine.py"

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.give = give

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        return self.give(len(wavs), lens // 160)


@pytest.mark.parametrize(
    "give",
    [
        lambda b, n: Hidden(torch.zeros(2, b, int(n.max()), 4), n),
        lambda b, n: Hidden(torch.zeros(3, b, int(n.max()), 3), n),
        lambda b, n: Hidden(torch.zeros(2, b + 1, int(n.max()), 3), n),
        lambda b, n: Hidden(torch.zeros(b, int(n.max()), 3), n),
        lambda b, n: Hidden(torch.zeros(2, b, int(n.max()), 3, dtype=torch.float64), n),
        lambda b, n: Hidden(torch.zeros(2, b, int(n.max()), 3), n.float()),
        lambda b, n: Hidden(torch.zeros(2, b, int(n.max()), 3), n[:0]),
        lambda b, n: Hidden(torch.zeros(2, b, int(n.max()), 3), n + 1),
        lambda b, n: Hidden(torch.zeros(2, b, int(n.max()), 3), n * 0),
        lambda b, n: [torch.zeros(b, int(n.max()), 3)] * 2,
        lambda b, n: torch.zeros(2, b, int(n.max()), 3),
        lambda b, n: None,
    ],
)
def test_a_broken_promise_is_an_error_at_the_first_batch(
    some: list[Clip], store: Store, give: Any
) -> None:
    upstream = Unfaithful(give)
    for where in ("cache", "recompute"):
        with pytest.raises(UserError) as caught:
            provide(upstream, some[:3], "float16", store, where=where).batch([0, 1])
        line = str(caught.value)
        assert "\n" not in line and line.startswith("mine.py:Unfaithful: promised ")
        assert line.endswith("run: benchmark.py check --upstream mine.py:Unfaithful")
    assert store.missing(upstream.fingerprint(), "float16", some) == some


def test_a_users_own_class_works_everywhere(
    encoder: Encoder, some: list[Clip], store: Store
) -> None:
    plain = Plain(encoder)
    cache.extract(plain, some, ["mean", "float16", "int8"], store, share_cnn=True)
    x, lens = provide(plain, some, "float16", store, where="recompute").batch([2, 1])
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
    rows = [len(np.load(p)) for p in store.folder(encoder.fingerprint(), "mean").rglob("*.npy")]
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
        size = sum(np.load(array).nbytes for array in folder.rglob("*.npy"))
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
    monkeypatch.setattr(encoder, "padding_matters", True)  # else a CPU takes them one by one
    wavs = [clip.load() for clip in some]
    whole = forward(encoder, wavs)
    tried: list[int] = []
    for part in ("forward", "convolve", "contextual"):
        real = getattr(encoder, part)

        def small(x: Tensor, *args: Tensor, real=real, part=part) -> object:  # type: ignore[no-untyped-def]
            tried.extend([len(x)] * (part == "forward"))
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("made up")
            return real(x, *args)

        monkeypatch.setattr(encoder, part, small)
    split = forward(encoder, wavs)
    assert torch.equal(whole.lens, split.lens)
    assert torch.allclose(whole.mean(), split.mean(), atol=1e-4)
    assert "halves" in capsys.readouterr().out
    assert tried == [5, 2, 3, 1, 2]
    forward(encoder, wavs)  # what did not fit is not tried again
    assert tried[5:] == [2, 1, 2] and not capsys.readouterr().out
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
