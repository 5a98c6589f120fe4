"""What the tests of the corpus readers share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile

from downstream.base import Example
from upstream.common.errors import UserError


def wav(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, numpy.zeros(160, dtype=numpy.float32), 16000)


def fault(call: Any, *args: Any, **options: Any) -> str:
    """The one line that the call fails with."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def splits(examples: list[Example]) -> Counter[str]:
    return Counter(example.split for example in examples)
