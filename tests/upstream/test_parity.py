"""Our encoders against s3prl's own experts: the same weights must give the same hidden states."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tiny
import torch
import transformers
from torch import Tensor

from merging.merged import write
from merging.recipe import recipe_of
from tests.optional import required
from upstream import audio
from upstream.checkpoints.write import to_s3prl
from upstream.common import PROJECT
from upstream.encoder import encoder as encoders
from upstream.fbank import Fbank
from upstream.s3prl import load as load_s3prl
from upstream.s3prl_expert import S3PRL

PACKAGES = {"data2vec-audio": "data2vec"}  # where s3prl calls a family by another name
BASE: dict[str, Any] = {
    "conv_dim": [512] * 7,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
}
required("s3prl.upstream.hubert.expert")

SPEECH = Path(os.environ.get("SPEECH_SAMPLE", PROJECT.parent / "shared" / "speech"))
CLOSE = 1e-4
Waves = Callable[..., list[Tensor]]


def expert_of(encoder: encoders.Encoder, folder: Path) -> Any:
    """s3prl's expert, loading (strictly) what `to_s3prl` wrote."""
    path = folder / "converted.pt"
    torch.save(to_s3prl(encoder), path)
    package = PACKAGES.get(encoder.family, encoder.family)
    expert = required(f"s3prl.upstream.{package}.expert").UpstreamExpert(path)
    return expert.eval()


def speech(*lengths: int) -> list[Tensor]:
    """Real speech of these lengths; noise where the sample is not at hand."""
    longest = sorted(SPEECH.rglob("*.flac")) + sorted(SPEECH.rglob("*.wav"))
    found = [path for path in longest if soundfile.info(str(path)).duration > 4][: len(lengths)]
    if len(found) < len(lengths):
        return tiny.noise(*lengths)
    return [audio.load(path)[:n] for path, n in zip(found, lengths)]


def compare(folder: Path, variant: str, waves: Waves, **sizes: Any) -> tuple[float, float]:
    """Largest differences to s3prl: single waves in exact mode, a padded batch in s3prl's mode."""
    path = tiny.hf_folder(folder, variant, **sizes)
    exact, legacy = encoders.load(path), encoders.load(path, padding="s3prl")
    expert = expert_of(exact, folder)
    alone = padded = 0.0
    with torch.inference_mode():
        for samples in (16_000, 16_400, 24_000):  # 49, 51 and 74 frames: odd and even
            wave = waves(samples)
            ours, theirs = exact(*audio.pad(wave)), expert(wave)["hidden_states"]
            assert len(theirs) == exact.num_layers == len(ours.layers)
            assert theirs[0].shape[1] == ours.layers.shape[2] == ours.lens[0]
            alone = max(alone, float((ours.layers - torch.stack(theirs)).abs().max()))
        batch = waves(24_000, 16_400, 8_000)
        ours, theirs = legacy(*audio.pad(batch)), expert(batch)["hidden_states"]
        assert ours.lens.tolist() == [74, 51, 25]  # 75 capped at what there is
        for i, n in enumerate(ours.lens):
            gap = (ours.layers[:, i, :n] - torch.stack(theirs)[:, i, :n]).abs().max()
            padded = max(padded, float(gap))
    return alone, padded


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_small_models_equal_s3prl(variant: str, tmp_path: Path) -> None:
    assert max(compare(tmp_path, variant, tiny.noise)) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hubert", "wavlm", "wav2vec2", "data2vec"])
def test_base_models_equal_s3prl_on_speech(variant: str, tmp_path: Path) -> None:
    kernel = {} if variant == "data2vec" else {"num_conv_pos_embeddings": 128}
    alone, padded = compare(tmp_path, variant, speech, **BASE, **kernel)
    print(f"{variant}: alone {alone:.1e}, padded {padded:.1e}")
    assert max(alone, padded) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hubert", "wavlm"])
def test_a_merged_base_model_runs_in_s3prl_and_transformers(variant: str, tmp_path: Path) -> None:
    """Full size, written by `merge` in both forms, on real speech."""
    base = tiny.hf_folder(tmp_path, variant, num_conv_pos_embeddings=128, **BASE)
    tuned = encoders.load(base)
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if not name.startswith("feature_extractor"):
                parameter.mul_(1.05)
    tuned.save(tmp_path / "tuned")
    plan = recipe_of(str(base), [str(tmp_path / "tuned")], None, {"alpha": 0.25})
    for form in ("hf", "s3prl"):
        write(plan, Path(), tmp_path / form, tmp_path, form)
    ours = encoders.load(tmp_path / "hf")
    package = required(f"s3prl.upstream.{variant}.expert")
    expert = package.UpstreamExpert(tmp_path / "s3prl" / "model.pt").eval()
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    wave = speech(40_000)
    with torch.inference_mode():
        expected = ours(*audio.pad(wave)).layers
        theirs = torch.stack(expert(wave)["hidden_states"])
        hidden = torch.stack(model(wave[0][None], output_hidden_states=True).hidden_states)
    gaps = [float((expected - found).abs().max()) for found in (theirs, hidden)]
    print(f"{variant}: s3prl {gaps[0]:.1e}, transformers {gaps[1]:.1e}")
    assert max(gaps) <= CLOSE


@pytest.mark.parametrize("variant", ["hubert", "wavlm", "wav2vec2", "data2vec"])
def test_the_padding_that_s3prl_lets_in_is_gone(variant: str, tmp_path: Path) -> None:
    """The two modes differ where s3prl's features depend on the batch, and only there."""
    path = tiny.hf_folder(tmp_path, variant)
    exact, legacy = encoders.load(path), encoders.load(path, padding="s3prl")
    batch = tiny.noise(24_000, 8_000)
    with torch.inference_mode():
        ours, theirs = exact(*audio.pad(batch)).layers, legacy(*audio.pad(batch)).layers
    assert (ours[:, 0] - theirs[:, 0]).abs().max() <= CLOSE
    assert (ours[:, 1, :24] - theirs[:, 1, :24]).norm() > 0.1 * ours[:, 1, :24].norm()


@pytest.mark.parametrize(
    ("name", "variant"),
    [("hubert", "hubert"), ("wavlm_local", "wavlm"), ("wav2vec2_custom", "wav2vec2-large"),
     ("data2vec_url", "data2vec"), ("unispeech_sat", "hubert-large")],
)  # fmt: skip
def test_a_checkpoint_gives_the_same_with_our_reader_and_with_s3prls(
    name: str, variant: str, tmp_path: Path
) -> None:
    encoder, path = tiny.encoder(tmp_path, variant, padding="s3prl"), tmp_path / "mine.pt"
    content = to_s3prl(encoder)
    if name == "unispeech_sat":  # s3prl reads it as a WavLM, without relative positions
        norm = {"normalize": encoder.normalize}
        content = {"cfg": content["model_cfg"] | norm, "model": content["model_weight"]}
        content["model"] = {k: v for k, v in content["model"].items() if "final_proj" not in k}
    torch.save(content, path)
    here, adapter = load_s3prl(name, ckpt=path), load_s3prl(name, ckpt=path, trust=True)
    assert isinstance(here, encoders.Encoder) and isinstance(adapter, S3PRL)
    assert here.fingerprint() == encoder.fingerprint()
    assert (adapter.num_layers, adapter.dim, adapter.stride) == (4, 32, 320)
    batch = audio.pad(tiny.noise(16_000, 8_000))
    with torch.inference_mode():
        ours, theirs = here(*batch), adapter(*batch)
    assert torch.equal(ours.lens, theirs.lens)
    assert (ours.layers[:, 0] - theirs.layers[:, 0]).abs().max() <= CLOSE
    n = int(ours.lens[1])
    assert (ours.layers[:, 1, :n] - theirs.layers[:, 1, :n]).abs().max() <= CLOSE


@pytest.mark.parametrize(("name", "cmvn"), [("fbank", True), ("fbank_no_cmvn", False)])
def test_fbank_equals_s3prl(name: str, cmvn: bool) -> None:
    waves = tiny.noise(16_000, 9_001)
    theirs, ours = load_s3prl(name), Fbank(cmvn)
    assert (theirs.num_layers, theirs.dim, theirs.stride) == (1, 240, 160)
    for wave in waves:
        wavs, lens = audio.pad([wave])
        assert torch.equal(ours(wavs, lens).layers, theirs(wavs, lens).layers)
