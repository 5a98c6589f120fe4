"""The convolutional front end: 16 kHz samples -> a feature vector every 20 ms.

Parameters are named as in transformers; the arithmetic is our own: see ConvLayer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstream.encoder.config import Config


class Bare:
    """Draws no weights: all come from a checkpoint, and drawing takes seconds to import."""

    def reset_parameters(self) -> None:
        pass


class Conv1d(Bare, nn.Conv1d):
    """[B, C, T] -> [B, C', T']."""


class ConvLayer(nn.Module):
    """A convolution without padding, its norm if it has one, and GELU; time before channels."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        inputs, outputs = (1, *config.conv_dim)[index : index + 2]
        self.kernel, self.stride = config.conv_kernel[index], config.conv_stride[index]
        self.conv = Conv1d(inputs, outputs, self.kernel, self.stride, bias=config.conv_bias)
        self.layer_norm: nn.Module | None = None
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C], T a multiple of the stride -> [B, T / stride, C'].

        Where a window reaches beyond its item it meets the next one: the caller drops these last
        frames. So every tap or block of taps is one matrix product on a view of the whole batch,
        at the speed of BLAS, which 1-D convolutions do not reach on a CPU.
        """
        batch, span = len(x), self.stride * x.shape[2]
        blocks = x.reshape(-1, span)
        weight = self.conv.weight.permute(2, 1, 0).reshape(-1, self.conv.out_channels)
        first, *later = weight.split(span)
        y = torch.mm(blocks[:, : len(first)], first)
        for shift, taps in enumerate(later, 1):
            taps, shifted = taps.to(y.dtype), blocks[shift:, : len(taps)].to(y.dtype)
            y[:-shift].addmm_(shifted, taps)
        y = y if self.conv.bias is None else y + self.conv.bias
        y = y.unflatten(0, (batch, -1))
        return F.gelu(y if self.layer_norm is None else self.layer_norm(y))

    def normed(self, x: Tensor, lens: Tensor) -> Tensor:
        """The same for the layer with a GroupNorm: [B, T, 1] -> [B, T / stride, C'].

        lens [B]: the frames of each item that its statistics are over.
        Each channel is a group. Its mean and variance follow from those of the windows, so that
        the norm becomes part of the weights: nothing has to pass over the large output again.
        """
        norm = cast(nn.GroupNorm, self.layer_norm)
        padded = F.pad(x[:, :, 0], (0, self.kernel - self.stride))
        windows = padded.unfold(1, self.kernel, self.stride)
        inside = torch.arange(windows.shape[1], device=x.device) < lens[:, None]
        mine, weight = windows.double() * inside[:, :, None], self.conv.weight[:, 0].double().T
        mean = mine.sum(1, keepdim=True) / lens[:, None, None]
        centred = (mine - mean) * inside[:, :, None]
        covariance = centred.mT @ centred / lens[:, None, None]
        variance = ((covariance @ weight) * weight).sum(1, keepdim=True)
        scale = norm.weight * torch.rsqrt(variance.clamp(min=0) + norm.eps)
        bias = norm.bias - mean @ weight * scale
        affine = torch.cat([weight * scale, bias], 1).float()  # the bias meets a column of ones
        return F.gelu(torch.bmm(F.pad(windows, (0, 1), value=1.0), affine))


class FeatureExtractor(nn.Module):
    """All convolutions: samples to frames."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(ConvLayer(config, i) for i in range(len(config.conv_dim)))

    def forward(self, wavs: Tensor, lens: Tensor) -> Tensor:
        """Waves [B, N] -> frames [B, T, C]; a GroupNorm is over those of `lens` [B] samples."""
        layers = cast(Sequence[ConvLayer], self.conv_layers)
        length, hop = wavs.shape[1], math.prod(layer.stride for layer in layers)
        x = F.pad(wavs, (0, -length % hop))[:, :, None]
        for layer in layers:
            length = (length - layer.kernel) // layer.stride + 1
            if isinstance(layer.layer_norm, nn.GroupNorm):
                x = layer.normed(x, (lens - layer.kernel) // layer.stride + 1)
            else:
                x = layer(x)
        return x[:, :length]
