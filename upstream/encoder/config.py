"""The families of encoders, and what their forward depends on: transformers' config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from upstream.common.registry import Registry


class Family(NamedTuple):
    """One architecture; its name in the table is the `model_type` of transformers' config.json."""

    model: str  # class name in transformers
    chunk_mask: bool = False  # s3prl masks by equal chunks (HuBERT, WavLM), not by the conv rule
    own: Mapping[str, Any] = {}  # fields of its config that others lack or preset otherwise
    fixed: Mapping[str, Any] = {}  # fields it disregards, and what it is like


FAMILIES: Registry[Family] = Registry("encoder family")
FAMILIES.add(
    "hubert", Family("HubertModel", chunk_mask=True, own={"feat_proj_layer_norm": True}), "HuBERT"
)
BUCKETS = {"num_buckets": 320, "max_bucket_distance": 800}
FAMILIES.add("wavlm", Family("WavLMModel", chunk_mask=True, own=BUCKETS), "WavLM")
FAMILIES.add("wav2vec2", Family("Wav2Vec2Model"), "wav2vec 2.0")
STACK = {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
POST_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": False}
FAMILIES.add("data2vec-audio", Family("Data2VecAudioModel", own=STACK, fixed=POST_NORM), "data2vec")

# Fields that only some families read.
SPECIAL = ("feat_proj_layer_norm", "num_buckets", "max_bucket_distance", "conv_pos_kernel_size")


@dataclass(frozen=True)
class Config:
    """The fields of transformers' config.json that a forward depends on, with their defaults."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_layer_norm: bool = True
    feat_proj_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"  # of the first convolution; or "layer": of all of them
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128  # kernel of the positional convolution; data2vec: how many
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False  # layer norms before attention and feed-forward, not after
    conv_pos_kernel_size: int = 0  # of data2vec's stack of positional convolutions
    num_buckets: int = 0  # of WavLM's relative positions
    max_bucket_distance: int = 0
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)  # all of config.json

    @classmethod
    def read(
        cls, given: Mapping[str, Any], own: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> Config:
        """From config.json: `own` fields of the family and their defaults, and `fixed` ones.

        Raises ValueError with the reason for a value that is of another type or does not fit.
        """
        values: dict[str, Any] = {}
        for known in dataclasses.fields(cls):
            name, default = known.name, own.get(known.name, known.default)
            if name in given and (name in own or name not in SPECIAL):
                values[name] = _typed(name, given[name], default)
        config = cls(**{**own, **values, **fixed}, given={**own, **given, **fixed})
        config._check()
        return config

    def _check(self) -> None:
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise ValueError("conv_dim, conv_kernel and conv_stride are of different lengths")
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {name}")
        for name in ("hidden_act", "feat_extract_activation"):
            if getattr(self, name) != "gelu":
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported, gelu is")
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(f"feat_extract_norm {self.feat_extract_norm!r}: group or layer")

    def to_dict(self) -> dict[str, Any]:
        """config.json again: all that was given, and what was left to the defaults."""
        names = {known.name for known in dataclasses.fields(self)} - {"given", *SPECIAL}
        return {**{name: getattr(self, name) for name in names}, **self.given}


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` of JSON as the type of `default`; sizes are positive. Raises ValueError."""
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(_typed(name, item, 1) for item in value)
    if isinstance(default, bool | str) or isinstance(value, bool):
        fits = type(value) is type(default)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and 0 <= value <= 1  # dropouts and an epsilon
    else:
        fits = isinstance(value, int) and value > 0 and not isinstance(default, tuple)
    if not fits:
        raise ValueError(f"{name} is {value!r:.60}")
    return value
