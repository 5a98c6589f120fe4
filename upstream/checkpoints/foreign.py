"""What is named as a checkpoint and is none that is read here: what it is, and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upstream.common import disk
from upstream.common.errors import UserError

# Suffix of a file -> what it is, and the way out.
SUFFIXES = {
    ".gguf": ("a GGUF file of llama.cpp", "take the PyTorch checkpoint it was made from"),
    ".onnx": ("an ONNX graph", "take the PyTorch checkpoint it was exported from"),
    ".tflite": ("a TensorFlow Lite model", "take the PyTorch checkpoint it was made from"),
    ".h5": (
        "TensorFlow weights",
        "convert them with transformers 4: from_pretrained(FOLDER, from_tf=True), save_pretrained",
    ),
    ".msgpack": (
        "Flax weights",
        "convert them with transformers 4: from_pretrained(FOLDER, from_flax=True), "
        "save_pretrained",
    ),
    ".nemo": ("an archive of NeMo", "unpack it with tar and name the .ckpt in it"),
    ".npz": ("arrays of NumPy", "save the encoder as an HF folder or a .safetensors file"),
    ".distcp": (
        "one shard of torch.distributed.checkpoint (FSDP)",
        "join all: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER out.pt",
    ),
}
for _other, _like in ((".hdf5", ".h5"), (".keras", ".h5"), (".ckpt.index", ".h5"), (".pb", ".h5")):
    SUFFIXES[_other] = SUFFIXES[_like]
MAGIC = {b"GGUF": ".gguf", b"\x89HDF\r\n\x1a\n": ".h5"}
# Files that a trainer leaves beside weights.
BESIDE = ("optimizer", "scheduler", "scaler", "training_args", "rng_state", "trainer_state")
ADAPTER = re.compile(
    r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|ia3_l|hada_\w+|lokr_\w+"
    r"|modules_to_save|original_module)(\.|$)"
)
# Names that only quantised weights have, and who makes them.
QUANTISED = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight_format$|\.SCB$", "bitsandbytes, 8 bits"),
    (r"\.(absmax|nested_absmax|quant_map|nested_quant_map)$|quant_state", "bitsandbytes, 4 bits"),
    (r"\.weight_scale(_inv|_2)?$|\.weight_packed$|\.input_scale$", "fp8 or compressed-tensors"),
    (r"_packed_params|\.weight_fake_quant\.", "torch.ao.quantization"),
    (r"\.weight\._(data|scale|shift)$|\.weight\.(qdata|scale)$", "quanto or torchao"),
    (r"\.W_q$", "HQQ"),
)
PARAMETER = re.compile(r"(?:.*[._])?(weight|bias)(_[gv])?|.*\.original[01]")
DEQUANTIZE = (
    "take the checkpoint before quantisation, or undo it (in transformers: model.dequantize(), "
    "then save_pretrained)"
)


def require_known(path: Path) -> None:
    """Raises UserError for a file, by its name and first bytes, of a kind that is not read here."""
    name = path.name
    if re.search(r"zero_pp_rank|_optim_states\.pt$", name):
        raise UserError(f"{path}: a shard of DeepSpeed's ZeRO; {_zero(path.parent.parent)}")
    if name.startswith("adapter_model."):
        raise UserError(f"{path}: {_adapter(path.parent)}")
    if name.split(".")[0] in BESIDE:
        raise UserError(
            f"{path}: belongs to a training run, and is no weights; name the folder: {path.parent}"
        )
    suffix = next((end for end in SUFFIXES if name.lower().endswith(end)), "")
    if not suffix and path.is_file():
        with path.open("rb") as file:
            start = file.read(8)
        suffix = next((end for magic, end in MAGIC.items() if start.startswith(magic)), "")
    if suffix:
        kind, remedy = SUFFIXES[suffix]
        raise UserError(f"{path}: {kind}, which is not read here; {remedy}")


def explain_folder(folder: Path) -> str:
    """What a folder without weights that are read here is, and the way out; empty: nothing known.

    Only names are looked at, and the base's name in adapter_config.json.
    """
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return _adapter(folder)
    if any(name.startswith("global_step") for name in names) or "zero_to_fp32.py" in names:
        return f"holds shards of DeepSpeed's ZeRO; {_zero(folder)}"
    if any(name.endswith("_optim_states.pt") for name in names):
        return f"holds shards of DeepSpeed's ZeRO; {_zero(folder.parent)}"
    shards = folder if ".metadata" in names or "__0_0.distcp" in names else None
    inner = (folder / name for name in names if name.startswith("pytorch_model_fsdp"))
    if shards := shards or next((path for path in inner if path.is_dir()), None):
        join = f"dcp_to_torch {shards} {shards.with_suffix('.pt')}"
        return (
            "holds shards of torch.distributed.checkpoint (FSDP); join them: "
            f"python -m torch.distributed.checkpoint.format_utils {join}"
        )
    steps = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    if steps:
        newest = max(steps, key=lambda name: int(name.partition("-")[2]))
        listed = ", ".join(sorted(steps, key=lambda name: int(name.partition("-")[2]))[:6])
        return f"a Trainer's output; name one of its checkpoints ({listed}): {folder / newest}"
    for name in names:
        suffix = next((end for end in SUFFIXES if name.lower().endswith(end)), "")
        if suffix:
            kind, remedy = SUFFIXES[suffix]
            return f"holds {kind} ({name}), which is not read here; {remedy}"
    return ""


def require_plain_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError for quantised weights, unmerged adapters, and tensors without values."""
    for name in tensors:
        maker = next((who for mark, who in QUANTISED if re.search(mark, name)), None)
        if maker:
            raise UserError(f"{path}: quantised ({maker}: {name:.80}); {DEQUANTIZE}")
        if ADAPTER.search(name):
            raise UserError(
                f"{path}: holds an adapter that is not merged yet ({name:.80}); "
                "merge_and_unload() of peft, then save_pretrained"
            )
    for name, tensor in tensors.items():
        number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        narrow = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point  # fp8 and below
        if narrow or (not number and PARAMETER.fullmatch(name)):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: quantised ({name:.80} is {kind}); {DEQUANTIZE}")
    sizes = [tensor.numel() for name, tensor in tensors.items() if PARAMETER.fullmatch(name)]
    if sizes and not any(sizes):
        raise UserError(
            f"{path}: its tensors are empty, as ZeRO stage 3 leaves them; {_zero(path.parent)}"
        )


def explain_pickle(needs: str) -> str:
    """What a pickle is that names `needs`, and the way out; empty where keeping tensors helps."""
    if re.search("qtensor|quantiz|torchao|bitsandbytes|quanto|hqq", needs, re.IGNORECASE):
        return f"quantised (it holds {needs[:80]!r}); {DEQUANTIZE}"
    if re.search(r"distributed|DTensor|ShardedTensor|deepspeed", needs):
        return (
            f"one process's part of a sharded model (it holds {needs[:80]!r}); save the full state "
            "dict instead (torch: get_model_state_dict with full_state_dict=True, DeepSpeed: "
            "zero_to_fp32.py)"
        )
    return ""


def encoders_in(content: Mapping[str, Any], marker: re.Pattern[str]) -> dict[str, dict[str, Any]]:
    """Path of entries -> each dict of tensors in a file that holds an encoder, three deep."""
    encoders: dict[str, dict[str, Any]] = {}
    level: list[tuple[str, Mapping[str, Any]]] = [("", content)]
    for _ in range(3):
        below: list[tuple[str, Mapping[str, Any]]] = []
        for where, entries in level:
            for key, value in entries.items():
                if isinstance(key, str) and isinstance(value, dict) and value:
                    place = f"{where}.{key}" if where else key
                    if _holds(value, marker):
                        encoders[place] = value
                    else:
                        below.append((place, value))
        level = below
    return encoders


def _holds(entries: Mapping[Any, Any], marker: re.Pattern[str]) -> bool:
    names: Iterable[str] = (
        name
        for name, value in entries.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    )
    return any(marker.search(name) for name in names)


def _zero(folder: Path) -> str:
    """The way out of ZeRO's shards below `folder`."""
    script = folder / "zero_to_fp32.py"
    command = f"python {script}" if script.is_file() else "python zero_to_fp32.py"
    return f"join them with the script that DeepSpeed left beside them: {command} {folder} OUT"


def _adapter(folder: Path) -> str:
    """What a folder of peft is, and the way out."""
    base = "BASE"
    path = folder / "adapter_config.json"
    if path.is_file():
        try:
            name = json.loads(disk.read(path, 1 << 20)).get("base_model_name_or_path")
        except (ValueError, AttributeError, UserError):
            name = None
        if isinstance(name, str) and re.fullmatch(r"[\w./-]{1,200}", name):
            base = name  # nothing else of a stranger's file belongs into code to copy
    code = (
        f"from transformers import AutoModel; from peft import PeftModel; "
        f"PeftModel.from_pretrained(AutoModel.from_pretrained('{base}'), '{folder}')"
        ".merge_and_unload().save_pretrained('OUT')"
    )
    return f'an adapter of peft, no whole model; merge it with its base: python -c "{code}"'
