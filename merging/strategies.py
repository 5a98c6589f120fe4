"""The fine-tuning strategies by name; they are imported once one is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upstream.common.registry import Registry

if TYPE_CHECKING:
    from merging.tuning.strategies import Strategy

STRATEGIES: Registry[type[Strategy]] = Registry("fine-tuning strategy")
for _name, _place, _about in (
    (
        "stable",
        "strategies:Stable",
        "Speech-FT: the head alone at first, the CNN frozen throughout",
    ),
    ("regular", "strategies:Strategy", "all but the CNN from the first update, as s3prl does"),
    (
        "anchored",
        "strategies:Anchored",
        "stable, pulled to the pre-trained weights (L2-SP, L1, max)",
    ),
    ("lora", "lowrank:LoRA", "stable, but only low-rank changes of some layers learn"),
    ("dora", "lowrank:DoRA", "LoRA with the size of each row apart"),
):
    STRATEGIES.add(_name, f"merging.tuning.{_place}", _about)
