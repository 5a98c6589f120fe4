"""Our modules against transformers': the same names and weights, the same hidden states."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from upstream.audio import pad
from upstream.common.errors import UserError
from upstream.encoder import encoder as encoders
from upstream.encoder.cnn import ConvLayer
from upstream.encoder.config import Config
from upstream.encoder.transformer import Attention, Model, buckets

CLOSE = 2e-5  # float32 rounding: the values reach 5, and the matrix products differ in order


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {variant: tiny.hf_folder(root, variant) for variant in tiny.VARIANTS}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_single_wave_equals_transformers(variant: str, folders: dict[str, Path]) -> None:
    encoder, reference = encoders.load(folders[variant]), tiny.model(variant)
    assert list(encoder.model.state_dict()) == list(reference.state_dict())
    for samples in (400, 8000, 16400, 31999):
        wave = tiny.noise(samples)[0]
        asked = F.layer_norm(wave, wave.shape) if encoder.normalize else wave
        with torch.inference_mode():
            ours = encoder(*pad([wave])).layers[:, 0]
            theirs = reference(asked[None], output_hidden_states=True)
        *hidden, _ = theirs.hidden_states  # of pre-norm models the last here is not yet normalised
        states = torch.cat([*hidden, theirs.last_hidden_state])
        assert states.shape == ours.shape
        assert (states - ours).abs().max() <= CLOSE


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_dropouts_stand_where_transformers_has_them(
    variant: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder, reference = encoders.load(folders[variant]), tiny.model(variant)
    ours, theirs = (
        {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        for model in (encoder.model, reference)
    )
    assert ours == theirs and len(ours) == 11
    rates = {"attention_dropout": 0.5, "activation_dropout": 0.2, "hidden_dropout": 0.3}
    settings = json.loads((folders[variant] / "config.json").read_text())
    folder = tiny.hf_folder(tmp_path, variant)
    (folder / "config.json").write_text(json.dumps({**settings, **rates, "feat_proj_dropout": 0.4}))
    model = encoders.load(folder).model
    layer: Any = model.encoder.layers[1]
    found = [layer.attention.dropout, layer.feed_forward.intermediate_dropout.p, layer.dropout.p]
    assert found == list(rates.values())
    assert layer.feed_forward.output_dropout.p == model.encoder.dropout.p == 0.3
    assert model.feature_projection.dropout.p == 0.4


def draw(layer: nn.Module) -> None:
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kernel", "stride"), [(10, 5), (3, 2), (2, 2), (7, 2), (4, 1), (5, 5), (1, 2)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_matrix_products(kernel: int, stride: int, bias: bool) -> None:
    config = Config(
        conv_dim=(3, 5), conv_kernel=(1, kernel), conv_stride=(1, stride), conv_bias=bias
    )
    layer = ConvLayer(config, 1)
    draw(layer)
    x = torch.stack(tiny.noise(36 * stride, 36 * stride)).unflatten(1, (-1, 3))
    due = F.gelu(layer.conv(x.mT)).mT
    assert (layer(x)[:, : due.shape[1]] - due).abs().max() <= 1e-5
    assert layer(x).shape[1] == 12


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_folded_group_norm_is_group_norm(offset: float) -> None:
    """In value and in gradient, with and without the padded frames, and for silence."""
    layer = ConvLayer(Config(conv_dim=(16,), conv_kernel=(10,), conv_stride=(5,)), 0)
    draw(layer)
    wav = tiny.noise(16000)[0] + offset
    wavs = torch.stack([wav, F.pad(wav[:9000], (0, 7000)), torch.zeros(16000)])
    frames = torch.tensor([3199, 1799, 3199])
    ours = layer.normed(wavs[:, :, None], frames)
    assert ours.shape == (3, 3200, 16)
    double: Any = copy.deepcopy(layer).double()
    for row, out, n in zip(wavs.double(), ours, frames.tolist()):
        due = F.gelu(double.layer_norm(double.conv(row[None, None, : 5 * n + 5])))[0].T
        assert (out[:n] - due).abs().max() <= (1e-5 if not offset else 1e-4)
        if row.any():
            mine, theirs = (
                torch.autograd.grad(x.square().mean(), of.conv.weight, retain_graph=True)[0]
                for x, of in ((out[:n], layer), (due, double))
            )
            assert (mine - theirs).norm() <= 1e-3 * theirs.norm()


def test_the_cnn_of_a_batch_is_that_of_each(folders: dict[str, Path]) -> None:
    """No frame sees the neighbour in the batch, whatever the length."""
    extractor = encoders.load(folders["wav2vec2-large"]).model.feature_extractor
    for samples in range(16000, 16330, 37):
        wavs = torch.stack(tiny.noise(samples, samples, samples))
        lens = torch.full((3,), samples)
        with torch.inference_mode():
            together = extractor(wavs, lens)
            for i in range(3):
                assert (extractor(wavs[i : i + 1], lens[:1]) - together[i]).abs().max() <= 1e-5


@pytest.mark.parametrize(("count", "distance"), [(320, 800), (32, 128), (12, 20)])
def test_relative_positions_are_wavlms(count: int, distance: int) -> None:
    reference = WavLMAttention(16, 4, num_buckets=count, max_distance=distance)
    offsets = torch.arange(-2000, 2001)
    assert torch.equal(
        buckets(offsets, count, distance), reference._relative_positions_bucket(offsets)
    )
    config = Config(
        hidden_size=16, num_attention_heads=4, num_buckets=count, max_bucket_distance=distance
    )
    attention = Attention(config, 0)
    attention.load_state_dict(reference.state_dict())
    for length in (1, 2, 75):
        assert torch.equal(attention.compute_bias(length), reference.compute_bias(length, length))


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    row = encoders.FAMILIES[family]
    theirs = getattr(transformers, row.model).config_class()
    config = Config.read({}, row, "test")
    for name, value in config.to_dict().items():
        if name not in row.fixed:
            assert getattr(theirs, name) == value, name
    with torch.device("meta"):
        names = list(Model(config).state_dict())
    assert len(names) > 190 and names[-1] == "encoder.layers.11.final_layer_norm.bias"


def test_data2vec_is_post_norm_whatever_its_config_says(tmp_path: Path) -> None:
    """data2vec-audio-large says do_stable_layer_norm, which transformers' class does not read."""
    folder = tiny.hf_folder(tmp_path, "data2vec")
    before = encoders.load(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "do_stable_layer_norm": True}))
    after, batch = encoders.load(folder), pad(tiny.noise(8000))
    assert after.config.to_dict()["do_stable_layer_norm"] is False
    with torch.inference_mode():
        assert torch.equal(before(*batch).layers, after(*batch).layers)


MISFITS = [
    ({"hidden_act": "relu"}, "hidden_act: 'relu' is not one of gelu"),
    ({"feat_extract_activation": "relu"}, "feat_extract_activation: 'relu' is not one of gelu"),
    ({"conv_stride": [5, 2]}, "of different lengths"),
    ({"conv_dim": "512"}, "conv_dim: must be a list"),
    ({"conv_dim": [16, 16, 16, 16, 16, 16, 0]}, r"conv_dim\[6\]: 0 must be at least 1"),
    ({"num_conv_pos_embedding_groups": 5}, "no multiple of num_conv_pos_embedding_groups"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers: so large a number must be"),
    ({"hidden_size": 32.0}, "hidden_size: must be int"),
    ({"conv_bias": "false"}, "conv_bias: must be true or false"),
    ({"hidden_dropout": 1.5}, "hidden_dropout: 1.5 must be"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps: nan must be"),
    ({"feat_extract_norm": "batch"}, "not one of group, layer"),
]


@pytest.mark.parametrize(("change", "complaint"), MISFITS)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], complaint: str) -> None:
    _, settings = tiny.config("hubert")
    hubert = encoders.FAMILIES["hubert"]
    assert Config.read(settings, hubert, "test").hidden_size == 32
    with pytest.raises(UserError, match=f"test: its config does not fit: .*{complaint}"):
        Config.read({**settings, **change}, hubert, "test")


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"add_adapter": True}])
def test_what_the_forward_does_not_do_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(UserError) as error:
        encoders.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_config_round_trips() -> None:
    given = {"num_buckets": 7, "vocab_size": 5, "hidden_size": 96, "label2id": {"a": 1}}
    family = encoders.FAMILIES["hubert"]
    hubert = Config.read(given, family, "test")
    assert hubert.num_buckets == 0 and hubert.hidden_size == 96  # buckets are no field of HuBERT's
    again = hubert.to_dict()
    assert {**again, **given} == again and again["num_hidden_layers"] == 12
    written = json.dumps(again, sort_keys=True)
    reread = Config.read(json.loads(written), family, "test")
    assert json.dumps(reread.to_dict(), sort_keys=True) == written
