"""HuBERT, WavLM, wav2vec 2.0 and data2vec: transformers' modules and weights, our own forward.

The forward is ours because padding must have no say: a padded batch equals each utterance alone.
transformers and s3prl take GroupNorm statistics over the padding and let it leak into the
positional convolutions, which moves the features of a short utterance by 30 to 40 %.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from upstream import checkpoint, export
from upstream.base import Hidden, Padding, Upstream, valid
from upstream.errors import UserError, near_miss
from upstream.registry import Registry

# On a GPU convolutions would use TF32, whose ten bits of mantissa break the promise of parity.
torch.backends.cudnn.allow_tf32 = False

EPS = 1e-5  # of the waveform's layer norm: fairseq's (transformers uses 1e-7)


class Family(NamedTuple):
    """One architecture; its name in the table is the `model_type` of transformers' config.json."""

    model: str  # class name in transformers
    chunk_mask: bool = False  # s3prl masks by equal chunks (HuBERT, WavLM), not by the conv rule


FAMILIES: Registry[Family] = Registry("encoder family")
FAMILIES.add("hubert", Family("HubertModel", chunk_mask=True), "HuBERT")
FAMILIES.add("wavlm", Family("WavLMModel", chunk_mask=True), "WavLM")
FAMILIES.add("wav2vec2", Family("Wav2Vec2Model"), "wav2vec 2.0")
FAMILIES.add("data2vec-audio", Family("Data2VecAudioModel"), "data2vec")

# The fields of a config that change the output; all others are training or provenance.
ARCHITECTURE = (
    "conv_dim conv_kernel conv_stride conv_bias feat_extract_norm feat_extract_activation "
    "feat_proj_layer_norm hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "hidden_act layer_norm_eps do_stable_layer_norm num_conv_pos_embeddings conv_pos_kernel_size "
    "num_conv_pos_embedding_groups num_buckets max_bucket_distance"
).split()
# What transformers can add to these models and this forward does not do: refuse, never ignore.
REFUSED = ("conv_pos_batch_norm", "add_adapter", "adapter_attn_dim")


class Encoder(Upstream):
    """A transformer speech encoder.

    Its layers are the input of each transformer layer and then the final output (spec: s3prl's
    hooks, and transformers' `output_hidden_states`): 13 for Base, 25 for Large.

    `padding="exact"`: a padded batch equals each utterance alone, and an utterance shorter than
    the CNN's window (400 samples) counts as zero-padded to one window. `padding="s3prl"`: what
    s3prl 0.4.18 computes, padding effects included, with its `round(samples / 320)` lengths.
    """

    def __init__(self, weights: checkpoint.Checkpoint, padding: Padding = "exact") -> None:
        """Raises UserError for a family, config or set of tensors that does not fit."""
        super().__init__()
        self.family, self.padding, self.source = weights.family, padding, weights.source
        self.normalize = weights.normalize
        if weights.family not in FAMILIES:
            hint = near_miss(weights.family, FAMILIES)
            raise UserError(f"{weights.source}: unknown family {weights.family!r}{hint}")
        family = FAMILIES[weights.family]
        model_class = getattr(transformers, family.model)
        try:
            self.config = model_class.config_class.from_dict(weights.config)
            # no second copy of the weights, and no random number of the caller's is drawn
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                self.model: Any = model_class(self.config)
        except Exception as error:  # transformers' checks of a config raise many kinds
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{weights.source}: its config does not fit ({reason})") from error
        for option in REFUSED:
            if getattr(self.config, option, None):
                raise UserError(f"{weights.source}: {option} is not supported; use a plain encoder")
        _fill(self.model, weights)
        self.chunk_mask = family.chunk_mask
        self.stable = bool(getattr(self.config, "do_stable_layer_norm", False))
        self.num_layers = self.config.num_hidden_layers + 1
        self.dim = self.config.hidden_size
        self.window, self.stride = 1, 1  # receptive field and hop of the CNN, in samples
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            self.window += (kernel - 1) * self.stride
            self.stride *= stride
        self.eval()

    def cnn(self) -> nn.Module:
        """The convolutional feature extractor (Speech-FT freezes it)."""
        return cast(nn.Module, self.model.feature_extractor)

    def identity(self) -> dict[str, Any]:
        config = {key: getattr(self.config, key, None) for key in ARCHITECTURE}
        extra = {"normalize": self.normalize, "padding": self.padding}
        return {"family": self.family, **config, **extra}

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames the CNN makes of each length in samples: 49 for 16000."""
        samples = samples.clamp(min=self.window)
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        """[B, N] zero-padded at 16 kHz, lens [B] in samples -> Hidden of [L, B, T, D] float32."""
        return self.contextual(*self.convolve(wavs, lens))

    def convolve(self, wavs: Tensor, lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The CNN alone: x [B, T, C], the frames its mask keeps [B], and the valid frames [B].

        Speech-FT never trains it, so the pre-trained, fine-tuned and merged upstreams share it.
        """
        lens = lens.to(wavs.device)
        if self.normalize:
            wavs = _normalised(wavs, lens.tolist())
        wavs = F.pad(wavs, (0, max(0, self.window - wavs.shape[1])))
        x = self._convolve(wavs, lens).transpose(1, 2)
        kept = valid_frames = self._kept(lens, wavs.shape[1], x.shape[1])
        if self.padding == "s3prl":  # s3prl's featurizer: half to even, capped at what there is
            rounded = torch.round(lens.double() / self.stride).long()
            valid_frames = rounded.clamp(1, x.shape[1])
        return x, kept, valid_frames

    def contextual(self, x: Tensor, kept: Tensor, lens: Tensor) -> Hidden:
        """The rest of the encoder, from what `convolve` returns."""
        projection = self.model.feature_projection
        if hasattr(projection, "layer_norm"):
            x = projection.layer_norm(x)
        x = projection.dropout(projection.projection(x))
        mask = None if bool((kept >= x.shape[1]).all()) else valid(kept, x.shape[1])
        return Hidden(torch.stack(self._transform(x, mask)).float(), lens)

    def _convolve(self, wavs: Tensor, lens: Tensor) -> Tensor:
        """[B, N] -> [B, C, T]."""
        first, *rest = self.model.feature_extractor.conv_layers
        x = wavs[:, None]
        if self.padding == "exact" and isinstance(first.layer_norm, nn.GroupNorm):
            own = (lens.clamp(min=self.window) - self.config.conv_kernel[0]) // first.conv.stride[0]
            x = first.activation(_own_norm(first.conv(x), own + 1, first.layer_norm))
        else:
            x = first(x)
        for layer in rest:
            x = layer(x)
        return x

    def _kept(self, lens: Tensor, padded: int, length: int) -> Tensor:
        """[B]: how many of `length` frames the mask keeps."""
        if self.padding == "s3prl" and self.chunk_mask:
            # forward_padding_mask in s3prl/upstream/hubert/hubert_model.py: equal chunks of
            # samples, a frame is padding if its whole chunk is
            chunk = padded // length
            return ((lens + chunk - 1) // chunk).clamp(1, length)
        return self.frames(lens)

    def _transform(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Projected features [B, T, D] and the frames to keep [B, T] -> all layers."""
        encoder = self.model.encoder
        x = _silence(x, mask)
        x = x + self._positions(encoder.pos_conv_embed, x, mask)
        if not self.stable:
            x = encoder.layer_norm(x)
        x = encoder.dropout(x)
        first, bias = encoder.layers[0].attention, None
        if hasattr(first, "rel_attn_embed"):  # WavLM: one table for all layers
            bias = first.compute_bias(x.shape[1], x.shape[1])
        layers = [x]
        for block in encoder.layers:
            x = _block(block, x, mask, bias, self.stable)
            layers.append(x)
        if self.stable:
            layers[-1] = encoder.layer_norm(x)
        return layers

    def _positions(self, convolution: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if not hasattr(convolution, "layers"):
            return cast(Tensor, convolution(x))
        exact = mask if self.padding == "exact" else None
        for layer in cast(nn.ModuleList, convolution.layers):  # data2vec stacks five
            x = layer(_silence(x, exact).transpose(1, 2)).transpose(1, 2)
        return x

    def save(self, folder: str | Path) -> None:
        """Write config.json, preprocessor_config.json and model.safetensors (float32).

        Each file appears whole or not at all, the weights last. transformers' `from_pretrained`
        and `hf:folder` both read it.
        """
        export.to_folder(self, folder)


def load(
    path: str | Path,
    *,
    normalize: bool | None = None,
    padding: Padding = "exact",
    family: str | None = None,
) -> Encoder:
    """An encoder from a checkpoint file or an HF folder; `normalize` overrides what it asks for."""
    weights = checkpoint.read(path, family)
    if normalize is not None:
        weights = weights._replace(normalize=normalize)
    return Encoder(weights, padding)


def _fill(model: nn.Module, weights: checkpoint.Checkpoint) -> None:
    """Give `model` exactly these weights, in float32."""
    # The embedding of masked frames takes no part in a forward without masking, and which configs
    # create it differs between families: the file decides.
    embedding = weights.state.get("masked_spec_embed")
    model._parameters.pop("masked_spec_embed", None)
    if embedding is not None:
        model.masked_spec_embed = nn.Parameter(torch.empty_like(embedding, device="meta"))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    checkpoint.compare(expected, weights)
    state = {name: tensor.float().contiguous() for name, tensor in weights.state.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{weights.source}: {name} holds NaN or infinite values; use another")
    model.load_state_dict(state, assign=True)


def _normalised(wavs: Tensor, lens: list[int]) -> Tensor:
    """Zero mean and unit variance over each utterance's own samples."""
    rows = [F.layer_norm(wav[:n], (n,), eps=EPS) if n else wav[:0] for wav, n in zip(wavs, lens)]
    return torch.stack([F.pad(row, (0, wavs.shape[1] - len(row))) for row in rows])


def _own_norm(x: Tensor, lens: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm with one channel per group, [B, C, T], statistics over each item's own frames."""
    if bool((lens >= x.shape[2]).all()):
        return cast(Tensor, norm(x))
    moments = [
        torch.var_mean(row[:, :n].float(), 1, correction=0) for row, n in zip(x, lens.tolist())
    ]
    var, mean = (torch.stack(moment)[:, :, None] for moment in zip(*moments))
    scale = norm.weight[:, None] * torch.rsqrt(var + norm.eps)
    return torch.addcmul(norm.bias[:, None] - mean * scale, x, scale)


def _silence(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[:, :, None], 0)


def _block(block: Any, x: Tensor, mask: Tensor | None, bias: Tensor | None, stable: bool) -> Tensor:
    """One transformer layer, pre-norm (`stable`) or post-norm, of any family."""
    attended = _attend(block.attention, block.layer_norm(x) if stable else x, mask, bias)
    x = x + block.dropout(attended)
    if stable:
        return cast(Tensor, x + block.feed_forward(block.final_layer_norm(x)))
    x = block.layer_norm(x)
    return cast(Tensor, block.final_layer_norm(x + block.feed_forward(x)))


def _attend(attention: Any, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Self-attention over the kept frames of x [B, T, D].

    The projections are called as modules, for every family: adapters that wrap a Linear act on
    WavLM too (transformers and s3prl hand its bare weights to a functional).
    """
    heads = (*x.shape[:2], attention.num_heads, attention.head_dim)
    query, key, value = (
        project(x).view(heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys = None if mask is None else mask[:, None, None, :]
    if bias is not None:
        # WavLM's gated relative position bias, computed from the layer's input [B, H, T, D / H]
        gates = attention.gru_rel_pos_linear(x.view(heads).transpose(1, 2))
        a, b = torch.sigmoid(gates.unflatten(-1, (2, 4)).sum(-1)).chunk(2, dim=-1)
        bias = (a * (b * attention.gru_rel_pos_const - 1.0) + 2.0) * bias
        keys = bias if keys is None else bias.masked_fill(~keys, float("-inf"))
        keys = keys.to(query.dtype)
    dropout = attention.dropout if attention.training else 0.0
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=keys, dropout_p=dropout)
    return cast(Tensor, attention.out_proj(x.transpose(1, 2).flatten(2)))
