"""Encoders on disk: the Hugging Face folder and s3prl's converted checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from upstream.errors import UserError
from upstream.names import to_fairseq

if TYPE_CHECKING:
    from upstream.encoders import Encoder

WEIGHTS = "model.safetensors"


def to_folder(encoder: Encoder, folder: str | Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors (float32) to `folder`.

    All are written beside it first and moved in one by one, the weights last: a folder with
    weights is a finished one. Other files in an existing folder stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**encoder.config.to_dict(), "architectures": [type(encoder.model).__name__]}
    # facebook's models without CNN layer norms were trained without a mask, and say so
    layered = getattr(encoder.config, "feat_extract_norm", "layer") == "layer"
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": encoder.normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": layered,
        "sampling_rate": encoder.sample_rate,
    }
    state = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in encoder.model.state_dict().items()
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        for name, content in {
            "config.json": config,
            "preprocessor_config.json": preprocessor,
        }.items():
            Path(part, name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        safetensors.torch.save_file(state, Path(part, WEIGHTS), metadata={"format": "pt"})
        for name in ("config.json", "preprocessor_config.json", WEIGHTS):
            os.replace(Path(part, name), folder / name)


def to_s3prl(encoder: Encoder) -> dict[str, Any]:
    """The encoder as `torch.save` content that s3prl's own expert of its family loads strictly.

    Tensors of pre-training heads, which s3prl's classes hold but no feature depends on, are zero.
    Raises UserError if s3prl has no such architecture.
    """
    config = encoder.config
    layered = getattr(config, "feat_extract_norm", "layer") == "layer"
    if config.conv_dim[-1] == config.hidden_size:
        raise UserError(f"{encoder.source}: s3prl has no projection for equal CNN and model widths")
    depth, kernel = 1, config.num_conv_pos_embeddings
    if encoder.family == "data2vec-audio":
        depth = config.num_conv_pos_embeddings
        kernel = depth * config.conv_pos_kernel_size  # fairseq divides this by the depth
    settings = {
        "extractor_mode": "layer_norm" if layered else "default",
        "conv_feature_layers": str(
            list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))
        ),
        "conv_bias": config.conv_bias,
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": config.hidden_act,
        "layer_norm_first": encoder.stable,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "dropout_input": config.feat_proj_dropout,
        "encoder_layerdrop": 0.0,
        "conv_pos": kernel,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
    }
    weight: dict[str, Any] = {
        to_fairseq(name, layered): tensor.detach().float().cpu().clone()
        for name, tensor in encoder.model.state_dict().items()
    }
    width, cnn = config.hidden_size, config.conv_dim[-1]
    weight.setdefault("mask_emb", torch.zeros(width))
    if encoder.family == "wavlm":
        relative = {"relative_position_embedding": True, "gru_rel_pos": True}
        buckets = {"num_buckets": config.num_buckets, "max_distance": config.max_bucket_distance}
        return {
            "cfg": {**settings, **relative, **buckets, "normalize": encoder.normalize},
            "model": weight,
        }
    converted: dict[str, Any] = {
        "task_cfg": {"normalize": encoder.normalize, "sample_rate": encoder.sample_rate},
        "model_cfg": {
            **settings,
            "_name": encoder.family.replace("-", "_"),
            "pos_conv_depth": depth,
        },
        "model_weight": weight,
    }
    head = {"final_proj.weight": torch.zeros(width, width), "final_proj.bias": torch.zeros(width)}
    if encoder.family == "hubert":
        converted["model_cfg"]["label_rate"] = encoder.sample_rate / encoder.stride
        converted["dictionaries_symbols"] = [None]  # "used for fine-tuning": no label embeddings
        weight.update(head)
    elif encoder.family == "wav2vec2":
        project = {
            "project_q.weight": torch.zeros(width, cnn),
            "project_q.bias": torch.zeros(width),
        }
        weight.update(head | project)
    elif encoder.family == "data2vec-audio":
        weight["_ema"] = {}  # s3prl deletes this entry without asking whether it is there
    else:
        raise UserError(f"{encoder.source}: s3prl has no converted form of {encoder.family}")
    return converted
