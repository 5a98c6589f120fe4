"""Checkpoints as training leaves them: wrapped, folded, below other keys, without their heads.

And what is no checkpoint that can be read: each is called what it is, with the way out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from torch import Tensor, nn

from upstream.audio import pad
from upstream.checkpoints import containers as container
from upstream.checkpoints.tensor_names import KERNEL, MASK
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder, load

State = dict[str, Tensor]
POSITIONS = "encoder.pos_conv_embed.conv"


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "_orig_mod."),
        ("", "module._orig_mod.hubert."),
        ("encoder.layers.", "encoder._orig_mod.layers."),
        (".attention.", "._checkpoint_wrapped_module.attention."),
        (".attention.", ".attention._fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("feature_extractor.", "_forward_module.module.feature_extractor."),
        ("feature_extractor.", "feature_extractor.module."),
    ],
)
def test_names_with_wrappers(old: str, new: str, tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    fingerprint = load(folder).fingerprint()

    def wrap(state: State) -> State:
        return {n.replace(old, new) if old else new + n: t for n, t in state.items()}

    tiny.rewrite(folder, wrap)
    assert load(folder).fingerprint() == fingerprint
    container.write(folder, container.open_container(folder).state, tmp_path / "again")
    again, before = (container.open_container(at).tensors for at in (tmp_path / "again", folder))
    assert list(again) == list(before), "stored names stay"


def test_real_wrappers(tmp_path: Path) -> None:
    """torch.compile, DataParallel and checkpointing of activations as torch applies them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    folder = tiny.hf_folder(tmp_path)
    fingerprint = load(folder).fingerprint()
    model: Any = tiny.model("hubert")
    model.encoder.layers = nn.ModuleList(checkpoint_wrapper(e) for e in model.encoder.layers)
    compiled = torch.compile(nn.DataParallel(model))
    tiny.rewrite(folder, lambda _: compiled.state_dict())
    assert any("_orig_mod.module." in name for name in container.open_container(folder).tensors)
    assert load(folder).fingerprint() == fingerprint


@pytest.mark.parametrize("half", [False, True])
def test_folded_weight_norm(half: bool, tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    encoder = load(folder)
    model: Any = tiny.model("hubert")
    nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    tiny.rewrite(
        folder, lambda _: {n: t.half() if half else t for n, t in model.state_dict().items()}
    )
    folded = load(folder)
    wave = pad(tiny.noise(4000))
    with torch.inference_mode():
        gap = (folded(*wave).layers - encoder(*wave).layers).abs().max()
    assert gap < (0.1 if half else 1e-4)
    # merged back into the folded file: a plain kernel again, and unchanged where nothing moved
    container.write(folder, container.open_container(folder).state, tmp_path / "same")
    kernel = container.open_container(folder).tensors[f"{POSITIONS}.weight"]
    assert torch.equal(container.open_container(tmp_path / "same").tensors[f"{POSITIONS}.weight"],
                       kernel)  # fmt: skip
    gain = folded.model.state_dict()[f"{KERNEL}0"]
    container.write(folder, {f"{KERNEL}0": 2 * gain}, tmp_path / "louder")
    louder = container.open_container(tmp_path / "louder").tensors[f"{POSITIONS}.weight"]
    assert torch.allclose(louder.float(), 2 * kernel.float(), rtol=1e-5 if not half else 1e-3)


ENTRIES: list[Callable[[State], dict[str, Any]]] = [
    lambda state: {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {"state": {}}},
    lambda state: {"module": state, "global_steps": 5},  # DeepSpeed
    lambda state: {"net": {"encoder": state}, "loss": 0.1},
    lambda state: {"state": {"model": {"weights": state}}},
    lambda state: {"model": {"speech": state, "lr": 1.0}},
]


@pytest.mark.parametrize("make", ENTRIES)
def test_weights_below_other_entries(
    make: Callable[[State], dict[str, Any]], tmp_path: Path
) -> None:
    encoder = load(tiny.hf_folder(tmp_path, hidden_size=768, num_attention_heads=12))
    state = dict(encoder.model.state_dict())
    path = tmp_path / "trained.pt"
    torch.save(make(state), path)
    assert load(path, family="hubert").fingerprint() == encoder.fingerprint()
    torch.save({"student": state, "teacher": copy.deepcopy(state)}, path)
    assert "holds several encoders (entries 'student', 'teacher')" in refused(path)


NEEDLESS = ["lm_head.weight", "final_proj.weight", "label_embs_concat", "quantizer.codevectors",
            "project_hid.weight", "classifier.bias", "speaker_proj.weight"]  # fmt: skip


@pytest.mark.parametrize("variant", ["hubert", "wav2vec2", "wavlm", "data2vec"])
def test_what_no_forward_needs(variant: str, tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path, variant)
    tiny.rewrite(folder, lambda state: {n: t for n, t in state.items() if n != MASK})
    bare = load(folder).fingerprint()
    heads = {name: torch.ones(3) for name in NEEDLESS}
    tiny.rewrite(folder, lambda state: {**state, **heads})
    assert load(folder).fingerprint() == bare
    for mask in (torch.full((32,), float("nan")), torch.ones(32, dtype=torch.int64)):
        tiny.rewrite(folder, lambda state, mask=mask: {**state, MASK: mask})  # type: ignore[misc]
        assert load(folder).fingerprint() == bare, "an embedding that is none is left out"


def test_the_embedding_of_masked_frames_under_its_other_name(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    fingerprint = load(folder).fingerprint()
    tiny.rewrite(folder, lambda state: {**state, "mask_time_emb_vector": torch.ones(32)})
    assert load(folder).fingerprint() == fingerprint, "under both: transformers' own name counts"
    swap = {MASK: "mask_time_emb_vector"}
    tiny.rewrite(
        folder, lambda s: {swap.get(n, n): t for n, t in s.items() if n not in swap.values()}
    )
    assert load(folder).fingerprint() == fingerprint


@pytest.mark.parametrize("name", ["UniSpeech", "UniSpeechSat"])
@pytest.mark.parametrize("large", [False, True])
def test_unispeech(name: str, large: bool, tmp_path: Path) -> None:
    """Their encoders and their pre-training models give transformers' own hidden states."""
    _, settings = tiny.config("wav2vec2-large" if large else "wav2vec2")
    wave = tiny.noise(6400)[0]
    for kind in ("Model", "ForPreTraining"):
        build = getattr(transformers, f"{name}{kind}")
        torch.manual_seed(0)
        model = build(build.config_class(**settings, codevector_dim=16, proj_codevector_dim=16))
        model.eval().save_pretrained(tmp_path / kind)
        encoder = load(tmp_path / kind, normalize=False)
        body = model if kind == "Model" else getattr(model, model.base_model_prefix)
        with torch.inference_mode():
            output = body(wave[None], output_hidden_states=True)
            ours = encoder(*pad([wave])).layers
        theirs = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])
        assert (ours - theirs).abs().max() < 1e-4
        encoder.save(tmp_path / "saved")
        assert load(tmp_path / "saved").fingerprint() == encoder.fingerprint()


def quantised() -> list[tuple[str, Callable[[State], State]]]:
    name = "encoder.layers.0.attention.k_proj"

    def with_(**changes: Tensor) -> Callable[[State], State]:
        return lambda s: (
            {n: t for n, t in s.items() if n != f"{name}.weight"}
            | {f"{name}.{key.replace('__', '.')}": value for key, value in changes.items()}
        )

    whole = torch.ones(32, 32, dtype=torch.int8)
    narrow = torch.ones(32, 32).to(torch.float8_e4m3fn)
    return [
        ("int8", lambda s: {n: t.to(torch.int8) if t.dim() == 2 else t for n, t in s.items()}),
        ("int32", lambda s: {n: t.to(torch.int32) for n, t in s.items()}),
        ("bitsandbytes, 8 bits", with_(weight=whole, SCB=torch.ones(32))),
        ("bitsandbytes, 4 bits", with_(weight=whole.view(torch.uint8),
                                       weight__absmax=torch.ones(16))),
        ("GPTQ or AWQ", with_(qweight=whole.int(), qzeros=whole.int(), scales=torch.ones(32))),
        ("float8_e4m3fn", with_(weight=narrow)),
        ("fp8", with_(weight=narrow, weight_scale_inv=torch.ones(1))),
        ("quanto or torchao", with_(weight___data=whole, weight___scale=torch.ones(32))),
        ("HQQ", with_(W_q=whole.view(torch.uint8))),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), quantised(), ids=[k for k, _ in quantised()])
def test_quantised_weights_are_no_numbers(
    kind: str, change: Callable[[State], State], tmp_path: Path
) -> None:
    folder = tiny.hf_folder(tmp_path)
    tiny.rewrite(folder, change)
    message = refused(folder)
    assert "quantised" in message
    assert kind in message
    assert "dequantize()" in message
    with pytest.raises(UserError, match="quantised"):  # as files that are merged as they are
        container.open_container(folder)


def test_torchs_own_quantisation(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny.model("hubert"), {nn.Linear})
    torch.save(model.state_dict(), tmp_path / "dynamic.pt")
    assert "quantised" in refused(tmp_path / "dynamic.pt")
    folder = tiny.hf_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert "quantization_config" in refused(folder)


def empty_file(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\x80" * 10)
        return folder

    return make


def trainer(folder: Path) -> Path:
    for step in (500, 1500, 1000):
        model = tiny.hf_folder(folder / "made", seed=step)
        model.rename(folder / f"checkpoint-{step}")
    (folder / "made").rmdir()
    (folder / "trainer_state.json").write_text("{}")
    return folder


FOREIGN: list[tuple[Callable[[Path], Path], str]] = [
    (trainer, "checkpoint-500, checkpoint-1000, checkpoint-1500\\): "),
    (empty_file("global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py", "config.json"),
     "ZeRO; join them with .* python .*/zero_to_fp32.py"),
    (empty_file("a/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "no model.safetensors"),
    (empty_file("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"),
     "format_utils dcp_to_torch .*pytorch_model_fsdp_0 "),
    (empty_file(".metadata", "__0_0.distcp"), "FSDP"),
    (empty_file("model.gguf"), "GGUF"),
    (empty_file("model.onnx", "config.json"), "an ONNX graph"),
    (empty_file("tf_model.h5", "config.json"), "TensorFlow weights .*from_tf"),
    (empty_file("flax_model.msgpack"), "Flax"),
    (empty_file("notes.txt"), "no model.safetensors or pytorch_model.bin"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), FOREIGN)
def test_folders_that_are_no_model(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=words):
        load(make(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "GGUF"),
        ("renamed.bin", "GGUF"),
        ("graph.onnx", "ONNX"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("stt.nemo", "NeMo"),
        ("__0_0.distcp", "FSDP"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "ZeRO"),
        ("adapter_model.safetensors", "peft"),
        ("optimizer.pt", "belongs to a training run"),
        ("training_args.bin", "belongs to a training run"),
    ],
)
def test_files_that_are_no_checkpoint(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00 and more")
    assert words in refused(tmp_path / name)


def test_adapters(tmp_path: Path) -> None:
    """As peft names them: an adapter alone, and a whole model with the adapter still in it."""
    folder, inner = tiny.hf_folder(tmp_path), "encoder.layers.0.attention.q_proj"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    pair = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    names = {f"base_model.model.{inner}.{key}.weight": t for key, t in pair.items()}
    safetensors.torch.save_file(names, adapter / "adapter_model.safetensors")
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps({"base_model_name_or_path": str(folder), "r": 2}))
    message = refused(adapter)
    assert "an adapter of peft" in message
    assert f"from_pretrained('{folder}')" in message
    assert "merge_and_unload()" in message
    settings.write_text(json.dumps({"base_model_name_or_path": "x'); import os; ('"}))
    assert "import os" not in refused(adapter), "nobody's code to copy"
    (adapter / "adapter_model.safetensors").rename(adapter / "lora.safetensors")
    assert "not merged yet" in refused(adapter / "lora.safetensors")

    def whole(state: State) -> State:
        layer = {f"{inner}.base_layer.weight": state.pop(f"{inner}.weight")}
        layer |= {f"{inner}.{key}.default.weight": t for key, t in pair.items()}
        return {f"base_model.model.{name}": t for name, t in {**state, **layer}.items()}

    tiny.rewrite(folder, whole)
    assert "not merged yet" in refused(folder)


def test_zero_stage_3_leaves_empty_tensors(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    tiny.rewrite(folder, lambda state: {name: torch.empty(0) for name in state})
    assert "ZeRO stage 3" in refused(folder)


def test_merged_encoders_are_alike(tmp_path: Path) -> None:
    """An encoder that was read through any of these is an Encoder like others."""
    folder = tiny.hf_folder(tmp_path)
    tiny.rewrite(folder, lambda state: {f"_orig_mod.{name}": t for name, t in state.items()})
    assert isinstance(load(folder), Encoder)
