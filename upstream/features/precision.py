"""What computing in low precision does to hidden states, measured on the device at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from upstream.base import Upstream, valid
from upstream.common import disk
from upstream.common.errors import UserError
from upstream.features.clips import Clip
from upstream.features.forward import forward
from upstream.features.store import PRECISION as FILE
from upstream.features.store import Store

AUDIO = 60.0  # seconds that it is measured on
# Rounding alone is below 1 % in the demo's encoder and a few per cent in deep ones; a faulty kernel
# gives 100 % and more.
LIMIT = 0.2


def error(upstream: Upstream, clips: Sequence[Clip]) -> list[float]:
    """By layer, the relative RMS difference from float32 on the first clips, padding left out."""
    ends = torch.tensor([clip.seconds for clip in clips]).cumsum(0).tolist()
    few = [clip for clip, _ in takewhile(lambda pair: pair[1] <= AUDIO, zip(clips, ends))]
    wavs = [clip.load() for clip in few or clips[:1]]
    encoder: Any = upstream  # of a kind that has a precision
    low, precision = forward(encoder, wavs), encoder.precision
    try:
        encoder.precision = "float32"
        full = forward(encoder, wavs)
    finally:
        encoder.precision = precision
    kept = valid(full.lens, full.layers.shape[2])[None, :, :, None]
    apart, size = (low.layers - full.layers) * kept, full.layers * kept
    ratio = apart.double().square().sum((1, 2, 3)) / size.double().square().sum((1, 2, 3))
    return [float(each) for each in ratio.sqrt()]


def require_near(upstream: Upstream, clips: Sequence[Clip], store: Store, name: str) -> str:
    """A line on the error, measured once for each upstream; "" for one in float32.

    Raises UserError for an error above LIMIT, before any such features are kept.
    """
    precision = getattr(upstream, "precision", "float32")
    fingerprint = upstream.fingerprint()
    if precision == "float32" or not clips:
        return ""
    require_recorded(fingerprint, store, name)
    if _recorded(fingerprint, store):
        return ""
    layers = error(upstream, clips)
    device = next(upstream.parameters()).device.type
    line = (
        f"{name}: hidden states in {precision} on {device} are {_per_cent(layers)} "
        f"(worst layer) from those in float32"
    )
    if not _is_near(layers):
        raise UserError(f"{line}, above the limit of {_per_cent([LIMIT])}; use precision=float32")
    facts = {"precision": precision, "device": device, "relative_rms_by_layer": layers}
    disk.write_checked(store.root / fingerprint / FILE, facts)
    return line


def require_recorded(fingerprint: str, store: Store, name: str) -> None:
    """Raises UserError if the features kept of an upstream were made with an error above LIMIT."""
    layers = _recorded(fingerprint, store)
    if not _is_near(layers):
        raise UserError(
            f"{name}: its features on disk are {_per_cent(layers)} (worst layer) from those in "
            f"float32, above the limit of {_per_cent([LIMIT])}; remove them with: benchmark.py "
            f"cache clear {fingerprint}"
        )


def _recorded(fingerprint: str, store: Store) -> list[float]:
    """The error by layer, as it was measured once; empty if none was, or nothing is kept of it."""
    folder = store.root / fingerprint
    facts = disk.read_checked(folder / FILE)
    layers = facts.get("relative_rms_by_layer") if isinstance(facts, dict) else None
    if not isinstance(layers, list) or not all(isinstance(x, (int, float)) for x in layers):
        return []
    has_features = any(path.is_dir() for path in folder.iterdir())
    return layers if has_features or _is_near(layers) else []


def _is_near(layers: Sequence[float]) -> bool:
    return all(layer <= LIMIT for layer in layers)  # NaN is not


def _per_cent(layers: Sequence[float]) -> str:
    worst = math.nan if any(map(math.isnan, layers)) else max(layers)
    return f"{100 * worst:.2g} %"
