"""Tensor names: transformers' are canonical, fairseq's and s3prl's are mapped to and fro."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from upstream.common.errors import UserError

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
# `lm_head` beside `hubert.*`, `w2v_encoder.proj` beside `w2v_encoder.w2v_model.*`.) `aux` is
# torchaudio's CTC head.
PRETRAINING = re.compile(
    r"(final_proj|label_embs_concat|quantizer|input_quantizer|project_q|project_hid|project_inp"
    r"|target_glu|_ema|aux)(\.|$)"
)
# Where a canonical name lies; first match wins. In a layer, what is neither attention nor
# feed-forward is one of its two layer norms.
IN_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(attention|feed_forward|)")
PARTS = {"attention": "attention", "feed_forward": "ffn", "": "layer_norm"}
PLACES = [
    (r"feature_extractor\..*layer_norm\.", "cnn", "layer_norm"),
    (r"feature_extractor\.", "cnn", "conv"),
    (r"feature_projection\.layer_norm\.", "projection", "layer_norm"),
    (r"feature_projection\.", "projection", "projection"),
    (r"encoder\.pos_conv_embed\.", "pos_conv", "pos_conv"),
    (r"encoder\.layer_norm\.", "norm", "layer_norm"),
    (PRETRAINING.pattern, "head", "head"),
]


class Place(NamedTuple):
    """Where in an encoder a tensor lies."""

    module: str  # cnn, projection, pos_conv, layer 1 ... layer L, norm (the encoder's), head, other
    layer: int | None  # depth of a transformer layer, from 1
    part: str  # conv, projection, pos_conv, attention, ffn, layer_norm, head, other


def place_of(name: str) -> Place:
    """The place of a canonical name; `other` holds the embedding of masked frames."""
    if found := IN_LAYER.match(name):
        depth = int(found[1]) + 1
        return Place(f"layer {depth}", depth, PARTS[found[2]])
    matches = (Place(module, None, part) for at, module, part in PLACES if re.match(at, name))
    return next(matches, Place("other", None, "other"))


def module_of(name: str) -> str:
    """The module of a canonical name: see Place."""
    return place_of(name).module


class Slot(NamedTuple):
    """Where a canonical tensor is stored."""

    name: str
    third: int | None = None  # of a fused [3D, D] or [3D] query, key and value

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        tensor = tensors[self.name]
        return tensor if self.third is None else tensor.chunk(3)[self.third]


# A tensor that every encoder has one of; what precedes it is the prefix of the encoder's names.
# The second is for encoders without a CNN (DeCoAR 2.0).
MARKERS = (r"feature_extractor\.conv_layers\.0\.(0|conv)\.weight", r"post_extract_proj\.weight")


def slots(stored: Iterable[str], source: str) -> dict[str, Slot]:
    """Canonical names -> where they are among `stored` names; prefixes and what lies outside them
    removed. Names of models that are no encoders stay as they are.

    Raises UserError for two encoders in one file, or two tensors of one name.
    """
    stored = list(stored)
    prefix = ""
    for marker in MARKERS:
        found = [match[1] for name in stored if (match := re.fullmatch(f"(.*?){marker}", name))]
        if len(found) > 1:
            raise UserError(
                f"{source}: holds {len(found)} encoders ({', '.join(found[:3])}); keep one"
            )
        if found:
            prefix = found[0]
            break
    places: dict[str, Slot] = {}
    for name in stored:
        if not name.startswith(prefix):
            continue
        for ours, slot in _parts(name, _TO_HF(_from_torchaudio(name.removeprefix(prefix)))):
            if ours in places:
                raise UserError(f"{source}: {name} and {places[ours].name} are both {ours}")
            places[ours] = slot
    return places


def _parts(name: str, ours: str) -> list[tuple[str, Slot]]:
    """torch's MultiheadAttention (torchaudio's WavLM) stacks query, key and value in one tensor."""
    fused = re.fullmatch(r"(encoder\.layers\.\d+\.attention\.)in_proj_(weight|bias)", ours)
    if not fused:
        return [(ours, Slot(name))]
    return [(f"{fused[1]}{k}_proj.{fused[2]}", Slot(name, i)) for i, k in enumerate("qkv")]


def _from_torchaudio(name: str) -> str:
    """torchaudio nests transformers' modules once more."""
    name = re.sub(r"^encoder\.(feature_projection\.)", r"\1", name)
    name = re.sub(r"^encoder\.transformer\.", "encoder.", name)
    return re.sub(r"^(encoder\.layers\.\d+\.attention\.)attention\.", r"\1", name)


def without_pretraining(state: Mapping[str, Tensor]) -> State:
    """The encoder's own tensors."""
    return {name: tensor for name, tensor in state.items() if not PRETRAINING.match(name)}


def layer_normed(state: Mapping[str, Tensor]) -> bool:
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
