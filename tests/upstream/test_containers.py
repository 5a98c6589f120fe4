"""Containers: every form of checkpoint is read, and written back as it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.optional import optional, required
from upstream import audio
from upstream.checkpoints import containers as container
from upstream.checkpoints import read as checkpoint
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints import write as export
from upstream.checkpoints.tensor_names import slots
from upstream.checkpoints.write import to_s3prl
from upstream.common.errors import UserError
from upstream.encoder.config import Config
from upstream.encoder.encoder import FAMILIES, Encoder, load
from upstream.encoder.transformer import Model

torchaudio = optional("torchaudio")

BASE_WIDTH = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
HEAD = {"final_proj.weight": torch.full((3, 3), 0.1), "label_embs_concat": torch.ones(5, 3)}


def converted(encoder: Encoder) -> dict[str, Any]:
    return to_s3prl(encoder)


def fairseq(encoder: Encoder) -> dict[str, Any]:
    """As fairseq saves: a nested cfg, the pre-training head, optimizer and dictionaries."""
    content = to_s3prl(encoder)
    words = files.Inert()
    vars(words).update(symbols=["a", "b"], count=[2, 1])
    weights = {**content["model_weight"], **HEAD}
    return {
        "cfg": {"model": content["model_cfg"], "task": content["task_cfg"], "common": {"seed": 1}},
        "model": weights,
        "task_state": {"dictionaries": [words]},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.rand(4), "step": 7}}},
    }


def old_fairseq(encoder: Encoder) -> dict[str, Any]:
    content = to_s3prl(encoder)
    args = argparse.Namespace(**content["model_cfg"], **content["task_cfg"], arch="hubert")
    return {"args": args, "cfg": None, "model": {**content["model_weight"], **HEAD}}


def run(encoder: Encoder) -> dict[str, Any]:
    """As s3prl's run_downstream.py saves with --upstream_trainable."""
    weights = {**to_s3prl(encoder)["model_weight"], **HEAD}
    return {
        "Upstream": {f"model.{name}": tensor for name, tensor in weights.items()},
        "Downstream": {"linear.weight": torch.rand(2, 2)},
        "Args": argparse.Namespace(upstream="hubert_local", seed=1337),
        "Step": 10,
    }


def lightning(encoder: Encoder) -> dict[str, Any]:
    weights = to_s3prl(encoder)["model_weight"]
    return {
        "state_dict": {
            **{f"encoder.model.{name}": nn.Parameter(t) for name, t in weights.items()},
            "pred_head.weight": torch.rand(2, 2),
        },
        "hyper_parameters": {"config": {"model": {"encoder": {"type": "HuBERT"}}}},
        "pytorch-lightning_version": "1.8.0",
    }


def bare(encoder: Encoder) -> dict[str, Any]:
    return dict(encoder.model.state_dict())


FILES: list[tuple[str, str, Callable[[Encoder], dict[str, Any]]]] = [
    ("hubert", "converted.pt", converted),
    ("data2vec", "converted.pt", converted),
    ("wavlm", "WavLM-Base.pt", converted),
    ("hubert-large", "fairseq.pt", fairseq),
    ("hubert", "old.pt", old_fairseq),
    ("hubert", "dev-best.ckpt", run),
    ("hubert", "spin.ckpt", lightning),
    ("wavlm-large", "bare.safetensors", bare),
    ("wavlm", "bare.pth", bare),
]


def store(content: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path, metadata={"format": "pt", "by": "us"})
    else:
        files.save_torch(content, path)
    return path


def same(a: Any, b: Any) -> bool:
    """Whether two contents are equal in every type, name, order and bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, argparse.Namespace | files.Inert):
        return same(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize(("variant", "name", "make"), FILES, ids=[name for _, name, _ in FILES])
def test_files_come_back_as_they_were(
    variant: str, name: str, make: Callable[[Encoder], dict[str, Any]], tmp_path: Path
) -> None:
    encoder = load(tiny.hf_folder(tmp_path, variant, **BASE_WIDTH))
    path, again = store(make(encoder), tmp_path / name), tmp_path / f"again-{name}"
    before, found = files.load(path), container.open_container(path)
    ours = encoder.model.state_dict()
    assert all(torch.equal(found.state[key], tensor) for key, tensor in ours.items())
    assert checkpoint.read(path).family == encoder.family
    assert load(path).fingerprint() == encoder.fingerprint()

    container.write(path, found.state, again)
    assert same(files.load(again), before)
    container.write(path, {key: 2 * tensor for key, tensor in ours.items()}, again)
    doubled = container.open_container(again)
    assert all(torch.equal(doubled.state[key], 2 * tensor) for key, tensor in ours.items())
    heads = [key for key in found.slots if key not in ours]
    assert all(torch.equal(doubled.state[key], found.state[key]) for key in heads)
    container.write(again, ours, again)  # in place, though it is mapped
    assert same(files.load(again), before)
    assert not list(tmp_path.glob(".part-*"))


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    old = {"parametrizations.weight.original0": "weight_g"}
    old |= {"parametrizations.weight.original1": "weight_v"}
    for new, name in old.items():
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    return {**{f"hubert.{key}": t for key, t in state.items()}, "lm_head.weight": torch.ones(3, 3)}


@pytest.mark.parametrize("form", ["plain", "old", "sharded", "sharded bin"])
def test_folders_come_back_as_they_were(form: str, tmp_path: Path) -> None:
    folder, out = tiny.hf_folder(tmp_path), tmp_path / "out"
    (folder / "vocab.txt").write_text("a b")
    (folder / "README.md").write_text("a card of other weights")
    encoder, weights = load(folder), folder / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    if form == "old":
        weights.unlink()
        torch.save(old_names(state), folder / "pytorch_model.bin")
    elif form.startswith("sharded"):
        weights.unlink()
        suffix = "bin" if form == "sharded bin" else "safetensors"
        stem = "pytorch_model" if suffix == "bin" else "model"
        places = {name: f"{stem}-{i % 2}-of-2.{suffix}" for i, name in enumerate(state)}
        for shard in set(places.values()):
            store({k: t for k, t in state.items() if places[k] == shard}, folder / shard)
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    container.write(folder, container.open_container(folder).state, out)
    assert {path.name for path in out.iterdir()} == {
        path.name for path in folder.iterdir() if path.suffix != ".md"
    }
    for path in out.iterdir():
        if path.suffix in (".safetensors", ".bin"):
            assert same(files.load(path), files.load(folder / path.name))
        else:
            assert path.read_bytes() == (folder / path.name).read_bytes()
    assert load(out).fingerprint() == encoder.fingerprint()
    container.write(folder, {k: 2 * t for k, t in encoder.model.state_dict().items()}, out)
    written = load(out).model.state_dict()
    assert all(torch.equal(written[k], 2 * t) for k, t in encoder.model.state_dict().items())


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_tour_of_the_formats_changes_no_bit(variant: str, tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path, variant)
    here = checkpoint.read(folder)
    first = export.write(here, "hf", tmp_path / "0")
    for i, form in enumerate(["s3prl", "hf", "fairseq", "hf"]):
        path = tmp_path / (f"{i + 1}" if form == "hf" else f"{i + 1}.pt")
        here = checkpoint.read(export.write(here, form, path))
    weights = [path / "model.safetensors" for path in (first, tmp_path / "2", tmp_path / "4")]
    assert len({path.read_bytes() for path in weights}) == 1
    again = export.write(checkpoint.read(tmp_path / "3.pt"), "fairseq", tmp_path / "again.pt")
    assert again.read_bytes() == (tmp_path / "3.pt").read_bytes()
    assert load(tmp_path / "4").fingerprint() == load(folder).fingerprint()
    with pytest.raises(UserError, match="did you mean s3prl"):
        export.write(here, "s3pl", tmp_path / "x")


def test_a_tensor_keeps_its_dtype_if_that_changes_no_value(tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path)
    names = ["encoder.layer_norm.weight", "encoder.layer_norm.bias"]
    half = {name: tensor.half() for name, tensor in encoder.model.state_dict().items()}
    for suffix in (".pt", ".safetensors"):
        path, out = store(half, tmp_path / f"half{suffix}"), tmp_path / f"out{suffix}"
        assert container.open_container(path).state[names[0]].dtype == torch.float16
        new = [half[names[0]].float() + 1e-5, half[names[1]].float()]
        container.write(path, dict(zip(names, new)), out)
        again = container.open_container(out).state
        assert [again[name].dtype for name in names] == [torch.float32, torch.float16]
        assert all(torch.equal(again[name].float(), t) for name, t in zip(names, new))
        assert same({k: again[k] for k in half if k not in names},
                    {k: half[k] for k in half if k not in names})  # fmt: skip


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        store({"x": torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="x is in another shard as well"):
        container.open_container(tmp_path)


def test_what_does_not_fit_a_container(tmp_path: Path) -> None:
    path = store(to_s3prl(tiny.encoder(tmp_path)), tmp_path / "c.pt")
    out = tmp_path / "out.pt"
    for state, words in (
        ({"encoder.layers.9.x": torch.ones(1)}, "has no tensor encoder.layers.9.x"),
        ({"encoder.layer_norm.bias": torch.ones(1)}, r"encoder.layer_norm.bias is \(32,\), not"),
    ):
        with pytest.raises(UserError, match=words):
            container.write(path, state, out)
    assert not out.exists()
    content = to_s3prl(tiny.encoder(tmp_path))
    twice = {f"{side}.{k}": t for side in "ab" for k, t in content["model_weight"].items()}
    with pytest.raises(UserError, match=r"holds 2 encoders \(a\., b\.\)"):
        container.open_container(store(twice, tmp_path / "twice.pt"))
    weight = content["model_weight"]
    weight["encoder.pos_conv_embed.conv.bias"] = weight["encoder.pos_conv.0.bias"]
    with pytest.raises(UserError, match=r"are both encoder.pos_conv_embed.conv.bias"):
        container.open_container(store(content, tmp_path / "both.pt"))


CNN = [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2
SMALL: dict[str, Any] = {
    "extractor_conv_layer_config": CNN,
    "encoder_embed_dim": 768,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 16,
    "encoder_num_layers": 2,
    "encoder_num_heads": 12,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 48,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}
WAVLM = {"encoder_num_buckets": 32, "encoder_max_distance": 800}


def torchaudio_model(family: str, large: bool, head: int | None) -> nn.Module:
    made = torchaudio.models.wavlm_model if family == "wavlm" else torchaudio.models.wav2vec2_model
    options = {**SMALL, **(WAVLM if family == "wavlm" else {}), "aux_num_out": head}
    options |= {"extractor_mode": "layer_norm" if large else "group_norm"}
    model: nn.Module = made(
        **options, extractor_conv_bias=large, encoder_layer_norm_first=large
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("head", [None, 5])
def test_torchaudio(family: str, large: bool, head: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchaudio_model(family, large, head)
    path = tmp_path / "torchaudio.pth"
    torch.save(model.state_dict(), path)
    encoder = load(path, family=None if family == "wavlm" else family)
    wave = tiny.noise(8000)[0]
    with torch.inference_mode():
        ours = encoder(*audio.pad([wave])).layers
        given = F.layer_norm(wave, wave.shape) if large else wave
        theirs, _ = model.extract_features(given[None])  # type: ignore[operator]
        if large:  # theirs is without the encoder's own norm
            theirs[-1] = model.encoder.transformer.layer_norm(theirs[-1])  # type: ignore[union-attr,operator]
    assert encoder.normalize is large
    assert (ours[1:] - torch.stack(theirs)).abs().max() <= 1e-5
    state = checkpoint.read(path, family).state
    container.write(path, {k: 2 * t for k, t in state.items()}, tmp_path / "out.pth")
    again = files.load(tmp_path / "out.pth")[0]
    for name, tensor in model.state_dict().items():  # fused query, key and value included
        own = name.startswith("aux.")
        assert torch.equal(again[name], tensor if own else 2 * tensor), name


def test_published_torchaudio_names_are_known() -> None:
    """hubert_base() and wavlm_base() at full size, by name and shape alone."""
    for build, family in ((torchaudio.models.hubert_base, "hubert"),
                          (torchaudio.models.wavlm_base, "wavlm"),
                          (torchaudio.models.wav2vec2_large_lv60k, "wav2vec2")):  # fmt: skip
        with torch.device("meta"):
            theirs = build().state_dict()
            layers = build().encoder.transformer.layers
        found = slots(theirs, "test")
        state = {name: slot.take(theirs) for name, slot in found.items()}
        config = checkpoint._config(family, state, {}, "test")
        assert config["num_hidden_layers"] == len(layers)
        kind = FAMILIES[family]
        with torch.device("meta"):
            ours = Model(Config.read(config, kind, "test")).state_dict()
        ours.pop("masked_spec_embed", None)
        assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in ours.items()}


DECOAR = {"encoder_embed_dim": 32, "encoder_layers": 2, "encoder_ffn_embed_dim": 48}
DECOAR |= {"encoder_attention_heads": 4, "conv_pos": 16, "conv_pos_groups": 4}


def test_decoar_is_merged_as_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoar2 = required("s3prl.upstream.decoar2.decoar2")
    UpstreamExpert = required("s3prl.upstream.decoar2.expert").UpstreamExpert

    for name, value in DECOAR.items():
        monkeypatch.setitem(decoar2.args, name, value)
    base, tuned = (decoar2.Decoar2().state_dict() for _ in range(2))
    head = {"quantizer.weight": torch.ones(2, 2)}
    torch.save({"model": {**base, **head}, "optimizer": {"step": 3}}, tmp_path / "base.pt")
    run = {f"model.{name}": tensor for name, tensor in tuned.items()}
    torch.save({"Upstream": run, "Step": 5}, tmp_path / "dev-best.ckpt")
    ours, theirs = (
        container.open_container(tmp_path / name) for name in ("base.pt", "dev-best.ckpt")
    )
    assert ours.slots.keys() - theirs.slots.keys() == {"quantizer.weight"}
    assert "encoder.layers.1.feed_forward.output_dense.weight" in ours.slots
    assert "feature_projection.projection.weight" in ours.slots
    merged = {name: torch.lerp(ours.state[name], theirs.state[name], 0.25) for name in theirs.slots}
    container.write(tmp_path / "base.pt", merged, tmp_path / "merged.pt")
    content = torch.load(tmp_path / "merged.pt")
    assert content["optimizer"] == {"step": 3}
    assert torch.equal(content["model"]["quantizer.weight"], head["quantizer.weight"])
    expert = UpstreamExpert(tmp_path / "merged.pt").eval()  # s3prl's own: what a benchmark runs
    expected = {name: torch.lerp(base[name], tuned[name], 0.25) for name in base}
    assert same(dict(expert.model.state_dict()), expected)
    with torch.inference_mode():
        assert len(expert(tiny.noise(8000))["hidden_states"]) == 3
    with pytest.raises(UserError, match="run it as s3prl:decoar2_local:ckpt="):
        load(tmp_path / "merged.pt")


def test_no_tensor_is_read_before_it_is_used(tmp_path: Path) -> None:
    """4 GB of tensors, in a sparse file, cost next to nothing to open."""
    big, path = 1 << 28, tmp_path / "big.safetensors"
    places = [[4 * big * i, 4 * big * (i + 1)] for i in range(4)]
    header = {str(i): {"dtype": "F32", "shape": [big], "data_offsets": at}
              for i, at in enumerate(places)}  # fmt: skip
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 16 * big)
    before = resident()
    found = container.open_container(path)
    assert {tensor.shape for tensor in found.state.values()} == {(big,)}
    assert resident() - before < 100
    path.unlink()


def resident() -> float:
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6
