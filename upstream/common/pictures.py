"""Pictures, drawn in a process of their own.

What draws them is a browser's engine (V8), which takes gigabytes of address space and ends the
whole process where it gets none (`ulimit -v`, few open files). So it is another process that ends.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from upstream.common.errors import UserError
from upstream.common.packages import require_package

RENDERER = Path(__file__).with_name("renderer.py")
PATIENCE = 120.0  # seconds that a picture may take
_lock = threading.Lock()
_renderer: subprocess.Popen[str] | None = None
_fault = ""  # why nothing can be drawn in this process; once is enough to find out


def require() -> ModuleType:
    """altair, which describes pictures; what draws them is there too, or UserError says how."""
    altair = require_package("altair")
    if find_spec("vl_convert") is None:  # imported in the process that draws only
        require_package("vl_convert")
    return altair


def draw(spec: Mapping[str, Any], form: Literal["svg", "pdf"] = "svg") -> bytes:
    """A picture of a Vega-Lite specification.

    Raises UserError if the process that draws cannot be started, dies or does not answer; from
    then on at once.
    """
    global _fault
    with _lock:
        if not _fault:
            try:
                answer = _ask(json.dumps({"form": form, "spec": spec}))
            except (OSError, ValueError) as error:
                _fault = f"no picture is drawn: {_reason(error)}"
                _end()
            else:
                if "data" in answer:
                    return base64.b64decode(answer["data"])
                raise UserError(f"a picture is not drawn: {answer.get('error')}")
        raise UserError(_fault)


def _ask(request: str) -> dict[str, str]:
    """The renderer's answer. Raises OSError or ValueError where there is none."""
    global _renderer
    if _renderer is None:
        _renderer = subprocess.Popen(
            [sys.executable, str(RENDERER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for its parent
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert _renderer.stdin and _renderer.stdout
    _renderer.stdin.write(request + "\n")
    _renderer.stdin.flush()
    ready, _, _ = select.select([_renderer.stdout], [], [], PATIENCE)
    if not ready:
        raise TimeoutError(f"no answer in {PATIENCE:.0f} s")
    return dict(json.loads(_renderer.stdout.readline()))


def _reason(error: Exception) -> str:
    """Why there was no answer, with the way out."""
    if _renderer is None or isinstance(error, TimeoutError):
        return f"the process that draws cannot be used ({error})"
    with contextlib.suppress(subprocess.TimeoutExpired):
        _renderer.wait(5)
    return (
        f"the process that draws ended (status {_renderer.returncode}); it needs some GB of "
        "address space and a few dozen open files: see ulimit -v and ulimit -n"
    )


@atexit.register
def _end() -> None:
    """Let the renderer go: it ends with its input."""
    global _renderer
    renderer, _renderer = _renderer, None
    if renderer is None:
        return
    for stream in (renderer.stdin, renderer.stdout):
        with contextlib.suppress(OSError, ValueError):
            if stream:
                stream.close()
    try:
        renderer.wait(2)
    except subprocess.TimeoutExpired:
        renderer.kill()
        renderer.wait()
