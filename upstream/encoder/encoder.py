"""HuBERT, WavLM, wav2vec 2.0 and data2vec: published weights, and a forward of our own.

The forward is ours because padding must have no say: a padded batch equals each utterance alone.
transformers and s3prl take GroupNorm statistics over the padding and let it leak into the
positional convolutions, which moves the features of a short utterance by 30 to 40 %.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstream.base import Hidden, Upstream, fingerprint, valid
from upstream.checkpoints import HEARD, RECORDS
from upstream.checkpoints import write as export
from upstream.checkpoints.containers import plain, read_json
from upstream.checkpoints.read import Checkpoint, compare, read
from upstream.checkpoints.tensor_files import guarded
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.common.notice import notice
from upstream.encoder.config import FAMILIES, Config, Padding, Precision
from upstream.encoder.transformer import Model

# On a GPU convolutions would use TF32, whose ten bits of mantissa break the promise of parity.
torch.backends.cudnn.allow_tf32 = False

EPS = 1e-5  # of the waveform's layer norm: fairseq's (transformers uses 1e-7)
# The fields of a config that change the output, and of these the CNN's.
FIELDS = [known.name for known in dataclasses.fields(Config)]
ARCHITECTURE = [name for name in FIELDS if name != "given" and "dropout" not in name]
CONVOLUTION = (
    "conv_dim conv_kernel conv_stride conv_bias feat_extract_norm feat_extract_activation"
).split()
QUESTIONS = {  # that a file may leave open
    "family": "which model it is",
    "normalize": "whether its audio is normalised",
}
# What transformers can add to these models and this forward does not do: refuse, never ignore.
REFUSED = ("conv_pos_batch_norm", "add_adapter", "adapter_attn_dim")


class Encoder(Upstream):
    """A transformer speech encoder.

    Its layers are the input of each transformer layer and then the final output (spec: s3prl's
    hooks, and transformers' `output_hidden_states`): 13 for Base, 25 for Large.
    `padding="exact"`: a padded batch equals each utterance alone, and an utterance shorter than
    the CNN's window (400 samples) counts as zero-padded to one window. `padding="s3prl"`: what
    s3prl 0.4.18 computes, padding effects included, with its `round(samples / 320)` lengths.
    `precision`: of matrix products and convolutions (torch's autocast); norms, sums and the
    layers that come out stay float32. On a CPU, bfloat16 is 14 times slower than float32.
    """

    def __init__(
        self, weights: Checkpoint, padding: Padding = "exact", precision: Precision = "float32"
    ) -> None:
        """Raises UserError for a family, config or set of tensors that does not fit."""
        super().__init__()
        self.family, settings, self.source = weights.family, weights.config, weights.source
        self.normalize = weights.normalize
        self.padding, self.precision = padding, precision
        self.padding_matters = padding == "s3prl"
        self.options = {"padding": padding, "precision": precision, "normalize": self.normalize}
        if self.family not in list(FAMILIES):  # a file may not name code to run
            hint = near_miss(self.family, FAMILIES)
            raise UserError(f"{self.source}: unknown family {self.family!r}{hint}")
        for option in filter(settings.get, REFUSED):
            raise UserError(f"{self.source}: {option} is not supported; use a plain encoder")
        settings = {**settings, "model_type": self.family}
        self.config = Config.read(settings, FAMILIES[self.family], self.source)
        with torch.device("meta"):  # no second copy of the weights
            self.model = Model(self.config)
        _fill(self.model, weights)
        self.stable = self.config.do_stable_layer_norm
        self.num_layers = self.config.num_hidden_layers + 1
        self.dim = self.config.hidden_size
        self.window, self.stride = 1, 1  # receptive field and hop of the CNN, in samples
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            self.window += (kernel - 1) * self.stride
            self.stride *= stride
        self.recorded = ""  # their fingerprint, as a record beside the weights has it
        self.loaded = self._versions()
        self.eval()

    def cnn(self) -> nn.Module:
        """The convolutional feature extractor (Speech-FT freezes it)."""
        return self.model.feature_extractor

    def identity(self) -> dict[str, Any]:
        return {"family": self.family, "padding": self.padding} | self._facts(ARCHITECTURE)

    def _facts(self, fields: Iterable[str]) -> dict[str, Any]:
        """Fields of the config, and the options that change what even the CNN puts out."""
        low = {} if self.precision == "float32" else {"precision": self.precision}
        config = {name: getattr(self.config, name) for name in fields}
        return {**config, "normalize": self.normalize, **low}

    def fingerprint(self) -> str:
        """12 hex digits over `identity()` and the weights.

        Raises UserError if these, though not changed since, are not those that were built here.
        """
        current = super().fingerprint()
        if self.recorded in ("", current) or self.loaded != self._versions():
            return current
        facts, state = self.identity(), self.state_dict()
        facts.pop("precision", None)
        low: list[dict[str, Any]] = [{}, {"precision": "bfloat16"}, {"precision": "float16"}]
        # with one or another option the record must be of these weights
        for precision, padding, normal in itertools.product(low, get_args(Padding), (True, False)):
            options = {"padding": padding, "normalize": normal, **precision}
            if fingerprint({**facts, **options}, state) == self.recorded:
                return current
        raise UserError(
            f"{self.source}: its weights are not those that were written (fingerprint "
            f"{self.recorded}): damaged or replaced; delete the folder and run again"
        )

    def _versions(self) -> list[tuple[int, int]]:
        """What changes with any change to a weight."""
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.parameters()]

    def cnn_fingerprint(self) -> str | None:
        """The same over what `convolve` depends on (no family); None where padding has a say."""
        exact = self.padding == "exact"
        return fingerprint(self._facts(CONVOLUTION), self.cnn().state_dict()) if exact else None

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        low = self.precision != "float32"
        # a region without autocast, rather than none: the caller's own autocast has no say
        return torch.autocast(device.type, getattr(torch, self.precision), enabled=low)

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
        exact = self.padding == "exact"  # samples that a GroupNorm's statistics are over:
        normed = lens.clamp(min=self.window) if exact else torch.full_like(lens, wavs.shape[1])
        with self._autocast(wavs.device):
            x = self.model.feature_extractor(wavs, normed).float()
        kept = self._kept(lens, wavs.shape[1], x.shape[1])
        if exact:
            return x, kept, kept
        rounded = torch.round(lens.double() / self.stride).long()  # s3prl's featurizer: half to
        return x, kept, rounded.clamp(1, x.shape[1])  # even, capped at what there is

    def contextual(
        self, x: Tensor, kept: Tensor, lens: Tensor, hidden: Tensor | None = None
    ) -> Hidden:
        """The rest of the encoder, from what `convolve` returns -> Hidden of [L, B, T, D].

        hidden [B, T] bool: frames that it must not see, as in pre-training (masked prediction).
        Raises UserError if the encoder came without an embedding to put in their place.
        """
        if hidden is not None and not hasattr(self.model, "masked_spec_embed"):
            raise UserError(f"{self.source}: holds no masked_spec_embed, so no frame can be hidden")
        mask = None if bool((kept >= x.shape[1]).all()) else valid(kept, x.shape[1])
        with self._autocast(x.device):
            x = self.model.feature_projection(x).float()  # the sums over layers stay float32
            if hidden is not None:
                x = torch.where(hidden[:, :, None], cast(Tensor, self.model.masked_spec_embed), x)
            states = self.model.encoder(x, mask, exact=self.padding == "exact")
        return Hidden(torch.stack(states), lens)

    def _kept(self, lens: Tensor, padded: int, length: int) -> Tensor:
        """[B]: how many of `length` frames the mask keeps."""
        if self.padding == "exact" or not FAMILIES[self.family].chunk_mask:
            return self.frames(lens)
        chunk = padded // length  # forward_padding_mask in s3prl/upstream/hubert/hubert_model.py:
        return ((lens + chunk - 1) // chunk).clamp(1, length)  # padding is what all its samples are

    def save(self, folder: str | Path) -> None:
        """Write the folder that transformers' `from_pretrained` and `hf:folder` read."""
        export.to_folder(self, folder)


def load(
    path: str | Path,
    *,
    normalize: bool | None = None,
    padding: Padding = "exact",
    precision: Precision = "float32",
    family: str | None = None,
    name: str | None = None,
) -> Encoder:
    """An encoder from a checkpoint file or an HF folder; `normalize` overrides what it asks for.

    What no file says and had to be guessed is said on stderr, with the option that settles it;
    `name`: what to call the upstream there. Beside weights that were built here lie what they have
    heard, and their fingerprint. Raises UserError for what `read` or Encoder refuses.
    """
    path = Path(path)
    weights = read(path, family)
    if normalize is not None:
        weights = weights._replace(normalize=normalize)
    settled = {"normalize": normalize, "family": family}
    for option, reason in weights.guesses.items():
        if settled[option] is None:
            other = str(not weights.normalize).lower()
            if option == "family":
                other = "wav2vec2" if weights.family == "hubert" else "hubert"
            notice(
                f"{name or path}: no file says {QUESTIONS[option]}; took {option}={reason} "
                f"(write {name or path}:{option}={other} if that is wrong)"
            )
    encoder = Encoder(weights, padding, precision)
    encoder.recorded = _recorded(path)
    heard = (path if path.is_dir() else path.parent) / HEARD
    if heard.exists():
        with guarded(heard, "not text; one clip a line is due"):
            encoder.heard = frozenset(filter(None, disk.read(heard).decode().split("\n")))
    return encoder


def _recorded(folder: Path) -> str:
    """The fingerprint in the record of an HF folder; empty if there is none."""
    for path in (folder / name for name in RECORDS):
        if path.is_file():
            record = read_json(path)
            # without a base's fingerprint, files were merged as they are: theirs is no encoder's
            several = plain(record.get("fingerprints")) if "base_fingerprint" in record else {}
            return str(record.get("fingerprint", several.get("merged", "")))
    return ""


def _fill(model: Model, weights: Checkpoint) -> None:
    """Give `model` exactly these weights, in float32."""
    # The embedding of masked frames takes no part in a forward without masking, and which configs
    # create it differs between families: the file decides.
    if (embedding := weights.state.get("masked_spec_embed")) is not None:
        model.masked_spec_embed = nn.Parameter(torch.empty_like(embedding, device="meta"))
    compare(model.state_dict(), weights)
    state = {name: tensor.float().contiguous() for name, tensor in weights.state.items()}
    for name, tensor in state.items():
        # the sum first: one cheap number tells in all but very rare cases
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise UserError(f"{weights.source}: {name} holds NaN or infinite values; use another")
    model.load_state_dict(state, assign=True)


def _normalised(wavs: Tensor, lens: list[int]) -> Tensor:
    """Zero mean and unit variance over each utterance's own samples."""
    rows = [F.layer_norm(wav[:n], (n,), eps=EPS) if n else wav[:0] for wav, n in zip(wavs, lens)]
    return torch.stack([F.pad(row, (0, wavs.shape[1] - len(row))) for row in rows])
