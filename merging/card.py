"""The README that travels with fine-tuned or merged weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from downstream.report.layout import plain
from merging.cost import cost_text
from upstream.checkpoints.write import CONVERTED
from upstream.common import disk
from upstream.common.text import portable

FIGURE = "log.svg"  # of a fine-tuning run, beside its card


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """README.md beside the weights: what they are, how they were made, how to use them."""
    lines = _merged(folder, record) if "effective_alpha" in record else _finetuned(folder, record)
    text = "\n".join(map(portable, lines))  # no reader has the folders of this machine
    disk.write(folder / "README.md", text.rstrip() + "\n")


def _finetuned(folder: Path, record: Mapping[str, Any]) -> list[str]:
    frozen = record.get("frozen", ())
    rows = (
        (module, f"{100 * share:.3f} %", _still(module, share, frozen))
        for module, share in record["moved"].items()
    )
    recipe = (f"{key}: {value}" for key, value in record["recipe"].items() if value != "")
    drawn = (folder / FIGURE).is_file()
    return [
        "# Fine-tuned upstream\n",
        *_facts(
            {**record, "cost": cost_text(record)}, ("base", "metric", "best_dev", "created", "cost")
        ),
        *(f"- {line}" for line in record.get("warnings", ())),
        "",
        *_table(("module", "moved from the base by", ""), rows),
        *([f"![Loss, learning rates, gradient norm, dev scores]({FIGURE})\n"] if drawn else []),
        "Recipe:\n",
        *_block("yaml", *recipe),
        *_use(folder, record),
    ]


def _still(module: str, share: float, frozen: Collection[str]) -> str:
    """Why a module is where it was."""
    if share:
        return ""
    return "frozen by the strategy" if module in frozen else "never moved"


def _merged(folder: Path, record: Mapping[str, Any]) -> list[str]:
    count, prints = len(record["tuned"]), record["fingerprints"]
    forms = "a fine-tuned form of it" if count == 1 else f"{count} fine-tuned forms of it"
    rows = ((module, effective_text(alpha)) for module, alpha in record["effective_alpha"].items())
    alpha = _shown(record["params"].get("alpha", "default"))
    return [
        f"# Merged upstream: {record['method']}, alpha {alpha}\n",
        f"A speech encoder whose weights lie between a pre-trained one and {forms}: fine-tuning",
        "teaches a task, merging back keeps what the encoder could do before (Speech-FT,",
        "arXiv 2502.12672). alpha is the weight of the fine-tuned side: 0 is the base.\n",
        "## How it was made\n",
        *_facts(record, ("base", "tuned", "method", "params", "licence", "created")),
        *_facts({"cost": cost_text(record)}, ("cost",)),
        *_facts(record["recipe"], ("only", "pos_conv", "several", "origin")),
        f"- fingerprints: {_shown({key: prints[key] for key in ('base', 'tuned', 'merged')})}\n",
        "Again, byte for byte the same weights:\n",
        *_block("", record["command"]),
        "## How far each module went\n",
        "The effective alpha is the share of the way from the base to the (mean) fine-tuned model,",
        "measured along that way: <m - b, t - b> / |t - b|^2.\n",
        *_table(("module", "effective alpha"), rows),
        *_choice(record.get("choose")),
        *_use(folder, record),
        "## Caveats\n",
        *(f"- {line}" for line in _caveats(record)),
    ]


def _facts(record: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    known = (key for key in keys if record.get(key) not in (None, "", {}))
    return [f"- {key.replace('_', ' ')}: {plain(_shown(record[key]))}" for key in known]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return str(value)


def effective_text(alpha: float) -> str:
    """NaN: there was no way to go."""
    return "fine-tuning left it alone" if math.isnan(alpha) else f"{alpha:.4f}"


def _choice(choice: Mapping[str, Any] | None) -> list[str]:
    if not choice:
        return []
    tasks, what, usual = list(choice["dev"]), choice["what"], choice["usual"]
    rows = (
        (name, *(f"{choice['dev'][task][name]:.2f}" for task in tasks), f"{100 * gain:+.1f} %")
        for name, gain in choice["gain"].items()
    )
    regret = ", ".join(f"{task} {points:.2f}" for task, points in choice["regret"].items())
    rule, other = "has the best", f"A fixed {usual}"
    if what == "members":  # numbers of the tuned models that the recipe names, from 0
        rule, other = "is the greedy soup by", f"All of them ({usual})"
    return [
        f"## Why {what} {choice['chosen']}\n",
        f"It {rule} mean relative gain on the dev sets of {', '.join(tasks)}.",
        f"{other} would be worse by (points): {regret}.\n",
        *_table((what, *(f"{t} ({choice['metric'][t]})" for t in tasks), "gain"), rows),
    ]


def _use(folder: Path, record: Mapping[str, Any]) -> list[str]:
    lines, family = ["## How to use it\n"], record.get("family", "")
    if record.get("file"):  # a file of the base's own kind
        file = folder / record["file"]
        return [*lines, f"As the base's own file: `{file}` (s3prl: `-k {file}`).\n"]
    lines += ["Here:\n", *_block("", f"benchmark.py --upstream hf:{folder}")]
    code = ("from transformers import AutoModel", f'model = AutoModel.from_pretrained("{folder}")')
    lines += ["In transformers:\n", *_block("python", *code)]
    if family in CONVERTED:
        name, converted = family.removesuffix("-audio"), folder / "s3prl.pt"
        export = f"benchmark.py export hf:{folder} --format s3prl --output {converted}"
        run = f"python run_downstream.py -m train -u {name}_local -k {converted} -d asr -n run"
        lines += ["In s3prl:\n", *_block("", export, run)]
    return lines


def _caveats(record: Mapping[str, Any]) -> list[str]:
    lines = ["Not scored by being written: `benchmark.py --upstream` compares it with its base."]
    if (apart := record.get("pos_conv_difference")) is not None:
        factors = record["recipe"]["pos_conv"] == "factors"
        done = "its factors g and v were" if factors else "the kernel was"
        lines.append(
            f"The positional convolution is weight-normed: {done} merged; merging factors and "
            f"merging kernels differ by {100 * apart:.3g} % here."
        )
    if (fallbacks := record.get("slerp_fallbacks")) is not None:
        lines.append(f"slerp was linear in {fallbacks} of {record['tensors']} tensors.")
    if record["recipe"]["origin"] == "unchecked":
        lines.append("That all models grew from the base was not checked.")
    if choice := record.get("choose"):
        lines.append(f"{choice['what']} saw the dev sets named above: compare on test sets only.")
    lines.append("Pre-training heads and integer buffers are the base's.")
    return lines


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    titles = list(head)
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)] + [""]


def _block(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]
