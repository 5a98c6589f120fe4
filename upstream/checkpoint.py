"""Checkpoints of every origin -> one canonical form under transformers' names.

Nothing here runs code from a file: pickles are read with torch's weights-only reader.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from upstream.errors import UserError
from upstream.names import KERNEL, State, canonical, layer_normed, without_pretraining

__all__ = ["Checkpoint", "State", "compare", "read"]


class Checkpoint(NamedTuple):
    """An encoder's weights under transformers' names, and what is needed to run them."""

    family: str  # transformers' model_type
    config: dict[str, Any]  # transformers' config
    state: State
    normalize: bool  # whether waveforms must have zero mean and unit variance
    source: str


# Which family a file without transformers' config.json is of: the first clue in its tensor names,
# in the name of its architecture or of the upstream it was trained as.
CLUES = [
    ("wavlm", r"gru_rel_pos_const|\bwavlm"),
    ("data2vec-audio", r"pos_conv_embed\.layers\.|\bdata2vec"),
    ("hubert", r"label_embs_concat|dictionaries_symbols|\bhubert"),
    ("wav2vec2", r"quantizer\.|project_q\.|\bwav2vec|\bxls"),
]
STRIDES = (5, 2, 2, 2, 2, 2, 2)
PUBLISHED = (768, 1024, 1280, 1920)  # widths of Base, Large, XL and XLS-R 2B


def read(path: str | Path, family: str | None = None) -> Checkpoint:
    """Read an HF folder, or a file of s3prl, fairseq, WavLM or transformers.

    `family` is asked for only where the file does not tell. Raises UserError for a file that is
    no checkpoint, is damaged, is of another architecture, or would need code to be run.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, sorted(path.glob("model*.safetensors")))
    if path.suffix in (".bin", ".safetensors") and (path.parent / "config.json").is_file():
        return _read_folder(path.parent, [path])
    content = _load(path)
    tensors, settings, clue = _open(content, path)
    state = canonical(tensors, str(path))
    clues = " ".join([clue, *content, *tensors, *state])
    family = family or next((name for name, mark in CLUES if re.search(mark, clues)), None)
    if family is None:
        raise UserError(f"{path}: does not say which model it is; add :family=hubert or wav2vec2")
    config = _config(family, state, settings, str(path))
    # fairseq's releases normalise exactly the models whose CNN has layer norms
    normalize = settings.get("normalize", layer_normed(state))
    return Checkpoint(family, config, without_pretraining(state), bool(normalize), str(path))


def _read_folder(folder: Path, files: list[Path]) -> Checkpoint:
    files = files or sorted(folder.glob("pytorch_model*.bin"))
    config = _json(folder / "config.json")
    if not files:
        raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin beside config.json")
    tensors: State = {}
    for file in files:
        tensors |= _load(file)
    state = canonical(tensors, str(folder))
    preprocessor = folder / "preprocessor_config.json"
    asked = _json(preprocessor).get("do_normalize") if preprocessor.is_file() else None
    normalize = layer_normed(state) if asked is None else bool(asked)
    family = str(config.get("model_type"))
    return Checkpoint(family, config, without_pretraining(state), normalize, str(folder))


def compare(expected: Mapping[str, tuple[int, ...]], weights: Checkpoint) -> None:
    """Raises UserError with the first differences between `weights` and the `expected` shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.state.items()}
    shapes = [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    listed = [
        f"{len(names)} tensors {kind} ({'; '.join(names[:2])}{' ...' if len(names) > 2 else ''})"
        for kind, names in faults.items()
        if names
    ]
    if listed:
        raise UserError(f"{weights.source}: is not this {weights.family}: {', '.join(listed)}")


class _Inert:
    """Stands in for fairseq's Dictionary, which HuBERT files carry along. Does nothing."""


def _load(path: Path) -> dict[str, Any]:
    """The content of one file. Only tensors, plain containers and argparse.Namespace are made."""
    allowed = [argparse.Namespace, (_Inert, "fairseq.data.dictionary.Dictionary")]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged file fails in any way; all mean the same to the user
        if needs := re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) (\S+)", str(error)):
            raise UserError(_way_out(path, needs[1])) from error
        raise UserError(f"{path}: not a checkpoint, or a truncated one; copy it again") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: not a checkpoint: holds a {type(content).__name__}")
    return content


def _way_out(path: Path, needs: str) -> str:
    return (
        f"{path}: would have to run code ({needs}) and is not opened. If you trust it, keep its "
        f"tensors only: python -c \"import torch, safetensors.torch as s; c = torch.load('{path}', "
        "'cpu', weights_only=False); w = c.get('model_weight') or c.get('model') or "
        "c.get('Upstream') or c; s.save_file({k: v.clone() for k, v in w.items() if "
        f"torch.is_tensor(v)}}, '{path.with_suffix('.safetensors')}')\""
    )


def _open(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A file's content -> (tensors, flat settings, a hint at the architecture)."""
    settings: dict[str, Any] = {}
    tensors: Any = content
    run = _plain(content.get("Args"))
    if "model_weight" in content:  # s3prl-converted
        tensors = content["model_weight"]
        settings = {**_plain(content.get("task_cfg")), **_plain(content.get("model_cfg"))}
    elif "Upstream" in content:  # a run of s3prl's run_downstream.py: holds no architecture
        tensors = content["Upstream"]
    elif isinstance(content.get("model"), dict):  # fairseq (nested cfg, or old flat args) and WavLM
        tensors = content["model"]
        cfg = _plain(content.get("cfg")) or _plain(content.get("args"))
        settings = {**cfg, **_plain(cfg.get("task")), **_plain(cfg.get("model"))}
    if inner := _plain(settings.get("w2v_args")):  # fine-tuned with CTC: the encoder's own settings
        settings = {**inner, **_plain(inner.get("task")), **_plain(inner.get("model"))}
    if not any(isinstance(value, Tensor) for value in _plain(tensors).values()):
        raise UserError(f"{path}: no weights in it; its entries are {', '.join(list(content)[:6])}")
    names = (settings.get("_name"), settings.get("arch"), run.get("upstream"))
    return tensors, settings, " ".join(str(name) for name in names)


def _plain(value: Any) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _config(family: str, state: State, settings: dict[str, Any], source: str) -> dict[str, Any]:
    """transformers' config: sizes from the tensors, the rest from fairseq's settings.

    Where a file has no settings (an s3prl run, bare weights), the conventions of all published
    models hold: strides 5,2,2,2,2,2,2, heads of 64, pre-norm exactly for CNNs with layer norms
    (data2vec: never). They are not trusted for a width that no published model has.
    """
    cnn, encoder = "feature_extractor.conv_layers.{}.conv.weight", "encoder.layers.{}."
    try:
        convs = [state[cnn.format(i)] for i in range(_count(state, cnn))]
        dim = len(state["feature_projection.projection.bias"])
        inner = len(state[f"{encoder.format(0)}feed_forward.intermediate_dense.bias"])
        position = state.get(f"{KERNEL}1", state.get("encoder.pos_conv_embed.layers.0.conv.weight"))
        if position is None:
            raise KeyError(f"{KERNEL}1")
        if family == "wavlm":
            buckets, heads = state["encoder.layers.0.attention.rel_attn_embed.weight"].shape
    except KeyError as error:
        raise UserError(f"{source}: not a {family} encoder: no tensor {error.args[0]}") from error
    if not settings and dim not in PUBLISHED:
        raise UserError(
            f"{source}: holds no architecture; save the encoder as an HF folder instead"
        )
    layered = layer_normed(state)
    kernels = [conv.shape[2] for conv in convs]
    strides = list(STRIDES[: len(convs)])
    if "conv_feature_layers" in settings:
        strides = [row[2] for row in _conv_layers(settings["conv_feature_layers"], source)]
    if settings.get("activation_fn", "gelu") != "gelu":
        raise UserError(f"{source}: activation {settings['activation_fn']} is not supported (gelu)")
    config: dict[str, Any] = {
        "conv_dim": [conv.shape[0] for conv in convs],
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": cnn.format(0).replace("weight", "bias") in state,
        "hidden_size": dim,
        "intermediate_size": inner,
        "num_hidden_layers": _count(state, encoder + "final_layer_norm.weight"),
        "num_attention_heads": int(settings.get("encoder_attention_heads", max(1, dim // 64))),
        "num_conv_pos_embedding_groups": dim // position.shape[1],
    }
    if family == "data2vec-audio":
        depth = _count(state, "encoder.pos_conv_embed.layers.{}.conv.weight")
        config |= {"num_conv_pos_embeddings": depth, "conv_pos_kernel_size": position.shape[2]}
    else:
        config |= {
            "num_conv_pos_embeddings": position.shape[2],
            "feat_extract_norm": "layer" if layered else "group",
            "do_stable_layer_norm": bool(settings.get("layer_norm_first", layered)),
        }
    if family == "wavlm":
        config |= {"num_buckets": buckets, "num_attention_heads": heads}
        config["max_bucket_distance"] = int(settings.get("max_distance", 800))
    return config | {new: settings[old] for old, new in DROPOUTS.items() if old in settings}


DROPOUTS = {
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "feat_proj_dropout",
}


def _count(state: State, template: str) -> int:
    """How many consecutive tensors `template` has, from 0."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    return 1 + max((int(m[1]) for name in state if (m := pattern.match(name))), default=-1)


def _conv_layers(text: Any, source: str) -> list[tuple[int, int, int]]:
    """fairseq's `[(512,10,5)] + [(512,3,2)] * 4`, read without evaluating it."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return value(node.left) * int(ast.literal_eval(node.right))
        return ast.literal_eval(node)

    try:
        return [
            (int(c), int(k), int(s)) for c, k, s in value(ast.parse(str(text), mode="eval").body)
        ]
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"{source}: cannot read conv_feature_layers {text!r}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: not there; a model folder holds config.json and weights"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return dict(content)
