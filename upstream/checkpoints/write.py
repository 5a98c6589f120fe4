"""Encoders on disk: the Hugging Face folder, s3prl's converted checkpoint and fairseq's.

Back into the container that the weights came from: `upstream.checkpoints.containers.write`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upstream.base import SAMPLE_RATE
from upstream.checkpoints import FORMATS
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints.containers import WEIGHTS
from upstream.checkpoints.read import DROPOUTS, Checkpoint
from upstream.checkpoints.tensor_names import layer_normed
from upstream.checkpoints.tensor_names import to_fairseq as fairseq_name
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.encoder.config import FAMILIES, Config

if TYPE_CHECKING:
    from upstream.encoder.encoder import Encoder

EPS = 1e-5  # of every layer norm of fairseq
LEAST_KERNEL = 3  # of data2vec's positional convolutions in fairseq
CONVERTED = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")  # families that s3prl has a form of


def write(weights: Checkpoint | Encoder, form: str, output: str | Path) -> Path:
    """Write `weights` as an `hf` folder, or as a file of `s3prl` or `fairseq`. Raises UserError."""
    output = Path(output)
    if form not in FORMATS:
        raise UserError(f"no format {form!r}{near_miss(form, FORMATS)}")
    if form == "hf":
        to_folder(weights, output)
    else:
        files.save_torch((to_s3prl if form == "s3prl" else to_fairseq)(weights), output)
    return output


def to_folder(
    weights: Checkpoint | Encoder,
    folder: str | Path,
    values: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors (float32) to `folder`.

    Each file appears whole or not at all, the weights last: a folder with weights is finished.
    Other files stay. The same weights give the same bytes. `values`: the tensors one by one, if
    they are only made now and `weights` just says what they are like. Raises UserError.
    """
    weights, folder = as_checkpoint(weights), Path(folder)
    if weights.family not in FAMILIES:
        raise UserError(f"{weights.source}: transformers has no {weights.family}")
    disk.make_folder(folder)
    config = {**weights.config, "dtype": "float32", "model_type": weights.family}
    config["architectures"] = [FAMILIES[weights.family].model]
    config.pop("torch_dtype", None)  # what "dtype" was called before
    if "masked_spec_embed" not in weights.state:  # transformers makes up one for this
        config |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": weights.normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # facebook's models without CNN layer norms were trained without a mask, and say so
        "return_attention_mask": layer_normed(weights.state),
        "sampling_rate": SAMPLE_RATE,
    }
    settings = {"config.json": config, "preprocessor_config.json": preprocessor}
    with disk.whole(folder / WEIGHTS) as weights_file:
        files.save_tensors(weights.state, weights_file, {"format": "pt"}, torch.float32, values)
        for name, content in settings.items():
            disk.write(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def to_s3prl(weights: Checkpoint | Encoder) -> dict[str, Any]:
    """The encoder as `torch.save` content that s3prl's own expert of its family loads strictly.

    Float32. The tensors of pre-training heads, which s3prl's classes hold but no feature depends
    on, are zero. WavLM's is Microsoft's own form. UserError if s3prl has no such architecture.
    """
    weights = as_checkpoint(weights)
    settings, state = _settings(weights), _fairseq_state(weights)
    if weights.family == "wavlm":
        return {"cfg": {**settings, "normalize": weights.normalize}, "model": state}
    task = {"normalize": weights.normalize, "sample_rate": SAMPLE_RATE}
    # HuBERT's are "used for fine-tuning": no label embeddings
    symbols = {"dictionaries_symbols": [None]} if weights.family == "hubert" else {}
    return {"task_cfg": task, "model_cfg": settings, "model_weight": state, **symbols}


def to_fairseq(weights: Checkpoint | Encoder) -> dict[str, Any]:
    """The encoder as fairseq's checkpoint: what its loader asks for, and s3prl's converters read.

    The layout is that of `save_state` in fairseq/checkpoint_utils.py. Pre-training heads are zero;
    HuBERT has no clusters (fairseq's WavLM does not exist: the form is Microsoft's own).
    """
    weights = as_checkpoint(weights)
    if weights.family == "wavlm":
        return to_s3prl(weights)
    hubert = weights.family == "hubert"
    task_name = "hubert_pretraining" if hubert else "audio_pretraining"
    task = {"_name": task_name, "normalize": weights.normalize, "sample_rate": SAMPLE_RATE}
    labels = {"label_embs_concat": torch.zeros(0, weights.config["hidden_size"])} if hubert else {}
    trained = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}
    return {
        "cfg": {"_name": None, "model": _settings(weights), "task": task},
        "args": None,
        "model": {**_fairseq_state(weights), **labels},
        "optimizer_history": [{**trained, "num_updates": 0}],
        "extra_state": {"epoch": 1},
        "last_optimizer_state": None,
        "task_state": {"dictionaries": []} if hubert else {},
    }


def as_checkpoint(weights: Checkpoint | Encoder) -> Checkpoint:
    """What a file of these weights would hold."""
    if isinstance(weights, Checkpoint):
        return weights
    config, state = weights.config.to_dict(), weights.model.state_dict()
    return Checkpoint(weights.family, config, state, weights.normalize, weights.source)


def held_as(weights: Checkpoint, form: str) -> Checkpoint:
    """`weights` as a format holds them: where it has no place for them, the same function anew.

    s3prl and fairseq leave the projection out where CNN and model are equally wide. There the last
    convolution comes twice over, side by side, and the projection takes half of each: layer norms
    over both halves have the mean and the variance of one.
    """
    config = weights.config
    if form == "hf" or weights.family not in CONVERTED:
        return weights
    settings = Config.read(config, FAMILIES[weights.family], weights.source)
    widths = list(settings.conv_dim)
    if widths[-1] != settings.hidden_size:
        return weights
    last = f"feature_extractor.conv_layers.{len(widths) - 1}."
    state = dict(weights.state)
    for name, tensor in weights.state.items():
        if name.startswith((last, "feature_projection.layer_norm.")):
            state[name] = torch.cat([tensor, tensor])
    name = "feature_projection.projection.weight"
    half = state[name].float() / 2
    state[name] = torch.cat([half, half], dim=1)
    config = {**config, "conv_dim": [*widths[:-1], 2 * widths[-1]]}
    return weights._replace(config=config, state=state)


def _layered(weights: Checkpoint) -> bool:
    """Whether every convolution has a LayerNorm; the config tells where there is one alone."""
    config = Config.read(weights.config, FAMILIES[weights.family], weights.source)
    return config.feat_extract_norm == "layer"


def _settings(weights: Checkpoint) -> dict[str, Any]:
    """fairseq's settings of the architecture. Raises UserError if it has no such architecture."""
    if weights.family not in CONVERTED:
        raise UserError(f"{weights.source}: s3prl has no converted form of {weights.family}")
    config = Config.read(weights.config, FAMILIES[weights.family], weights.source)
    if config.conv_dim[-1] == config.hidden_size:
        raise UserError(f"{weights.source}: s3prl has no projection for equal CNN and model widths")
    kernel = config.conv_pos_kernel_size
    lost = {
        f"layer_norm_eps {config.layer_norm_eps:g} (its norms take {EPS:g})": (
            config.layer_norm_eps != EPS
        ),
        "feat_proj_layer_norm false (it always has that norm)": not config.feat_proj_layer_norm,
        f"conv_pos_kernel_size {kernel} (its least is {LEAST_KERNEL})": 0 < kernel < LEAST_KERNEL,
    }
    if faults := [fault for fault, lacking in lost.items() if lacking]:
        fault = "; ".join(faults)
        raise UserError(f"{weights.source}: s3prl and fairseq cannot hold {fault}; write it as hf")
    depth, kernel = 1, config.num_conv_pos_embeddings
    if weights.family == "data2vec-audio":  # fairseq divides the kernel by the depth
        depth, kernel = kernel, kernel * config.conv_pos_kernel_size
    convolutions = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))
    settings = {
        "_name": weights.family.replace("-", "_"),
        "extractor_mode": "layer_norm" if _layered(weights) else "default",
        "conv_feature_layers": str(convolutions),
        "conv_bias": config.conv_bias,
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": config.hidden_act,
        "layer_norm_first": config.do_stable_layer_norm,
        **{theirs: getattr(config, ours) for theirs, ours in DROPOUTS.items()},
        "encoder_layerdrop": 0.0,
        "conv_pos": kernel,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "pos_conv_depth": depth,
    }
    if weights.family == "hubert":
        settings["label_rate"] = SAMPLE_RATE / math.prod(config.conv_stride)
    if weights.family == "wavlm":
        settings |= {"relative_position_embedding": True, "gru_rel_pos": True}
        settings |= {"num_buckets": config.num_buckets, "max_distance": config.max_bucket_distance}
    return settings


def _fairseq_state(weights: Checkpoint) -> dict[str, Any]:
    """The tensors under fairseq's names, with zeros for what its classes hold besides."""
    layered = _layered(weights)
    state: dict[str, Any] = {
        fairseq_name(name, layered): _own(tensor) for name, tensor in weights.state.items()
    }
    width, cnn = weights.config["hidden_size"], weights.config["conv_dim"][-1]
    zeros: dict[str, tuple[int, ...]] = {"mask_emb": (width,)}
    if weights.family in ("hubert", "wav2vec2"):
        zeros |= {"final_proj.weight": (width, width), "final_proj.bias": (width,)}
    if weights.family == "wav2vec2":
        zeros |= {"project_q.weight": (width, cnn), "project_q.bias": (width,)}
    if weights.family == "data2vec-audio":
        state["_ema"] = {}  # s3prl deletes this entry without asking whether it is there
    return {**{name: torch.zeros(shape) for name, shape in zeros.items()}, **state}


def _own(tensor: Tensor) -> Tensor:
    """Float32 on the CPU, sharing its storage with no more than itself: torch saves storages."""
    tensor = tensor.detach().float().cpu()
    shared = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if shared else tensor
