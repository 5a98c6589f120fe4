"""The families of encoders, and what their forward depends on: transformers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_type_hints

from upstream.common.errors import UserError
from upstream.common.registry import Registry
from upstream.common.schema import Dropout, Natural, Positive, Share, convert

Padding = Literal["exact", "s3prl"]  # has it no say, or the say it has in s3prl?
Precision = Literal["float32", "bfloat16", "float16"]  # of matrix products and convolutions


class Family(NamedTuple):
    """One architecture; its name in the table is the `model_type` of transformers' config.json."""

    model: str  # class name in transformers
    chunk_mask: bool = False  # s3prl masks by equal chunks (HuBERT, WavLM), not by the conv rule
    preset: Mapping[str, Any] = {}  # fields of its config that others lack or preset otherwise
    fixed: Mapping[str, Any] = {}  # fields it disregards, and what it is like


FAMILIES: Registry[Family] = Registry("encoder family")
NORM = {"feat_proj_layer_norm": True}
BUCKETS = {"num_buckets": 320, "max_bucket_distance": 800}
STACK = {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
POST_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": False}
FAMILIES.add("hubert", Family("HubertModel", True, NORM), "HuBERT")
FAMILIES.add("wavlm", Family("WavLMModel", True, BUCKETS), "WavLM")
FAMILIES.add("wav2vec2", Family("Wav2Vec2Model"), "wav2vec 2.0")
FAMILIES.add("unispeech", Family("UniSpeechModel"), "UniSpeech: wav2vec 2.0's modules")
FAMILIES.add("unispeech-sat", Family("UniSpeechSatModel"), "UniSpeech-SAT: the same")
FAMILIES.add("data2vec-audio", Family("Data2VecAudioModel", False, STACK, POST_NORM), "data2vec")

# Fields that only some families read.
SPECIAL = ("feat_proj_layer_norm", "num_buckets", "max_bucket_distance", "conv_pos_kernel_size")


@dataclass(frozen=True)
class Config:
    """The fields of transformers' config.json that a forward depends on, with their defaults."""

    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    hidden_act: Literal["gelu"] = "gelu"
    hidden_dropout: Dropout = 0.1
    activation_dropout: Dropout = 0.1
    attention_dropout: Dropout = 0.1
    feat_proj_layer_norm: bool = True
    feat_proj_dropout: Dropout = 0.0
    layer_norm_eps: Share = 1e-5
    feat_extract_norm: Literal["group", "layer"] = "group"  # of the first convolution, or of all
    feat_extract_activation: Literal["gelu"] = "gelu"
    conv_dim: tuple[Positive, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[Positive, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[Positive, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: Positive = 128  # width of the positional convolution; data2vec: depth
    num_conv_pos_embedding_groups: Positive = 16
    do_stable_layer_norm: bool = False  # layer norms before attention and feed-forward, not after
    conv_pos_kernel_size: Natural = 0  # of data2vec's stack of positional convolutions
    num_buckets: Natural = 0  # of WavLM's relative positions
    max_bucket_distance: Natural = 0
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)  # all of config.json

    @classmethod
    def read(cls, given: Mapping[str, Any], family: Family, source: str) -> Config:
        """From the config.json of `source`; fields that the family lacks or fixes are passed over.

        Raises UserError for a value that is of another type or does not fit.
        """
        foreign = {*SPECIAL, "given", *family.fixed} - family.preset.keys()
        where, values = f"{source}: its config does not fit", dict(family.preset)
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if name in given and name not in foreign:
                values[name] = convert(given[name], hint, f"{where}: {name}")
        config = cls(**{**values, **family.fixed}, given={**family.preset, **given, **family.fixed})
        if fault := config._fault():
            raise UserError(f"{where}: {fault}")
        return config

    def _fault(self) -> str:
        """Why these sizes cannot go together; empty if they can."""
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            return "conv_dim, conv_kernel and conv_stride are of different lengths"
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                return f"hidden_size {self.hidden_size} is no multiple of {name}"
        if self.num_buckets and not 4 <= self.num_buckets < 4 * self.max_bucket_distance:
            return f"num_buckets {self.num_buckets} and max_bucket_distance"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """config.json again: all that was given, and what was left to the defaults."""
        fields = {k: v for k, v in vars(self).items() if k not in ("given", *SPECIAL)}
        return {**fields, **self.given}
