"""One of s3prl's experts as an Upstream."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstream.base import SAMPLE_RATE, Hidden, Upstream
from upstream.common.errors import UserError
from upstream.common.packages import import_failure, require_package

DISTRIBUTIONS = ("s3prl", "espnet-s3prl")  # the second is the maintained fork
SHORTEST = 800  # samples: s3prl/nn/upstream.py pads anything below 0.05 s


class S3PRL(Upstream):
    """Wraps one of s3prl's experts: a module called with a list of unpadded waves.

    Its padding is s3prl's, so the features of a wave may depend on its batch; lengths are
    s3prl's `round(samples / rate)`, capped at what there is (Featurizer.tolist).
    """

    padding_matters = True

    def __init__(self, expert: nn.Module, name: str) -> None:
        super().__init__()
        self.expert = expert.eval()
        self.name = name
        self.source = f"{' '.join(release())}: {name}"
        self.stride = int(self.expert.get_downsample_rates("hidden_states"))  # type: ignore[operator]
        with torch.no_grad():
            states = self._states([torch.zeros(SAMPLE_RATE)])
        self.num_layers, self.dim = len(states), states[0].shape[-1]

    def identity(self) -> dict[str, Any]:
        distribution, version = release()
        made_by = version if distribution == "s3prl" else f"{distribution} {version}"
        return {"s3prl": made_by, "name": self.name, "padding": "s3prl"}

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        """wavs [B, N], lens [B] in samples -> Hidden of [L, B, T, D]."""
        waves = [wav[:n] for wav, n in zip(wavs, lens.tolist())]
        states = self._states([F.pad(wave, (0, max(0, SHORTEST - len(wave)))) for wave in waves])
        kept = torch.round(lens.double() / self.stride).long().to(wavs.device)
        return Hidden(torch.stack(states).float(), kept.clamp(1, states[0].shape[1]))

    def _states(self, waves: list[Tensor]) -> list[Tensor]:
        states = list(self.expert(waves)["hidden_states"])
        if len({state.shape for state in states}) != 1:
            raise UserError(f"s3prl:{self.name}: its layers differ in size and cannot be summed")
        return states


def release() -> tuple[str, str]:
    """The distribution that the package s3prl comes from and its version; two bring it.

    Both may be installed, in one place or in two: the files that are imported say which it is.
    """
    spec = importlib.util.find_spec("s3prl")
    folder = Path(str(spec.origin if spec else None)).parent
    try:
        written = (folder / "version.txt").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        written = "of unknown version"
    for name in DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if _numbers(version) == _numbers(written):  # 2026.05.14 is 2026.5.14
            return name, version
    return "s3prl", written  # a clone on the path


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def wrapped(package: str, name: str, ckpt: Path | None) -> S3PRL:
    """The upstream of a name of s3prl's hub, or of its package with these weights. UserError."""
    try:
        if ckpt is None:
            hub = require_package(f"s3prl.upstream.{package}.hubconf")
            return S3PRL(getattr(hub, name)(), name)
        # not the hub's entry: for most names it drops a given checkpoint without a word
        module = require_package(f"s3prl.upstream.{package}.expert")
        return S3PRL(module.UpstreamExpert(str(ckpt)), name)
    except UserError:
        raise
    except Exception as error:  # someone else's code; a download that fails offline ends here too
        if line := import_failure(error):
            raise UserError(line) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        way = "" if ckpt else f"; if it needs weights, give them: s3prl:{name}:ckpt=FILE"
        raise UserError(f"s3prl:{name} does not run here ({reason}){way}") from error
