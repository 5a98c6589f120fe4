"""Any upstream of s3prl as an Upstream: `s3prl:fbank`, `s3prl:hubert:ckpt=/path/to/converted.pt`.

`import s3prl.hub` fails on torchaudio >= 2.9, the single upstreams' modules import well: a name is
looked up in their sources and only the module that defines it is imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstream.base import SAMPLE_RATE, Hidden, Upstream
from upstream.common.errors import UserError, near_miss

SHORTEST = 800  # samples: s3prl/nn/upstream.py pads anything below 0.05 s


class S3PRL(Upstream):
    """Wraps one of s3prl's experts: a module called with a list of unpadded waves.

    Its padding is s3prl's, so the features of a wave may depend on its batch; lengths are
    s3prl's `round(samples / rate)`, capped at what there is (Featurizer.tolist).
    """

    def __init__(self, expert: nn.Module, name: str) -> None:
        super().__init__()
        self.expert = expert.eval()
        self.name = name
        self.source = f"s3prl {version('s3prl')}: {name}"
        try:
            self.stride = int(self.expert.get_downsample_rates("hidden_states"))  # type: ignore[operator]
            with torch.no_grad():
                states = self._states([torch.zeros(SAMPLE_RATE)])
        except Exception as error:  # someone else's code: whatever it raises, it cannot be used
            raise UserError(f"s3prl:{name} does not run here ({_line(error)})") from error
        self.num_layers, self.dim = len(states), states[0].shape[-1]

    def identity(self) -> dict[str, Any]:
        return {"s3prl": version("s3prl"), "name": self.name, "padding": "s3prl"}

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


def load(name: str, *, ckpt: str | None = None) -> S3PRL:
    """The s3prl upstream `name`, with its own checkpoint or with the one given.

    Raises UserError for an unknown name, and for one that cannot be imported, downloaded or run.
    """
    entries = _entries()
    if name not in entries:
        raise UserError(f"s3prl has no upstream {name!r}{near_miss(name, entries)}")
    if ckpt is not None and not Path(ckpt).is_file():
        raise UserError(f"s3prl:{name}: no checkpoint {ckpt}")
    try:
        return S3PRL(_expert(f"s3prl.upstream.{entries[name]}", name, ckpt), name)
    except UserError:
        raise
    except Exception as error:  # as above; a download that fails offline ends here too
        way = "" if ckpt else f"; if it needs weights, give them: s3prl:{name}:ckpt=FILE"
        raise UserError(f"s3prl:{name} does not load here ({_line(error)}){way}") from error


def _expert(package: str, name: str, ckpt: str | None) -> nn.Module:
    if ckpt is None:
        entry: Callable[[], nn.Module] = getattr(
            importlib.import_module(f"{package}.hubconf"), name
        )
        return entry()
    # not the hub's entry: for most names it drops a given checkpoint without a word
    expert: nn.Module = importlib.import_module(f"{package}.expert").UpstreamExpert(ckpt)
    return expert


def _entries() -> dict[str, str]:
    """Every hub name of s3prl and the package that defines it, found without importing any."""
    found = importlib.util.find_spec("s3prl")
    if found is None or found.origin is None:
        raise UserError("s3prl is not installed; pip install s3prl==0.4.18")
    entries: dict[str, str] = {}
    for path in sorted(Path(found.origin).parent.glob("upstream/*/hubconf.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                entries.setdefault(node.name, path.parent.name)
    return entries


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:160]}"
