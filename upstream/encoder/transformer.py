"""The networks of HuBERT, WavLM, wav2vec 2.0 and data2vec, under transformers' names.

transformers' own classes take seconds to import (its base class loads the compiler and text
generation), and their forward lets padding in. So the modules are built here: parameters have the
same names, shapes and order, hence the same files, and dropouts stand in the same places. Here
`mask` [B, T] is true for the frames to keep; None keeps all.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from upstream.encoder.cnn import Bare, Conv1d, FeatureExtractor
from upstream.encoder.config import Config


class Linear(Bare, nn.Linear):
    """[..., D] -> [..., D']."""


class Embedding(Bare, nn.Embedding):
    """Integers [...] -> [..., D]."""


class FeatureProjection(nn.Module):
    """From the width of the CNN to that of the transformer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.conv_dim[-1]
        self.layer_norm: nn.Module | None = None
        if config.feat_proj_layer_norm:
            self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, D]."""
        x = x if self.layer_norm is None else self.layer_norm(x)
        return cast(Tensor, self.dropout(self.projection(x)))


def _silence(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D] with zeros where `mask` is false."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], 0)


class PositionConv(Conv1d):
    """[B, T, D] -> [B, T, D], over time."""

    def __init__(self, config: Config, kernel: int) -> None:
        width, groups = config.hidden_size, config.num_conv_pos_embedding_groups
        # on the CPU: on the meta device, weight_norm alone would import the compiler (seconds)
        super().__init__(width, width, kernel, padding=kernel // 2, groups=groups, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # always in float32: with AMX, oneDNN's grouped convolutions of few channels a group
            # are wrong in bfloat16 (noise as large as the output)
            with torch.autocast("cpu", enabled=False):
                y = super().forward(x.to(self.weight.dtype).transpose(1, 2))
        else:
            y = super().forward(x.transpose(1, 2))
        return y[:, :, : x.shape[1]].transpose(1, 2)


class Positions(nn.Module):
    """The positional convolution, weight-normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv = weight_norm(PositionConv(config, config.num_conv_pos_embeddings), dim=2)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] -> what to add to it, [B, T, D]."""
        return F.gelu(self.conv(_silence(x, mask)))


class StackedPositions(nn.Module):
    """data2vec's positional convolutions, each with a norm that has no parameters."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"conv": PositionConv(config, config.conv_pos_kernel_size)})
            for _ in range(config.num_conv_pos_embeddings)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] -> what to add to it, [B, T, D]."""
        for layer in self.layers:
            x = cast(nn.ModuleDict, layer)["conv"](_silence(x, mask))
            x = F.gelu(F.layer_norm(x, x.shape[2:]))
        return x


class Attention(nn.Module):
    """Self-attention; WavLM's has a gated bias for the relative position of two frames."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.dropout = config.attention_dropout
        self.distance = config.max_bucket_distance
        if config.num_buckets:
            self.gru_rel_pos_const = nn.Parameter(torch.empty(1, self.heads, 1, 1))
        self.k_proj, self.v_proj = Linear(width, width), Linear(width, width)
        self.q_proj, self.out_proj = Linear(width, width), Linear(width, width)
        if config.num_buckets:
            self.gru_rel_pos_linear = Linear(width // self.heads, 8)
            if index == 0:  # one table for all layers
                self.rel_attn_embed = Embedding(config.num_buckets, self.heads)

    def compute_bias(self, length: int) -> Tensor:
        """[H, T, T]: by head, query and key, from the table of T5-like buckets of distance."""
        table = self.rel_attn_embed
        offsets = torch.arange(1 - length, length, device=table.weight.device)
        values = table(buckets(offsets, table.num_embeddings, self.distance)).T
        return values.unfold(1, length, 1).flip(1)  # every row one step to the left of the last

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; bias [H, T, T]: of relative positions, before it is gated."""
        # modules, for every family: adapters that wrap a Linear act on WavLM too (transformers
        # and s3prl hand its bare weights to a functional)
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys = None if mask is None else mask[:, None, None, :]
        if bias is not None:
            bias = self._gate(x.unflatten(2, (self.heads, -1)).transpose(1, 2)) * bias
            keys = bias if keys is None else bias.masked_fill(~keys, float("-inf"))
            keys = keys.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=keys, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def _gate(self, x: Tensor) -> Tensor:
        """[B, H, T, 1] from the layer's input [B, H, T, D / H] (WavLM paper, section 3.1)."""
        gates = self.gru_rel_pos_linear(x).unflatten(-1, (2, 4)).sum(-1)
        a, b = torch.sigmoid(gates).chunk(2, dim=-1)
        return a * (b * self.gru_rel_pos_const - 1.0) + 2.0


def buckets(offsets: Tensor, count: int, distance: int) -> Tensor:
    """Of offsets key - query [...] the buckets: exact when near, then logarithmic to `distance`."""
    side = count // 2  # buckets for keys before the query; as many for those behind
    near, steps = side // 2, offsets.abs()
    scale = math.log(distance / near)
    far = near + torch.log(steps.clamp(min=1).float() / near) / scale * (side - near)
    bucket = torch.where(steps < near, steps, far.long().clamp(max=side - 1))
    return bucket + side * (offsets > 0)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.intermediate_dense = Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.intermediate_dropout(F.gelu(self.intermediate_dense(x)))
        return cast(Tensor, self.output_dropout(self.output_dense(x)))


class Layer(nn.Module):
    """One transformer layer, pre-norm (`do_stable_layer_norm`) or post-norm."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.stable = config.do_stable_layer_norm
        self.attention = Attention(config, index)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; mask and bias as of Attention."""
        if self.stable:
            x = x + self.dropout(self.attention(self.layer_norm(x), mask, bias))
            return cast(Tensor, x + self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + self.dropout(self.attention(x, mask, bias)))
        return cast(Tensor, self.final_layer_norm(x + self.feed_forward(x)))


class Transformer(nn.Module):
    """The positional convolutions and the transformer layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stable = config.do_stable_layer_norm
        self.pos_conv_embed = (
            StackedPositions(config) if config.conv_pos_kernel_size else Positions(config)
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        # in training, of a layer keep only its input, and compute it again in the backward pass
        self.checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None, exact: bool = True) -> list[Tensor]:
        """Projected features [B, T, D] -> the input of every layer and the final output, [B, T, D].

        `exact`: data2vec's later positional convolutions see zeros beyond the mask, too.
        """
        x = _silence(x, mask)
        x = x + self.pos_conv_embed(x, mask if exact else None)
        x = self.dropout(x if self.stable else self.layer_norm(x))
        first = cast(Attention, self.layers[0].attention)
        bias = first.compute_bias(x.shape[1]) if hasattr(first, "rel_attn_embed") else None
        states = [x]
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            states.append(run(states[-1], mask, bias))
        if self.stable:
            states[-1] = self.layer_norm(states[-1])
        return states


class Model(nn.Module):
    """A whole encoder; `upstream.encoder.encoder.Encoder` runs its parts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder = Transformer(config)
