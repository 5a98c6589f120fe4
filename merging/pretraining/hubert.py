"""HuBERT at any size: a new one, its Transformer alone, and the folder it is saved in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from upstream.common import disk
from upstream.common.schema import Positive


@dataclass(frozen=True)
class Position:
    kernel: Positive
    groups: Positive


@dataclass(frozen=True)
class Model:
    hidden: Positive
    layers: Positive
    heads: Positive
    feed_forward: Positive
    conv: list[Positive]  # channels of the 7 stem layers
    position: Position


def new_model(model: Model) -> HubertModel:
    """A HubertModel of that size, in the published layout, randomly initialised, no dropout."""
    kinds = ("hidden", "attention", "activation", "feat_proj", "final")
    dropouts: dict[str, Any] = {f"{kind}_dropout": 0.0 for kind in kinds}
    config = HubertConfig(
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.feed_forward,
        conv_dim=model.conv,
        num_conv_pos_embeddings=model.position.kernel,
        num_conv_pos_embedding_groups=model.position.groups,
        layerdrop=0.0,
        **dropouts,
    )
    return HubertModel(config)


def encode(model: HubertModel, stem: Tensor, mask: Tensor) -> Tensor:
    """Stem outputs [B, T, C], frames to hide [B, T] -> last hidden states [B, T, D]."""
    hidden = model.feature_projection(stem)
    hidden = torch.where(mask[..., None], model.masked_spec_embed, hidden)
    return model.encoder(hidden).last_hidden_state


def save(model: HubertModel, folder: Path) -> None:
    """An ordinary transformers folder, weights in float16 (loaded back as float32)."""
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with disk.whole(folder / "model.safetensors") as part:
        save_file(state, part, metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {"architectures": ["HubertModel"], "dtype": "float32"}
    disk.write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
