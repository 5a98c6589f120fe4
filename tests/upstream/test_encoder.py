"""Upstreams: frame counts, padding that has no say, normalisation, training, names and options."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import upstream
from upstream import dsp
from upstream.audio import pad
from upstream.base import Digest, Hidden, fingerprint, valid
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.encoder import encoder as encoders
from upstream.encoder.config import Family
from upstream.fbank import Fbank
from upstream.resolve import PUBLISHED, UPSTREAMS

CLOSE = 1e-4

# samples: (frames of the convolutions, s3prl's round(samples / 320)); s3prl caps at the frames
FRAMES = {
    400: (1, 1),
    720: (2, 2),
    1600: (4, 5),
    16000: (49, 50),
    16080: (50, 50),
    16160: (50, 50),
    16240: (50, 51),
    80160: (250, 250),
    128000: (399, 400),
    160000: (499, 500),
    300000: (937, 938),
}
# batch: frames kept by s3prl's chunk rule (HuBERT, WavLM) and by the conv rule, s3prl's lengths
MASKS = [
    ((16000, 8000), (49, 25), (49, 24), (49, 25)),
    ((16000, 15000), (49, 47), (49, 46), (49, 47)),
    ((48000, 32000, 16000), (149, 100, 50), (149, 99, 49), (149, 100, 50)),
    ((32000, 31900), (99, 99), (99, 99), (99, 99)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {variant: tiny.hf_folder(root, variant) for variant in tiny.VARIANTS}


def test_frame_counts(folders: dict[str, Path]) -> None:
    encoder = encoders.load(folders["hubert"])
    assert (encoder.window, encoder.stride) == (400, 320)
    assert encoder.frames(torch.tensor(list(FRAMES))).tolist() == [n for n, _ in FRAMES.values()]
    assert encoder.frames(torch.tensor([0, 1, 399])).tolist() == [1, 1, 1]
    legacy = encoders.load(folders["hubert"], padding="s3prl")
    for samples, (frames, rounded) in FRAMES.items():
        if samples <= 20_000:
            hidden = legacy(*pad(tiny.noise(20_000, samples)))
            assert int(hidden.lens[1]) == rounded
            assert int(legacy(*pad(tiny.noise(samples))).lens[0]) == min(frames, rounded)


@pytest.mark.parametrize(("batch", "chunk", "conv", "lens"), MASKS)
def test_s3prl_masks(
    batch: tuple[int, ...],
    chunk: tuple[int, ...],
    conv: tuple[int, ...],
    lens: tuple[int, ...],
    folders: dict[str, Path],
) -> None:
    samples = torch.tensor(batch)
    for variant, kept in (
        ("hubert", chunk),
        ("wavlm", chunk),
        ("wav2vec2", conv),
        ("data2vec", conv),
    ):
        encoder = encoders.load(folders[variant], padding="s3prl")
        length = int(encoder.frames(samples).max())
        assert encoder._kept(samples, max(batch), length).tolist() == list(kept)
    short = [n // 10 for n in batch]  # the same rule on what is quick to run
    hidden = encoder(*pad(tiny.noise(*short)))
    assert hidden.lens.tolist() == [min(round(n / 320), hidden.layers.shape[2]) for n in short]
    assert [min(round(n / 320), conv[0]) for n in batch] == list(lens)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_padding_has_no_say(variant: str, folders: dict[str, Path]) -> None:
    encoder = encoders.load(folders[variant])
    waves = tiny.noise(9000, 16000, 300, 5333, 1)  # two shorter than the window
    wavs, lens = pad(waves)
    with torch.inference_mode():
        batch = encoder(torch.nn.functional.pad(wavs, (0, 4000)), lens)
        assert batch.lens.tolist() == [27, 49, 1, 16, 1]
        assert batch.layers.dtype == torch.float32
        for i, wave in enumerate(waves):
            alone = encoder(*pad([wave]))
            n = int(batch.lens[i])
            assert alone.layers.shape[2] == int(alone.lens[0]) == n
            assert (alone.layers[:, 0] - batch.layers[:, i, :n]).abs().max() <= CLOSE


def test_normalising_uses_the_utterance_only(folders: dict[str, Path]) -> None:
    on, off = (encoders.load(folders["wavlm-large"], normalize=flag) for flag in (True, False))
    assert encoders.load(folders["wavlm-large"]).normalize
    assert not encoders.load(folders["wavlm"]).normalize
    waves = tiny.noise(8000, 4000)
    unit = [torch.nn.functional.layer_norm(wave, wave.shape, eps=1e-5) for wave in waves]
    with torch.inference_mode():
        assert (on(*pad(waves)).layers - off(*pad(unit)).layers).abs().max() <= CLOSE
        assert (on(*pad(waves)).layers - off(*pad(waves)).layers).abs().max() > 0.01


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_training_mode_has_dropout_and_gradients(variant: str, folders: dict[str, Path]) -> None:
    encoder = encoders.load(folders[variant])
    for parameter in encoder.cnn().parameters():
        parameter.requires_grad_(False)
    batch = pad(tiny.noise(8000, 4000))
    assert torch.equal(encoder(*batch).layers, encoder(*batch).layers)
    encoder.train()
    assert not torch.equal(encoder(*batch).layers, encoder(*batch).layers)
    encoder(*batch).layers[-1].square().mean().backward()
    idle = {
        name
        for name, parameter in encoder.model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    assert idle <= {"masked_spec_embed"}
    assert all(parameter.grad is None for parameter in encoder.cnn().parameters())


def test_adapters_on_linears_act_in_every_family(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        encoder = encoders.load(folder)
        batch = pad(tiny.noise(4000))
        before = encoder(*batch).layers
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = getattr(encoder.model.encoder.layers[0].attention, part)
            handle = linear.register_forward_hook(lambda module, args, output: output * 1.5)
            assert not torch.allclose(encoder(*batch).layers, before), (folder.name, part)
            handle.remove()


def test_loading_draws_no_random_number(folders: dict[str, Path]) -> None:
    state = torch.random.get_rng_state()
    encoders.load(folders["wav2vec2"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_fingerprint_may_be_made_tensor_by_tensor_in_order() -> None:
    state = {"b": torch.ones(2, 3), "a": torch.arange(4)}
    digest = Digest({"family": "hubert"})
    for name in ("a", "b"):
        digest.add(name, state[name])
    assert digest.text() == fingerprint({"family": "hubert"}, state)
    with pytest.raises(ValueError, match="a after b"):
        digest.add("a", state["a"])


def test_fingerprints_tell_encoders_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["hubert"]
    prints = {
        "plain": encoders.load(folder).fingerprint(),
        "padding": encoders.load(folder, padding="s3prl").fingerprint(),
        "normalize": encoders.load(folder, normalize=True).fingerprint(),
        "weights": encoders.load(tiny.hf_folder(tmp_path, "hubert", seed=1)).fingerprint(),
        "precision": encoders.load(folder, precision="bfloat16").fingerprint(),
    }
    assert len(set(prints.values())) == len(prints)
    assert encoders.load(folder).fingerprint() == prints["plain"]


def test_encoders_that_share_the_cnn_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["hubert"]
    base, tuned = encoders.load(folder), encoders.load(folder)
    with torch.no_grad():
        tuned.model.encoder.layer_norm.bias.add_(1)
    assert base.fingerprint() != tuned.fingerprint()
    assert base.cnn_fingerprint() == tuned.cnn_fingerprint()
    others = [
        encoders.load(folder, normalize=True),
        encoders.load(folder, precision="bfloat16"),
        encoders.load(tiny.hf_folder(tmp_path, "hubert", seed=1)),
        encoders.load(folders["hubert-large"]),
    ]
    prints = {encoder.cnn_fingerprint() for encoder in [base, *others]}
    assert len(prints) == 5 and None not in prints
    assert encoders.load(folder, padding="s3prl").cnn_fingerprint() is None
    assert Fbank().cnn_fingerprint() is None


def test_the_family_has_no_say_in_the_cnn(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same CNN inside a HuBERT and a wav2vec 2.0 is cached once."""
    hubert: Any = tiny.model("hubert")
    other: Any = tiny.model("wav2vec2")
    other.feature_extractor.load_state_dict(hubert.feature_extractor.state_dict())
    other.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    first, second = encoders.load(folders["hubert"]), encoders.load(tmp_path)
    assert first.cnn_fingerprint() == second.cnn_fingerprint()
    batch = pad(tiny.noise(8000, 4000))
    assert torch.equal(first.convolve(*batch)[0], second.convolve(*batch)[0])


@pytest.mark.parametrize("variant", ["hubert", "hubert-large", "wavlm", "data2vec"])
def test_low_precision_is_near(variant: str, folders: dict[str, Path]) -> None:
    batch = pad(tiny.noise(9000, 4000))
    with torch.inference_mode():
        exact, lens = encoders.load(folders[variant])(*batch)
        mine = valid(lens, exact.shape[2])
        errors = []
        for precision in ("bfloat16", "float16"):
            encoder = encoders.load(folders[variant], precision=precision)
            layers = encoder(*batch).layers
            again = encoder.contextual(*encoder.convolve(*batch))
            assert layers.dtype == encoder.convolve(*batch)[0].dtype == torch.float32
            assert torch.equal(layers, again.layers)
            error, size = (x[:, mine].square().mean((1, 2)) for x in (layers - exact, exact))
            errors.append(float((error / size).max().sqrt()))
    assert 0.05 > errors[0] > 3 * errors[1] > 0  # three bits of mantissa apart


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_hidden_frames_are_replaced_before_the_transformer(
    variant: str, folders: dict[str, Path]
) -> None:
    """As transformers' models do in pre-training."""
    encoder, model = encoders.load(folders[variant]), tiny.model(variant)
    wav = tiny.noise(8000)[0]
    hidden = torch.zeros(1, 24, dtype=torch.bool)
    hidden[0, 5:11] = True
    with torch.inference_mode():
        convolved = encoder.convolve(*pad([wav]))
        plain, masked = encoder.contextual(*convolved), encoder.contextual(*convolved, hidden)
        given = torch.nn.functional.layer_norm(wav, wav.shape, eps=1e-5)
        outputs = model(
            (given if encoder.normalize else wav)[None],
            mask_time_indices=hidden,
            output_hidden_states=True,
        )
        none = encoder.contextual(*convolved, torch.zeros_like(hidden))
    theirs = torch.stack([*outputs.hidden_states[:-1], outputs.last_hidden_state])
    assert (masked.layers - theirs).abs().max() <= CLOSE
    assert (masked.layers - plain.layers).abs().max() > 0.01
    assert torch.equal(none.layers, plain.layers)
    del encoder.model.masked_spec_embed
    with pytest.raises(UserError, match="no masked_spec_embed"), torch.inference_mode():
        encoder.contextual(*convolved, hidden)


def test_what_weights_have_heard_lies_beside_them(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["hubert"], tmp_path / "tuned")
    assert encoders.load(folder).heard == frozenset()
    (folder / "heard.txt").write_text("abc\nabc@1.5-2.5\n")
    heard = {"abc", "abc@1.5-2.5"}
    assert encoders.load(folder).heard == heard
    assert encoders.load(folder / "model.safetensors").heard == heard
    (folder / "heard.txt").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"heard\.txt: not text"):
        encoders.load(folder)


@pytest.mark.parametrize("record", ["fingerprint", "fingerprints"])
def test_a_bit_flipped_in_a_built_model_is_noticed(
    record: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["hubert"], tmp_path / "tuned")
    due = encoders.load(folder).fingerprint()
    several = {"base_fingerprint": "0", "fingerprints": {"merged": due}}
    content = {"fingerprint": due} if record == "fingerprint" else several
    (folder / "merge.json").write_text(json.dumps(content))
    assert encoders.load(folder).fingerprint() == due
    for options in ({"padding": "s3prl"}, {"normalize": True}, {"precision": "bfloat16"}):
        encoders.load(folder, **options).fingerprint()  # another one, of the same weights
    tuned = encoders.load(folder)
    with torch.no_grad():
        tuned.model.encoder.layer_norm.bias.add_(1)
    assert tuned.fingerprint() != due  # trained on, not damaged
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 4
    (folder / "model.safetensors").write_bytes(weights)
    for options in ({}, {"padding": "s3prl"}):
        with pytest.raises(UserError, match="damaged or replaced; delete the folder"):
            encoders.load(folder, **options).fingerprint()
    del content["fingerprint" if record == "fingerprint" else "base_fingerprint"]
    (folder / "merge.json").write_text(json.dumps(content))  # says nothing of an encoder
    encoders.load(folder).fingerprint()


def test_a_callers_autocast_changes_nothing(folders: dict[str, Path]) -> None:
    encoder, batch = encoders.load(folders["hubert"]), pad(tiny.noise(8000))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = encoder(*batch).layers
    with torch.inference_mode():
        assert torch.equal(encoder(*batch).layers, inside)


def test_a_new_family_is_one_row(tmp_path: Path) -> None:
    if "unispeech-sat" not in encoders.FAMILIES:
        encoders.FAMILIES.add("unispeech-sat", Family("UniSpeechSatModel", True))
    family, settings = tiny.config("unispeech-sat")
    config = transformers.UniSpeechSatConfig(**settings)
    transformers.UniSpeechSatModel(config).save_pretrained(tmp_path)
    encoder = upstream.load(str(tmp_path))
    waves = tiny.noise(8000, 4000)
    with torch.inference_mode():
        batch, alone = encoder(*pad(waves)), encoder(*pad(waves[1:]))
    assert family == "unispeech-sat"
    assert (batch.layers[:, 1, :12] - alone.layers[:, 0]).abs().max() <= CLOSE


def test_mean_is_over_valid_frames_only() -> None:
    layers = torch.tensor([[[[1.0], [3.0], [float("nan")]], [[2.0], [4.0], [9.0]]]])
    assert Hidden(layers, torch.tensor([2, 3])).mean().tolist() == [[[2.0], [5.0]]]


def test_fbank_is_kaldis_with_two_deltas() -> None:
    waves = tiny.noise(16000, 9001, 100)
    wavs, lens = pad(waves)
    plain, normed = Fbank(cmvn=False)(wavs, lens), Fbank()(wavs, lens)
    assert plain.lens.tolist() == normed.lens.tolist() == [98, 54, 1]
    static = dsp.kaldi_fbank(waves[1], 80)  # which tests/upstream/test_dsp.py compares
    delta = dsp.deltas(static.T)
    due = torch.cat([static.T, delta, dsp.deltas(delta)]).T
    assert torch.equal(plain.layers[0, 1, :54], due)
    own = normed.layers[0, 1, :54]
    assert own.mean(0).abs().max() <= 1e-5
    assert (own.std(0) - 1).abs().max() <= 1e-4
    assert torch.isfinite(normed.layers).all()  # a single frame has no deviation
    assert not normed.layers[0, 1, 54:].any()


def test_an_encoder_needs_no_transformers(folders: dict[str, Path]) -> None:
    """Nor torch's compiler: each takes seconds to import, in every process."""
    code = (
        "import sys, torch; from upstream.encoder import encoder as encoders\n"
        "for folder in sys.argv[1:]:\n"
        "    encoder = encoders.load(folder)\n"
        "    with torch.inference_mode():\n"
        "        encoder(torch.randn(2, 8000), torch.tensor([8000, 4000]))\n"
        "encoder.save(sys.argv[1])\n"
        "assert not {'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    chosen = [str(folders[name]) for name in ("hubert", "wavlm-large", "data2vec")]
    subprocess.run([sys.executable, "-c", code, *chosen], check=True, cwd=PROJECT)


def test_listing_imports_no_models() -> None:
    code = (
        "import sys, upstream; assert 'torch' not in sys.modules; import upstream.resolve; "
        "assert not {'transformers', 's3prl', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {*PUBLISHED, "fbank", "fbank_no_cmvn", "hubert_demo"} <= set(UPSTREAMS)
    assert all(UPSTREAMS.about(name) for name in UPSTREAMS)
