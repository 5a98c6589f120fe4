"""Every field of every family's config survives every format, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from tests.optional import required
from upstream import resolve
from upstream.checkpoints import containers as container
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints.read import Checkpoint
from upstream.common.errors import UserError
from upstream.encoder.config import FAMILIES, Config
from upstream.encoder.encoder import FIELDS, Encoder, load
from upstream.encoder.export import export, require_fingerprint, require_same
from upstream.encoder.transformer import Model

CONVERTED = ["hubert", "wav2vec2", "wavlm", "data2vec-audio"]
# what fairseq has no setting for: field -> a value that it cannot hold
LOST = {"layer_norm_eps": 1e-4, "feat_proj_layer_norm": False, "conv_pos_kernel_size": 2}


def random_config(family: str, seed: int) -> dict[str, Any]:
    """A valid config in which every field is drawn."""
    draw = random.Random(f"{family} {seed}")
    depth = draw.randint(1, 4)
    heads = draw.choice([1, 2, 4])
    norm = draw.choice(["group", "layer"])
    config = {
        "hidden_size": 16 * draw.randint(1, 3),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": draw.randint(5, 40),
        "hidden_dropout": draw.choice([0.0, 0.1, 0.25]),
        "activation_dropout": draw.choice([0.0, 0.1, 0.35]),
        "attention_dropout": draw.choice([0.0, 0.15]),
        "feat_proj_dropout": draw.choice([0.0, 0.05]),
        "layer_norm_eps": draw.choice([1e-5, 1e-5, 1e-5, 1e-4, 1e-7]),
        "feat_extract_norm": norm,
        "conv_dim": [draw.choice([8, 12, 16]) for _ in range(depth)],
        "conv_kernel": [draw.randint(2, 10) for _ in range(depth)],
        "conv_stride": [draw.randint(2, 5) for _ in range(depth)],
        "conv_bias": draw.random() < 0.5,
        "num_conv_pos_embeddings": draw.randint(3, 20),
        "num_conv_pos_embedding_groups": draw.choice([1, 2, 4, 8]),
        "do_stable_layer_norm": draw.random() < 0.5,
    }
    if family == "hubert":
        config["feat_proj_layer_norm"] = draw.random() < 0.8
    if family == "wavlm":
        config |= {"num_buckets": 4 * draw.randint(1, 8), "max_bucket_distance": 8 * 100}
    if family == "data2vec-audio":
        config |= {"num_conv_pos_embeddings": draw.randint(1, 4)}
        config |= {"conv_pos_kernel_size": draw.choice([2, 3, 5, 9])}
    return config


def random_encoder(family: str, seed: int) -> Encoder:
    config = random_config(family, seed)
    model = Model(Config.read(config, FAMILIES[family], "random"))
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, like: Tensor) -> Tensor:
        noise = 0.2 * torch.randn(like.shape, generator=generator)
        return noise + 1 if like.dim() == 1 and name.endswith("weight") else noise

    state = {name: values(name, tensor) for name, tensor in model.state_dict().items()}
    normalize = random.Random(seed).random() < 0.5
    return Encoder(Checkpoint(family, config, state, normalize, "random"))


def lost(encoder: Encoder, form: str) -> list[str]:
    """The fields that a format cannot hold."""
    config = encoder.config
    if form == "hf":
        return []
    kernel = 0 < config.conv_pos_kernel_size < 3
    fields = {"layer_norm_eps": config.layer_norm_eps != 1e-5, "conv_pos_kernel_size": kernel,
              "feat_proj_layer_norm": not config.feat_proj_layer_norm}  # fmt: skip
    return [name for name, lacking in fields.items() if lacking]


@pytest.mark.parametrize("form", ["hf", "s3prl", "fairseq"])
@pytest.mark.parametrize("family", CONVERTED)
def test_every_config_round_trips(family: str, form: str, tmp_path: Path) -> None:
    held = 0
    for seed in range(10):
        encoder = random_encoder(family, seed)
        output = tmp_path / (f"{seed}" if form == "hf" else f"{seed}.pt")
        if refused := lost(encoder, form):
            with pytest.raises(UserError) as error:
                export(encoder, form, output)
            assert all(name in str(error.value) for name in refused)
            assert not output.exists()
            continue
        export(encoder, form, output)
        again = load(output)
        wave = tiny.noise(4000)
        with torch.inference_mode():
            ours, theirs = (m(torch.stack(wave), torch.tensor([4000])) for m in (encoder, again))
        if form != "hf" and encoder.config.conv_dim[-1] == encoder.config.hidden_size:
            assert (ours.layers - theirs.layers).abs().max() < 1e-4 * ours.layers.abs().max()
            continue
        held += 1
        config = dataclasses.asdict(again.config)
        assert {key: config[key] for key in FIELDS if key != "given"} == {
            key: value for key, value in dataclasses.asdict(encoder.config).items()
            if key != "given"
        }  # fmt: skip
        assert torch.equal(ours.layers, theirs.layers)
        assert (again.family, again.normalize) == (encoder.family, encoder.normalize)
    assert held >= 2, "most configs can be held"
    assert not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize(("field", "value"), LOST.items())
@pytest.mark.parametrize("form", ["s3prl", "fairseq"])
def test_what_fairseq_has_no_setting_for(field: str, value: Any, form: str, tmp_path: Path) -> None:
    variant = "data2vec" if field == "conv_pos_kernel_size" else "hubert"
    encoder = load(tiny.hf_folder(tmp_path, variant, **{field: value}))
    with pytest.raises(UserError, match=rf"cannot hold {field} .*; write it as hf"):
        export(encoder, form, tmp_path / "out.pt")
    export(encoder, "hf", tmp_path / "out")
    assert load(tmp_path / "out").fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_equal_widths_are_the_same_function_in_s3prl(variant: str, tmp_path: Path) -> None:
    """s3prl's own expert loads it strictly and hears what we do."""
    required("s3prl.upstream.hubert.expert")
    encoder = load(tiny.hf_folder(tmp_path, variant, conv_dim=[16] * 6 + [32]), padding="s3prl")
    path = export(encoder, "s3prl", tmp_path / "out.pt")
    wave = torch.stack(tiny.noise(6400))
    name = f"{variant.removesuffix('-large')}_local"
    theirs = resolve.load(f"s3prl:{name}:ckpt={path}:trust=true")
    with torch.inference_mode():
        ours, states = (model(wave, torch.tensor([6400])).layers for model in (encoder, theirs))
    assert (ours - states).abs().max() < 1e-4 * ours.abs().max()


def test_a_folder_that_reads_back_otherwise_is_no_export(tmp_path: Path) -> None:
    """A processor of another model lies in the place already, and would have its say."""
    encoder, out = tiny.encoder(tmp_path), tmp_path / "out"
    out.mkdir()
    stale = {"feature_extractor": {"do_normalize": True}}
    (out / "processor_config.json").write_text(json.dumps(stale))
    with pytest.raises(UserError, match=r"normalize is False, not True|normalize is True, not"):
        export(encoder, "hf", out)
    assert not (out / "model.safetensors").exists()


def test_what_reads_back_otherwise_is_named(tmp_path: Path) -> None:
    encoder, out = tiny.encoder(tmp_path), tmp_path / "out"
    export(encoder, "hf", out)
    other = tiny.encoder(tmp_path, seed=1)
    with pytest.raises(UserError, match="has other values"):
        require_same(other, out)
    export(encoder, "hf", out)
    settings = json.loads((out / "config.json").read_text())
    settings["layer_norm_eps"] = 1e-3
    (out / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"layer_norm_eps is 0.001, not 1e-05"):
        require_same(encoder, out)


def test_a_fingerprint_stands_for_every_tensor(tmp_path: Path) -> None:
    """As after a merge: the tensors were hashed on their way to the disk."""
    encoder, out = tiny.encoder(tmp_path), tmp_path / "out"
    fingerprint = encoder.fingerprint()
    export(encoder, "hf", out)
    require_fingerprint(encoder, fingerprint, out)
    weights, config = (out / "model.safetensors", out / "config.json")
    whole, settings = weights.read_bytes(), config.read_text()

    def refused(fault: str) -> None:
        with pytest.raises(UserError, match=fault):
            require_fingerprint(encoder, fingerprint, out)
        assert not weights.exists()
        weights.write_bytes(whole)
        config.write_text(settings)

    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(f"reads back as [0-9a-f]{{12}}, not {fingerprint}; check the disk")
    config.write_text(json.dumps(json.loads(settings) | {"layer_norm_eps": 1e-3}))
    refused(r"layer_norm_eps is 0.001, not 1e-05\) and was removed")
    (out / "preprocessor_config.json").unlink()
    (out / "preprocessor_config.json").write_text('{"do_normalize": true}')
    refused(r"normalize is True, not False")


def test_a_disk_that_loses_a_bit_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.hf_folder(tmp_path)
    state = container.open_container(folder).state
    written = files.save_tensors

    def spoil(tensors: Any, path: Path, *rest: Any) -> None:
        written(tensors, path, *rest)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(files, "save_tensors", spoil)
    with pytest.raises(UserError, match="reads back as something else"):
        container.write(folder, state, tmp_path / "out")
