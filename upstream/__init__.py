"""Audio to hidden states. Knows nothing of tasks or of merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upstream.base import Upstream


def load(name: str, **options: Any) -> Upstream:
    """`upstream.load("hubert_base")(wavs, lens).layers`; the forms of `name`: `resolve.py`."""
    from upstream.resolve import load as resolve  # torch is imported on the first use only

    return resolve(name, **options)
