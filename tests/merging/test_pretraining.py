"""Pre-training in seconds: runs, resumes to the same weights, saves what transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, HubertModel

from downstream.recipe import read_corpus
from merging.pretraining import pretrain as module
from merging.pretraining.hubert import Model, Position, encode, new_model, save
from merging.pretraining.pretrain import Batches, PretrainConfig, gather, pretrain
from merging.pretraining.stem import Stem, schedule, spectra, stem_outputs
from merging.pretraining.targets import mfcc, mfcc_targets
from tests.corpora import fault
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.common.schema import build, read_yaml

RECIPE = PROJECT / "recipes" / "demo" / "pretrain.yaml"
TINY = PretrainConfig(
    kind="pretrain",
    seed=0,
    corpus={"part": "digits", "scale": 0.02},
    real_share=0.25,
    model=Model(16, 2, 2, 32, [8] * 7, Position(8, 2)),
    stem=Stem(steps=20, batch=2, seconds=0.5, lr=2e-3),
    steps=20,
    batch=4,
    seconds=0.4,
    lr=1e-3,
    warmup=2,
    clusters=8,
    mask_start=0.1,
    mask_span=3,
    unmasked_weight=0.5,
    checkpoint_every=6,
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with the small corpus, and three noises as the real speech sample."""
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    (folder / "sample" / "deep").mkdir(parents=True)
    for index in range(3):
        noise = 0.1 * rng.standard_normal(12_000)
        soundfile.write(folder / "sample" / "deep" / f"{index}.flac", noise, 16_000)
    return folder


@pytest.fixture(autouse=True)
def sample(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECH_SAMPLE", str(room / "sample"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(HubertModel.from_pretrained(folder).state_dict())


def test_it_runs_learns_and_loads(room: Path) -> None:
    pretrain(TINY, room / "whole")
    model = HubertModel.from_pretrained(room / "whole").eval()
    assert model.dtype == torch.float32 and model.config.hidden_size == 16
    assert model(torch.randn(1, 8000)).last_hidden_state.shape == (1, 24, 16)
    assert AutoFeatureExtractor.from_pretrained(room / "whole").do_normalize is False
    log = (room / "whole" / "pretrain.log").read_text()
    assert "real speech: 3 files" in log and "step 20 of 20" in log
    assert "no real speech" not in log
    assert build(PretrainConfig, read_yaml(room / "whole" / "pretrain.yaml"), "") == TINY
    losses = [float(x.rsplit(" ", 1)[1]) for x in log.splitlines() if "stem step" in x]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stop", [0, 3, 13])  # after the stem, before and after a checkpoint
def test_interrupted_it_ends_with_the_same_weights(
    stop: int, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (room / "whole" / "model.safetensors").exists():
        pretrain(TINY, room / "whole")
    real, output = Batches.__call__, room / f"stopped-{stop}"

    def killed(self: Batches, step: int, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if step > stop:
            raise KeyboardInterrupt
        return real(self, step, targets)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "__call__", killed)
        pretrain(TINY, output)
    pretrain(TINY, output)
    log = (output / "pretrain.log").read_text()
    assert ("resumed at step" in log) == (stop >= TINY.checkpoint_every)
    assert log.count("stem step 20:") == 1
    expected = weights(room / "whole")
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_another_recipe_does_not_go_on_in_the_same_folder(room: Path) -> None:
    (room / "other").mkdir()
    (room / "other" / "pretrain.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="another recipe"):
        pretrain(TINY, room / "other")


def test_without_the_sample_it_says_so(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECH_SAMPLE", str(room / "nowhere"))
    said: list[str] = []
    synthetic, real = gather(TINY, room / "corpora" / "synthetic", said.append)
    assert real == [] and len(synthetic) > 10
    assert any("no real speech" in line for line in said)
    assert min(map(len, synthetic)) >= 2 * TINY.seconds * 16_000
    config = dataclasses.replace(TINY, seconds=0.3)
    stems = [stem_outputs(new_model(TINY.model), synthetic[:3]), []]
    targets = torch.zeros(2, sum(map(len, stems[0])), dtype=torch.int16)
    stem, labels, mask = Batches(stems, config)(1, targets)
    assert stem.shape == (4, 15, 8) and labels.shape == (2, 4, 15) and mask.shape == (4, 15)


def heard(room: Path, **options: object) -> PretrainConfig:
    """The tiny run on two corpora of real speech instead of the whole sample."""
    audio = {"name": "audio", "root": str(room / "sample"), "dev": 0.53}
    return dataclasses.replace(TINY, real=[audio, {**audio, "without": ["deep/0*"]}], **options)


def test_of_a_real_corpus_the_train_split_is_heard(room: Path) -> None:
    said: list[str] = []
    config = heard(room, seconds=0.1)
    names = [
        {e.path for e in read_corpus(corpus, "real", room) if e.split == "train"}
        for corpus in config.real
    ]
    assert [len(part) for part in names] == [2, 1] and "deep/0" not in str(names[1])
    _, real = gather(config, room / "corpora" / "synthetic", said.append)
    files = sum(map(len, names))
    assert said[-1].startswith(f"real speech: {files} files")
    assert [len(wav) for wav in real] == [12_000] * files


def test_other_speeds_are_other_lengths_and_pitches(room: Path, tmp_path: Path) -> None:
    time = np.arange(32_000) / 16_000
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * time), 16_000)
    for speed in (0.8, 0.9, 1.0, 1.1, 1.25):
        (wav,) = module._read([str(tmp_path / "tone.wav")], speed)
        assert wav.dtype == torch.int16 and len(wav) == pytest.approx(32_000 / speed, abs=1)
        peak = torch.fft.rfft(wav[:16_000].float()).abs().argmax()
        assert int(peak) == pytest.approx(1000 * speed, abs=2)
    said: list[str] = []
    config = heard(room, seconds=0.1, speeds=[0.9, 1.0])
    gather(config, room / "corpora" / "synthetic", said.append)
    assert said[-1].endswith("at 2 speeds")


def test_snapshots_are_kept_and_a_finished_run_is_left_alone(room: Path) -> None:
    output = room / "snapshots-of"
    config = heard(room, snapshot_every=8, seconds=0.1)
    pretrain(config, output)
    kept = sorted(path.name for path in (output / "snapshots").iterdir())
    assert kept == ["step-000008", "step-000016"]
    early, late = (weights(output / "snapshots" / name) for name in kept)
    last = weights(output)
    moved = "encoder.layers.0.attention.q_proj.weight"
    assert not torch.equal(early[moved], late[moved]) and not torch.equal(late[moved], last[moved])
    assert not (output / "state" / "stems.pt").exists()
    pretrain(config, output)
    assert "finished before" in (output / "pretrain.log").read_text()
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(output).items())


def test_a_run_that_goes_on_reads_no_audio(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = room / "no-audio"
    real = Batches.__call__

    def killed(self: Batches, step: int, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if step > 2:
            raise KeyboardInterrupt
        return real(self, step, targets)

    config = heard(room, seconds=0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "SAVE_SECONDS", 0.0)  # a state after every step
        patch.setattr(Batches, "__call__", killed)
        pretrain(config, output)
    monkeypatch.setattr(module, "gather", lambda *_: pytest.fail("reads audio again"))
    pretrain(config, output)
    assert "resumed at step 2 of 20" in (output / "pretrain.log").read_text()


def test_a_real_corpus_that_is_not_there_is_one_line(room: Path) -> None:
    for corpus, message in (
        ({"name": "audio", "root": "/nowhere"}, "/nowhere: no such folder"),
        ({"name": "audoi", "root": "/nowhere"}, "did you mean audio?"),
        ({"name": "audio", "root": "/nowhere", "dve": 0.1}, "did you mean dev?"),
        ({"root": "/nowhere"}, "real[0]: missing key 'name'"),
        ({"name": "audio"}, "real[0]: missing key 'root'"),
    ):
        config = dataclasses.replace(TINY, real=[corpus])
        assert message in fault(gather, config, room / "corpora" / "synthetic", print)


def test_real_speech_that_is_asked_for_is_not_left_out_silently(room: Path) -> None:
    for config in (heard(room, speeds=[]), heard(room, seconds=9.0)):
        line = fault(gather, config, room / "corpora" / "synthetic", print)
        assert f"no {2 * config.seconds:g} s of speech" in line


def test_batches_mask_whole_spans_and_respect_the_share() -> None:
    stems = [[torch.zeros(500, 8).half()], [torch.ones(500, 8).half()]]
    config = dataclasses.replace(TINY, batch=8, seconds=4.0)
    batches = Batches(stems, config)
    targets = torch.arange(1000, dtype=torch.int16).repeat(2, 1)
    stem, labels, mask = batches(1, targets)
    assert stem[:, 0, 0].tolist() == [0] * 6 + [1] * 2
    assert (labels[0].diff(dim=1) == 1).all()  # neighbouring frames of one utterance
    assert ((labels[0] >= 500) == (stem[..., 0] == 1)).all()
    for row in mask.int():
        lengths = [len(run) for run in "".join(map(str, row.tolist())).split("0") if run]
        assert all(n >= config.mask_span for n in lengths[:-1])
    again = Batches(stems, config)(1, targets)
    assert all(torch.equal(a, b) for a, b in zip((stem, labels, mask), again))
    assert not torch.equal(batches(2, targets)[1], labels)


def test_encode_is_the_published_forward_pass() -> None:
    torch.manual_seed(0)
    model = new_model(TINY.model).eval()
    wav = torch.randn(2, 8000)
    stem = model.feature_extractor(wav).transpose(1, 2)
    mask = torch.rand(2, 24) < 0.3
    with torch.no_grad():
        expected = model(wav, mask_time_indices=mask)
        torch.testing.assert_close(encode(model, stem, mask), expected.last_hidden_state)


def test_spectra_find_a_tone_in_the_frame_where_it_is() -> None:
    wav = torch.zeros(1, 16_000)
    wav[0, 8000:] = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 16_000)
    mel, narrow = spectra(wav)
    assert mel.shape == (1, 49, 40) and narrow.shape == (1, 49, 48)
    assert narrow[0, 30].argmax() == 32  # 1000 Hz / (16000 / 512)
    assert mel[0, 23].max() < -10 < mel[0, 25].max()  # frame 25 begins at sample 8000


def test_content_targets_ignore_a_fixed_filter_and_channel_targets_do_not() -> None:
    torch.manual_seed(0)
    wav = torch.randn(16_000).cumsum(0)
    wav = (wav - wav.mean()) / wav.abs().max() * torch.linspace(0.1, 1, 16_000)
    quiet = mfcc(wav) - mfcc(0.3 * wav)
    assert quiet[:, 0].mean() > 1 and (mfcc(wav)[:, 1:] - mfcc(0.3 * wav)[:, 1:]).abs().mean() < 0.1
    loud = (wav * 20_000).to(torch.int16)
    flat, raw = mfcc_targets([loud, (loud.float() * 0.1).to(torch.int16)], 4, 0)
    frames = len(flat) // 2
    assert (flat[:frames] == flat[frames:]).float().mean() > 0.9
    assert (raw[:frames] == raw[frames:]).float().mean() < 0.5


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 10, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(1 / 90)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_saving_keeps_float16_and_a_complete_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_model(TINY.model)
    save(model, tmp_path)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} == {
        path.name for path in tmp_path.iterdir()
    }
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name


def test_the_shipped_recipe_is_valid() -> None:
    config = build(PretrainConfig, read_yaml(RECIPE), str(RECIPE))
    assert config.corpus["part"] == "pretrain" and module.SAMPLE.name == "speech"
    assert sum(w.numel() for w in new_model(config.model).parameters()) == pytest.approx(
        1e6, rel=0.2
    )
