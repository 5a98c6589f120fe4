"""The README that travels with fine-tuned or merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from downstream.results import write_atomic


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """README.md beside the weights: what they are, how they were made, how to use them."""
    title = "Merged" if "effective_alpha" in record else "Fine-tuned"
    lines = [f"# {title} upstream", ""]
    for key in ("base", "tuned", "method", "params", "metric", "best_dev", "created", "seconds"):
        if key in record:
            value = record[key]
            lines.append(f"- {key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else
                         f"- {key.replace('_', ' ')}: {value}")  # fmt: skip
    for key, what in (("moved", "moved from the base by"), ("effective_alpha", "effective alpha")):
        if key in record:
            lines += ["", f"| module | {what} |", "|---|---|"]
            for module, value in record[key].items():
                shown = f"{100 * value:.3f} %" if key == "moved" else f"{value:.4f}"
                lines.append(f"| {module} | {shown} |")
    if "recipe" in record:
        lines += ["", "Recipe:", "", "```yaml"]
        lines += [f"{key}: {value}" for key, value in record["recipe"].items() if value != ""]
        lines.append("```")
    lines += ["", f"Use it: `benchmark.py --upstream hf:{folder}`", ""]
    write_atomic(folder / "README.md", "\n".join(lines))
