"""Tensor names: transformers' are canonical, fairseq's and s3prl's are mapped to and fro."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from upstream.common.errors import UserError

State = dict[str, Tensor]

# fairseq's and s3prl's names, and transformers'. `#` is a number, `*` the rest of a name; the first
# line that fits counts, in either direction. Both norms of the CNN share one name in transformers:
# that of Base (a GroupNorm in the first layer) and that of Large (a LayerNorm in each).
KERNEL = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
FOLDED = "encoder.pos_conv_embed.conv.weight"  # the product of both, as inference libraries save it
MASK = "masked_spec_embed"
TABLE = f"""
feature_extractor.conv_layers.#.0.*    feature_extractor.conv_layers.#.conv.*
feature_extractor.conv_layers.#.2.1.*  feature_extractor.conv_layers.#.layer_norm.*
feature_extractor.conv_layers.#.2.*    feature_extractor.conv_layers.#.layer_norm.*
layer_norm.*                         feature_projection.layer_norm.*
post_extract_proj.*                  feature_projection.projection.*
mask_emb                             {MASK}
encoder.pos_conv.0.weight_g          {KERNEL}0
encoder.pos_conv.0.weight_v          {KERNEL}1
encoder.pos_conv.0.bias              encoder.pos_conv_embed.conv.bias
encoder.pos_conv.#.0.*               encoder.pos_conv_embed.layers.#.conv.*
encoder.layers.#.self_attn.relative_attention_bias.*  encoder.layers.#.attention.rel_attn_embed.*
encoder.layers.#.self_attn.grep_linear.*    encoder.layers.#.attention.gru_rel_pos_linear.*
encoder.layers.#.self_attn.grep_a           encoder.layers.#.attention.gru_rel_pos_const
encoder.layers.#.self_attn.*                encoder.layers.#.attention.*
encoder.layers.#.self_attn_layer_norm.*     encoder.layers.#.layer_norm.*
encoder.layers.#.fc1.*                      encoder.layers.#.feed_forward.intermediate_dense.*
encoder.layers.#.fc2.*                      encoder.layers.#.feed_forward.output_dense.*
"""
# Of transformers before torch's parametrizations, and of torchaudio, which nests its modules more.
OTHERS = f"""
mask_time_emb_vector                  {MASK}
encoder.pos_conv.0.weight             {FOLDED}
encoder.pos_conv_embed.conv.weight_g  {KERNEL}0
encoder.pos_conv_embed.conv.weight_v  {KERNEL}1
encoder.transformer.pos_conv_embed.conv.weight_g  {KERNEL}0
encoder.transformer.pos_conv_embed.conv.weight_v  {KERNEL}1
encoder.transformer.layers.#.attention.attention.*  encoder.layers.#.attention.*
encoder.transformer.*        encoder.*
encoder.feature_projection.* feature_projection.*
"""
# Used in pre-training only, absent from an encoder (as all outside its own prefix is: `lm_head`
# beside `hubert.*`). `aux` is torchaudio's CTC head.
PRETRAINING = re.compile(
    r"(final_proj|label_embs_concat|quantizer|input_quantizer|project_q|project_hid|project_inp"
    r"|target_glu|_ema|aux|label_embeddings_concat|speaker_proj|ctc_proj|layer_norm_for_extract)"
    r"(\.|$)"
)
# Heads of fine-tuning, where they lie beside an encoder that has no prefix of its own.
HEADS = re.compile(r"(lm_head|classifier|projector|layer_weights|proj)(\.|$)")
# Segments that wrappers put into the names of what they wrap: torch.compile, checkpointing of
# activations, FSDP, Lightning Fabric, DataParallel and DeepSpeed.
WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module"
    r"|_forward_module|module)\."
)
# Where a canonical name lies; first match wins. In a layer, what is neither attention nor
# feed-forward is one of its two layer norms.
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
    if inside := re.match(r"encoder\.layers\.(\d+)\.(attention|feed_forward|)", name):
        depth = int(inside[1]) + 1
        return Place(f"layer {depth}", depth, PARTS[inside[2]])
    matches = (Place(module, None, part) for at, module, part in PLACES if re.match(at, name))
    return next(matches, Place("other", None, "other"))


def module_of(name: str) -> str:
    """The module of a canonical name: see Place."""
    return place_of(name).module


class Slot(NamedTuple):
    """Where a canonical tensor is stored."""

    name: str
    third: int | None = None  # of a fused [3D, D] or [3D] query, key and value
    factor: Literal["", "gain", "direction"] = ""  # of a kernel whose weight norm is folded

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself, from those under stored names."""
        tensor = tensors[self.name]
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return gain_of(tensor) if self.factor == "gain" else tensor


def gain_of(kernel: Tensor) -> Tensor:
    """Weight norm's g [1, 1, K] of a kernel [D, C, K]: its norm at each place, float32."""
    return torch.linalg.vector_norm(kernel.float(), dim=(0, 1), keepdim=True)


def fold(gain: Tensor, direction: Tensor) -> Tensor:
    """The kernel [D, C, K] that weight norm makes of its factors g and v, float32."""
    return gain.float() * direction.float() / gain_of(direction)


# A tensor that every encoder has one of; what precedes it is the prefix of the encoder's names.
# The second is for encoders without a CNN (DeCoAR 2.0).
MARKERS = (r"feature_extractor\.conv_layers\.0\.(0|conv)\.weight", r"post_extract_proj\.weight")


def slots(stored: Iterable[str], source: str) -> dict[str, Slot]:
    """Canonical names -> where they are among `stored` names; wrappers, prefixes and what lies
    outside them removed. Names of models that are no encoders stay. UserError for two of one name
    or encoder.
    """
    names = {name: unwrapped(name) for name in stored}
    prefix = prefix_of(names.values(), source)
    if prefix is None:
        names, prefix = {name: name for name in names}, ""
    places: dict[str, Slot] = {}
    for name, bare in names.items():
        if not bare.startswith(prefix):
            continue
        for canonical, slot in _slots_of(name, bare.removeprefix(prefix)):
            if canonical == MASK in places:  # under two names, of which transformers' own counts
                slot = slot if bare.endswith(MASK) else places[MASK]
            elif canonical in places:
                both = f"{name} and {places[canonical].name}"
                raise UserError(f"{source}: {both} are both {canonical}")
            places[canonical] = slot
    return places


def unwrapped(name: str) -> str:
    """A stored name without the segments of wrappers."""
    return WRAPPERS.sub("", name)


def prefix_of(names: Iterable[str], source: str) -> str | None:
    """What the names of the one encoder among unwrapped `names` begin with; None without one.

    Raises UserError for several encoders.
    """
    names = list(names)
    for marker in MARKERS:
        matches = (re.fullmatch(f"(.*?){marker}", name) for name in names)
        prefixes = [match[1] for match in matches if match]
        if len(prefixes) > 1:
            listed = ", ".join(prefixes[:3])
            raise UserError(f"{source}: holds {len(prefixes)} encoders ({listed}); keep one")
        if prefixes:
            return prefixes[0]
    return None


def _slots_of(stored: str, name: str) -> list[tuple[str, Slot]]:
    """The canonical tensors in a stored one, whose `name` in the encoder this is.

    They are three where query, key and value are fused, two where weight norm is folded.
    """
    canonical = _TO_HF(name)
    if canonical == FOLDED:
        factors = (Slot(stored, factor="gain"), Slot(stored, factor="direction"))
        return [(f"{KERNEL}{number}", slot) for number, slot in enumerate(factors)]
    # torch's MultiheadAttention stacks them, which torchaudio's WavLM uses
    fused = re.fullmatch(r"(encoder\.layers\.\d+\.attention\.)in_proj_(weight|bias)", canonical)
    if not fused:
        return [(canonical, Slot(stored))]
    return [
        (f"{fused[1]}{k}_proj.{fused[2]}", Slot(stored, third)) for third, k in enumerate("qkv")
    ]


def without_pretraining(state: Mapping[str, Tensor]) -> State:
    """The encoder's own tensors."""
    return {name: tensor for name, tensor in state.items() if not PRETRAINING.match(name)}


def needless(name: str) -> bool:
    """Whether no forward depends on a tensor: heads, and the embedding of masked frames."""
    return name == MASK or bool(PRETRAINING.match(name) or HEADS.match(name))


def layer_normed(state: Mapping[str, Tensor]) -> bool:
    """Whether every convolution has a LayerNorm (Large, data2vec) or the first a GroupNorm."""
    return "feature_extractor.conv_layers.1.layer_norm.weight" in state


def _renamer(rows: Iterable[Iterable[str]]) -> Callable[[str], str]:
    """Names by the first row (from, to) that fits; others stay as they are."""
    patterns = [
        (re.escape(old).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"), re.sub("[#*]", "{}", new))
        for old, new in rows
    ]

    def rename(name: str) -> str:
        for old, new in patterns:
            if match := re.fullmatch(old, name):
                return new.format(*match.groups())
        return name

    return rename


_ROWS = [row.split() for row in TABLE.strip().splitlines()]
_TO_HF = _renamer([*_ROWS, *(row.split() for row in OTHERS.strip().splitlines())])
_LAYERED, _GROUPED = (  # the other norm of the CNN left out
    _renamer((new, old) for old, new in _ROWS if not old.endswith(unused))
    for unused in ("#.2.*", "#.2.1.*")
)


def to_fairseq(name: str, layered: bool) -> str:
    """fairseq's name of a canonical one; `layered`: the CNN has LayerNorms (Large, data2vec)."""
    return (_LAYERED if layered else _GROUPED)(name)
