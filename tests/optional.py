"""Peers that results are compared with (s3prl, torchaudio): where they do not load, tests skip."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


class Missing:
    """In the place of a module that does not load: whatever of it is called skips the test."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Missing:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        pytest.skip(self.reason)


def optional(name: str) -> Any:
    """The module, or a stand-in whose first call skips the calling test."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as error:  # absent, or built for another torch
        return Missing(f"{name} does not load ({type(error).__name__}: {error})")


def required(name: str) -> Any:
    """The module; where it does not load, the calling test (or file) is skipped at once."""
    module = optional(name)
    if isinstance(module, Missing):
        pytest.skip(module.reason, allow_module_level=True)
    return module
