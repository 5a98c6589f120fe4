"""What draws pictures, run as a program: a request a line in, an answer a line out.

Reads JSON {"form": "svg" | "pdf", "spec": Vega-Lite} and writes JSON {"data": base64} or {"error"}.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import vl_convert

    draw: dict[str, Callable[[Any], str | bytes]] = {
        "svg": vl_convert.vegalite_to_svg,
        "pdf": vl_convert.vegalite_to_pdf,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            data = draw[request["form"]](request["spec"])
            data = data.encode() if isinstance(data, str) else data
            answer = {"data": base64.b64encode(data).decode()}
        except Exception as error:  # the renderer's kinds of error are not its caller's
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
