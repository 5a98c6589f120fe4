"""Checkpoints of every origin give one encoder; broken and dangerous ones give one line."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch

from upstream.checkpoints import read as checkpoint
from upstream.checkpoints import tensor_names as names
from upstream.checkpoints.tensor_names import module_of, place_of, slots, to_fairseq
from upstream.checkpoints.write import to_s3prl
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder, load

BASE_WIDTH = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def complaint(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_s3prl_and_back(variant: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path, variant)
    again = load(write(tmp_path / "converted.pt", to_s3prl(encoder)))
    assert (again.family, again.normalize) == (encoder.family, encoder.normalize)
    assert again.fingerprint() == encoder.fingerprint()
    for dropout in ("hidden_dropout", "attention_dropout", "activation_dropout"):
        assert getattr(again.config, dropout) == getattr(encoder.config, dropout)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_names_map_to_and_fro(variant: str, tmp_path: Path) -> None:
    state = tiny.encoder(tmp_path, variant).model.state_dict()
    layered = names.layer_normed(state)
    theirs = {to_fairseq(name, layered): tensor for name, tensor in state.items()}
    assert len(theirs) == len(state)
    assert list(slots(theirs, "test")) == list(state)
    kept = {name for name in state if to_fairseq(name, layered) == name}
    same = ("encoder.layer_norm.", ".final_layer_norm.")
    assert kept == {name for name in state if any(part in name for part in same)}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("layer_norm.weight", "feature_projection.layer_norm.weight"),
        ("post_extract_proj.bias", "feature_projection.projection.bias"),
        ("mask_emb", "masked_spec_embed"),
        ("feature_extractor.conv_layers.3.0.weight", "feature_extractor.conv_layers.3.conv.weight"),
        (
            "encoder.layers.11.self_attn.out_proj.bias",
            "encoder.layers.11.attention.out_proj.bias",
        ),
        ("encoder.layers.2.self_attn_layer_norm.bias", "encoder.layers.2.layer_norm.bias"),
        (
            "encoder.layers.0.self_attn.relative_attention_bias.weight",
            "encoder.layers.0.attention.rel_attn_embed.weight",
        ),
        ("encoder.layers.5.self_attn.grep_a", "encoder.layers.5.attention.gru_rel_pos_const"),
        ("encoder.pos_conv.4.0.weight", "encoder.pos_conv_embed.layers.4.conv.weight"),
        (
            "encoder.pos_conv.0.weight_g",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        ),
    ],
)
def test_golden_names(theirs: str, ours: str) -> None:
    marker = {"feature_extractor.conv_layers.0.0.weight": 0}
    assert list(slots({**marker, theirs: 1}, "test"))[1] == ours
    assert to_fairseq(ours, layered=True) == theirs


def test_modules(tmp_path: Path) -> None:
    state = tiny.encoder(tmp_path, "wavlm").model.state_dict()
    layers = ["layer 1", "layer 2", "layer 3"]
    parts = {"cnn", "projection", "pos_conv", "norm", "other", *layers}
    assert {module_of(name) for name in state} == parts
    assert [name for name in state if module_of(name) == "other"] == ["masked_spec_embed"]
    assert {place_of(name).layer for name in state} == {None, 1, 2, 3}
    assert module_of("encoder.layers.0.attention.rel_attn_embed.weight") == "layer 1"
    assert module_of("encoder.layer_norm.weight") == "norm"
    assert module_of("feature_projection.layer_norm.bias") == "projection"


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        ("feature_extractor.conv_layers.0.conv.weight", "cnn", "conv"),
        ("feature_extractor.conv_layers.0.layer_norm.bias", "cnn", "layer_norm"),
        ("feature_projection.projection.weight", "projection", "projection"),
        ("feature_projection.layer_norm.weight", "projection", "layer_norm"),
        ("encoder.pos_conv_embed.layers.4.conv.bias", "pos_conv", "pos_conv"),
        ("encoder.layers.11.attention.gru_rel_pos_const", "layer 12", "attention"),
        ("encoder.layers.0.feed_forward.output_dense.bias", "layer 1", "ffn"),
        ("encoder.layers.0.layer_norm.bias", "layer 1", "layer_norm"),
        ("encoder.layers.0.final_layer_norm.bias", "layer 1", "layer_norm"),
        ("encoder.layer_norm.weight", "norm", "layer_norm"),
        ("final_proj.weight", "head", "head"),
        ("quantizer.codevectors", "head", "head"),
        ("masked_spec_embed", "other", "other"),
    ],
)
def test_places(name: str, module: str, part: str) -> None:
    place = place_of(name)
    assert (place.module, place.part) == (module, part)
    depth = int(module.split()[1]) if module.startswith("layer ") else None
    assert place.layer == depth


def fairseq(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Weights with the pre-training tensors of the original, its model and its task settings."""
    content = to_s3prl(encoder)
    extra = {"final_proj.weight": torch.zeros(3, 3), "label_embs_concat": torch.zeros(5, 3)}
    return {**content["model_weight"], **extra}, content["model_cfg"], content["task_cfg"]


def test_fairseq_originals(tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path, "hubert-large")
    weights, model, task = fairseq(encoder)
    inner = {"w2v_args": {"model": model, "task": task}, "_name": "hubert_ctc", "normalize": False}
    tuned = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in weights.items()}
    tuned["w2v_encoder.proj.weight"] = torch.zeros(4, 4)
    flat = argparse.Namespace(**model, **task, arch="hubert")
    for content in (
        {"model": weights, "cfg": {"model": model, "task": task}, "optimizer_history": []},
        {"model": weights, "args": flat, "cfg": None},
        {"model": tuned, "cfg": {"model": inner, "task": {"normalize": False}}},
    ):
        again = load(write(tmp_path / "fairseq.pt", content))
        assert (again.family, again.normalize, again.stable) == ("hubert", True, True)
        assert again.fingerprint() == encoder.fingerprint()


def test_an_s3prl_run_follows_the_conventions_of_published_models(tmp_path: Path) -> None:
    encoder = load(tiny.hf_folder(tmp_path, "hubert", **BASE_WIDTH))
    upstream = {f"model.{name}": tensor for name, tensor in fairseq(encoder)[0].items()}
    content = {"Upstream": upstream, "Args": argparse.Namespace(upstream="hubert_local"), "Step": 1}
    again = load(write(tmp_path / "dev-best.ckpt", content))
    assert again.fingerprint() == encoder.fingerprint()
    small = tiny.encoder(tmp_path / "small", "hubert")
    content["Upstream"] = {f"model.{k}": v for k, v in fairseq(small)[0].items()}
    assert "no architecture" in complaint(write(tmp_path / "small.ckpt", content))


def test_bare_weights_need_a_family_only_if_nothing_tells(tmp_path: Path) -> None:
    for variant, told in (("wav2vec2", False), ("wavlm", True), ("data2vec", True)):
        encoder = load(tiny.hf_folder(tmp_path, variant, **BASE_WIDTH))
        path = tmp_path / f"{variant}.safetensors"
        safetensors.torch.save_file(encoder.model.state_dict(), path)
        if not told:
            assert "family=" in complaint(path)
        again = load(path, family=None if told else encoder.family)
        assert again.family == encoder.family
        assert again.fingerprint() == encoder.fingerprint()


def test_transformers_files_old_and_new(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path, "wav2vec2")
    encoder = load(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    old = {
        f"wav2vec2.{name}".replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    heads = {"lm_head.weight": torch.zeros(3, 3), "quantizer.codevectors": torch.zeros(1, 4, 2)}
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", {**old, **heads})
    assert load(folder).fingerprint() == encoder.fingerprint()
    (folder / "pytorch_model.bin").unlink()
    half = len(state) // 2  # sharded
    for i, part in enumerate((list(state.items())[:half], list(state.items())[half:])):
        safetensors.torch.save_file(dict(part), folder / f"model-0000{i}-of-00002.safetensors")
    assert "there is no index" in complaint(folder)
    index = folder / "model.safetensors.index.json"
    shards = {name: f"model-0000{i * 2 // len(state)}-of-00002.safetensors"
              for i, name in enumerate(state)}  # fmt: skip
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert load(folder).fingerprint() == encoder.fingerprint()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "elsewhere")
    assert "names 'model-00001-of-00002.safetensors', which is not there" in complaint(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    assert "names '../elsewhere', which is not there" in complaint(folder)
    index.write_text("[]")
    assert "not an object" in complaint(folder)


def test_without_a_preprocessor_the_cnn_decides(tmp_path: Path) -> None:
    for variant, normalize in (("hubert", False), ("hubert-large", True), ("data2vec", True)):
        folder = tiny.hf_folder(tmp_path, variant)
        (folder / "preprocessor_config.json").unlink()
        assert load(folder).normalize is normalize


class Harmful:
    """Leaves a mark if anybody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_no_code_of_a_file_is_run(suffix: str, tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    content = {**to_s3prl(tiny.encoder(tmp_path)), "epoch": Harmful(mark)}
    message = complaint(write(tmp_path / f"zip{suffix}", content))
    assert "would have to run code" in message
    assert "weights_only=False" in message  # the way out, for a file that the user trusts
    plain = tmp_path / f"plain{suffix}"
    plain.write_bytes(pickle.dumps(content, protocol=2))
    complaint(plain)
    assert not mark.exists()
    torch.load(tmp_path / f"zip{suffix}", weights_only=False)
    assert mark.exists()  # it would have


def test_a_config_names_no_code(tmp_path: Path) -> None:
    """`file.py:Name` is the user's to write where a registered name may stand, not a file's."""
    folder, mark = tiny.hf_folder(tmp_path), tmp_path / "harm"
    (folder / "mine.py").write_text(f"import pathlib\nF = pathlib.Path({str(mark)!r}).touch()\n")
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"] = f"{folder / 'mine.py'}:F"
    (folder / "config.json").write_text(json.dumps(settings))
    assert "unknown family" in complaint(folder)
    assert not mark.exists()


def test_settings_are_read_and_not_evaluated(tmp_path: Path) -> None:
    content, mark = to_s3prl(tiny.encoder(tmp_path)), tmp_path / "harm"
    content["model_cfg"]["conv_feature_layers"] = f"[__import__('pathlib').Path('{mark}').touch()]"
    assert "conv_feature_layers" in complaint(write(tmp_path / "c.pt", content))
    assert not mark.exists()
    layers = checkpoint._conv_layers("[(512,10,5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2", "test")
    assert layers == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


def test_fairseqs_dictionaries_do_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("fairseq.data.dictionary")
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.data", types.ModuleType("fairseq.data"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    encoder = tiny.encoder(tmp_path)
    weights, model, task = fairseq(encoder)
    words = module.Dictionary()  # type: ignore[attr-defined]
    words.symbols = ["a", "b"]
    content = {"model": weights, "cfg": {"model": model, "task": task}}
    path = write(tmp_path / "hubert.pt", {**content, "task_state": {"dictionaries": [words]}})
    monkeypatch.undo()
    assert load(path).fingerprint() == encoder.fingerprint()


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path)
    first = "encoder.layers.0.fc1.weight"
    path = tmp_path / "c.pt"

    def altered(**changes: Any) -> str:
        content = to_s3prl(encoder)
        for name, tensor in changes.items():
            content["model_weight"][name] = tensor
        content["model_weight"] = {
            k: v for k, v in content["model_weight"].items() if v is not None
        }
        return complaint(write(path, content))

    inner = "encoder.layers.0.feed_forward.intermediate_dense.weight"
    assert f"1 tensors missing ({inner})" in altered(**{first: None})
    assert "is (2, 2) instead of (48, 32)" in altered(**{first: torch.zeros(2, 2)})
    assert "1 tensors unexpected (encoder.adapter.x)" in altered(
        **{"encoder.adapter.x": torch.zeros(1)}
    )
    for value in (float("nan"), float("inf")):
        assert f"{inner} holds NaN or inf" in altered(**{first: torch.full((48, 32), value)})


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    good = write(tmp_path / "good.pt", to_s3prl(tiny.encoder(tmp_path))).read_bytes()
    path = tmp_path / "bad.pt"
    for content in (b"", b"hello", good[: len(good) // 2], good[:100]):
        path.write_bytes(content)
        assert "not a checkpoint" in complaint(path)
    (tmp_path / "bad.safetensors").write_bytes(good)
    assert "not a checkpoint" in complaint(tmp_path / "bad.safetensors")
    assert "holds a list" in complaint(write(path, [1, 2]))
    assert "no weights" in complaint(write(path, {"step": 1, "loss": 2.0}))
    assert "no weights" in complaint(write(path, {"model_weight": [1]}))
    assert "not a HuBERT" in complaint(write(path, {"bert.embeddings.weight": torch.zeros(2)}))
    assert "no such file" in complaint(tmp_path / "missing.pt")


def test_folders_of_something_else(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())

    def with_config(**changes: Any) -> str:
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))
        return complaint(folder)

    assert "did you mean hubert?" in with_config(model_type="hubrt")
    assert "conv_pos_batch_norm is not supported" in with_config(conv_pos_batch_norm=True)
    assert "config does not fit" in with_config(num_attention_heads=5)
    assert "tensors missing" in with_config(num_hidden_layers=4)
    assert "unexpected" in with_config(num_hidden_layers=2)
    deep = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    digits = b'{"hidden_size": ' + b"9" * 5_000 + b"}"
    for text in (b"{", b"[]", b"\xff\xfe\x00", b'{"a": "\xe9"}', deep, digits):
        (folder / "config.json").write_bytes(text)
        assert "not JSON" in complaint(folder)
    (folder / "config.json").unlink()
    assert "config.json" in complaint(folder)
