"""What computing in low precision does to hidden states, measured on the device at hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from upstream.base import Upstream, valid
from upstream.common import disk
from upstream.features.clips import Clip
from upstream.features.forward import forward
from upstream.features.store import Store

AUDIO = 60.0  # seconds that it is measured on
FILE = "precision.json"  # beside the features


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


def told(upstream: Upstream, clips: Sequence[Clip], store: Store, name: str) -> str:
    """A line on the error, measured once for each upstream; "" for one in float32."""
    precision = getattr(upstream, "precision", "float32")
    file = store.root / upstream.fingerprint() / FILE
    if precision == "float32" or file.exists() or not clips:
        return ""
    layers = error(upstream, clips)
    device = next(upstream.parameters()).device.type
    facts = {"precision": precision, "device": device, "relative_rms_by_layer": layers}
    disk.write_checked(file, facts)
    return (
        f"{name}: hidden states in {precision} on {device} are {100 * max(layers):.2g} % "
        f"(worst layer) from those in float32"
    )
