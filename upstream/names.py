"""Tensor names: transformers' are canonical, fairseq's and s3prl's are mapped to and fro."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from upstream.errors import UserError

State = dict[str, Tensor]

# fairseq and s3prl <-> transformers. `#` is a number, `*` the rest of a name; first match wins.
# The GroupNorm of Base and the LayerNorms of Large share one name in transformers.
GROUP_NORM = ("feature_extractor.conv_layers.#.2.*", "feature_extractor.conv_layers.#.layer_norm.*")
LAYER_NORM = ("feature_extractor.conv_layers.#.2.1.*", GROUP_NORM[1])
KERNEL = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
NAMES = [
    ("feature_extractor.conv_layers.#.0.*", "feature_extractor.conv_layers.#.conv.*"),
    LAYER_NORM,
    GROUP_NORM,
    ("layer_norm.*", "feature_projection.layer_norm.*"),
    ("post_extract_proj.*", "feature_projection.projection.*"),
    ("mask_emb", "masked_spec_embed"),
    ("encoder.pos_conv.0.weight_g", f"{KERNEL}0"),
    ("encoder.pos_conv.0.weight_v", f"{KERNEL}1"),
    ("encoder.pos_conv.0.bias", "encoder.pos_conv_embed.conv.bias"),
    ("encoder.pos_conv.#.0.*", "encoder.pos_conv_embed.layers.#.conv.*"),
    (
        "encoder.layers.#.self_attn.relative_attention_bias.*",
        "encoder.layers.#.attention.rel_attn_embed.*",
    ),
    ("encoder.layers.#.self_attn.grep_linear.*", "encoder.layers.#.attention.gru_rel_pos_linear.*"),
    ("encoder.layers.#.self_attn.grep_a", "encoder.layers.#.attention.gru_rel_pos_const"),
    ("encoder.layers.#.self_attn.*", "encoder.layers.#.attention.*"),
    ("encoder.layers.#.self_attn_layer_norm.*", "encoder.layers.#.layer_norm.*"),
    ("encoder.layers.#.fc1.*", "encoder.layers.#.feed_forward.intermediate_dense.*"),
    ("encoder.layers.#.fc2.*", "encoder.layers.#.feed_forward.output_dense.*"),
]
OLD_WEIGHT_NORM = [  # transformers before torch's parametrizations
    ("encoder.pos_conv_embed.conv.weight_g", f"{KERNEL}0"),
    ("encoder.pos_conv_embed.conv.weight_v", f"{KERNEL}1"),
]
# Used in pre-training only, absent from an encoder. (So is all outside the encoder's own prefix:
# `lm_head` beside `hubert.*`, `w2v_encoder.proj` beside `w2v_encoder.w2v_model.*`.)
PRETRAINING = re.compile(
    r"(final_proj|label_embs_concat|quantizer|input_quantizer|project_q|project_hid|project_inp"
    r"|target_glu|_ema)(\.|$)"
)
MODULES = [
    (r"feature_extractor\.", "cnn"),
    (r"feature_projection\.", "projection"),
    (r"encoder\.pos_conv_embed\.", "pos_conv"),
    (r"encoder\.layer_norm\.", "norm"),
]


def module_of(name: str) -> str:
    """The part of the encoder a canonical name lies in: cnn, projection, pos_conv, layer 1 ...
    layer L, norm (the encoder's own), other."""
    if layer := re.match(r"encoder\.layers\.(\d+)\.", name):
        return f"layer {int(layer[1]) + 1}"
    return next((module for start, module in MODULES if re.match(start, name)), "other")


def canonical(tensors: Mapping[str, Any], source: str) -> State:
    """Any origin's tensors under transformers' names, prefixes and heads outside them removed."""
    marker = "feature_extractor.conv_layers.0."
    start = next((name for name in tensors if marker in name), None)
    if start is None:
        known = ", ".join(list(tensors)[:3])
        raise UserError(
            f"{source}: not a HuBERT, WavLM, wav2vec 2.0 or data2vec encoder; it holds {known} ..."
        )
    prefix = start[: start.index(marker)]
    return {
        _TO_HF(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def without_pretraining(state: State) -> State:
    """The encoder's own tensors."""
    return {name: tensor for name, tensor in state.items() if not PRETRAINING.match(name)}


def layer_normed(state: State) -> bool:
    """Whether every convolution has a LayerNorm (Large, data2vec) or the first a GroupNorm."""
    return "feature_extractor.conv_layers.1.layer_norm.weight" in state


def _renamer(pairs: list[tuple[str, str]]) -> Callable[[str], str]:
    """Names by the first pattern that fits; others stay as they are."""

    def pattern(template: str) -> re.Pattern[str]:
        return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))

    table = [(pattern(old), re.sub(r"[#*]", "{}", new)) for old, new in pairs]

    def rename(name: str) -> str:
        for old, new in table:
            if found := old.fullmatch(name):
                return new.format(*found.groups())
        return name

    return rename


_TO_HF = _renamer(OLD_WEIGHT_NORM + NAMES)
_FROM_HF = {
    layered: _renamer([(new, old) for old, new in NAMES if old != unused])
    for layered, unused in ((True, GROUP_NORM[0]), (False, LAYER_NORM[0]))
}


def to_fairseq(name: str, layered: bool) -> str:
    """fairseq's name of a canonical one; `layered`: the CNN has LayerNorms (Large, data2vec)."""
    return _FROM_HF[layered](name)
