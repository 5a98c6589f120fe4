"""Tiny encoders of every family with random weights, for everybody's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from upstream.encoder.encoder import FAMILIES, Encoder, load

SIZES: dict[str, Any] = {
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_conv_pos_embedding_groups": 4,
}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
DATA2VEC = {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
# every family, and the Large variant (CNN layer norms, pre-norm layers) of those that have one
VARIANTS = [
    "hubert",
    "hubert-large",
    "wavlm",
    "wavlm-large",
    "wav2vec2",
    "wav2vec2-large",
    "data2vec",
]


def config(variant: str, **sizes: Any) -> tuple[str, dict[str, Any]]:
    """`hubert`, `hubert-large`, ... -> the family and a small transformers config."""
    name = variant.removesuffix("-large")
    family = {"data2vec": "data2vec-audio"}.get(name, name)
    extra = DATA2VEC if name == "data2vec" else {"num_conv_pos_embeddings": 16}
    return family, {**SIZES, **extra, **(LARGE if variant.endswith("-large") else {}), **sizes}


def model(variant: str, seed: int = 0, **sizes: Any) -> nn.Module:
    """A transformers model whose every parameter, norms and biases too, is far from its default."""
    family, settings = config(variant, **sizes)
    model_class = getattr(transformers, FAMILIES[family].model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built: nn.Module = model_class(model_class.config_class(**settings))
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1 and "original0" not in name:
                    parameter.add_(noise * 0.3 * parameter.std().nan_to_num())
                else:
                    parameter.add_(noise * 0.1)
    return built.eval()


def hf_folder(tmp_path: Path, variant: str = "hubert", seed: int = 0, **sizes: Any) -> Path:
    """Write a tiny model of `variant` as transformers does, and return its folder."""
    folder = Path(tmp_path) / f"{variant}-{seed}"
    model(variant, seed, **sizes).save_pretrained(folder)
    normalize = variant.endswith("-large") or variant == "data2vec"
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": normalize}))
    return folder


def encoder(tmp_path: Path, variant: str = "hubert", seed: int = 0, **options: Any) -> Encoder:
    """A tiny `Encoder`; `options` as of `upstream.encoder.encoder.load`."""
    return load(hf_folder(tmp_path, variant, seed), **options)


def noise(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Waves of speech-like size: smoothed noise with an offset, so that normalising matters."""
    generator = torch.Generator().manual_seed(seed)
    waves = [torch.randn(n + 8, generator=generator).unfold(0, 9, 1).mean(1) for n in lengths]
    return [0.3 * wave + 0.01 for wave in waves]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the weights of an HF folder by what `change` makes of them."""
    weights = folder / "model.safetensors"
    state = change(safetensors.torch.load_file(weights))
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    weights.unlink()  # a loaded encoder may still read the old file
    safetensors.torch.save_file(state, weights, {"format": "pt"})
