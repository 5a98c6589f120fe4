"""The README beside written weights says what they are, how they were made, how to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merging.card import write_card

RECORD: dict[str, Any] = {
    "recipe": {"only": ["attention"], "pos_conv": "factors", "origin": "checked"},
    "command": "benchmark.py merge recipes/demo/merged.yaml --output merged",
    "method": "linear",
    "params": {"alpha": 0.1},
    "base": "hubert_base",
    "tuned": ["results/upstreams/finetune@0123"],
    "family": "hubert",
    "file": "",
    "licence": "Apache-2.0",
    "fingerprints": {"base": "aaa", "tuned": ["bbb"], "merged": "ccc"},
    "effective_alpha": {"cnn": float("nan"), "layer 1": 0.1},
    "pos_conv_difference": 0.0123,
    "tensors": 211,
    "slerp_fallbacks": None,
    "choose": {
        "what": "alpha", "chosen": "0.1", "usual": "0.25", "gain": {"0": 0.0, "0.1": 0.2},
        "dev": {"asr": {"0": 10.0, "0.1": 8.0}},
        "metric": {"asr": "wer"}, "regret": {"asr": 1.5},
    },
    "seconds": 3.14159,
    "peak_memory_bytes": 1_234_000_000,
    "stored_bytes": 378_000_000,
    "created": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def card(folder: Path, **changes: Any) -> str:
    write_card(folder, RECORD | changes)
    return (folder / "README.md").read_text()


def test_the_card_of_a_merge(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert text.startswith("# Merged upstream: linear, alpha 0.1\n")
    for line in (
        "- base: hubert_base",
        "- licence: Apache-2.0",
        "- cost: 3.14 s, at most 1.23 GB of memory, 378 MB stored",
        "- only: attention",
        "- fingerprints: base aaa, tuned bbb, merged ccc",
        "benchmark.py merge recipes/demo/merged.yaml --output merged",
        "| cnn | fine-tuning left it alone |",
        "| layer 1 | 0.1000 |",
        "## Why alpha 0.1",
        "A fixed 0.25 would be worse by (points): asr 1.50.",
        "| 0.1 | 8.00 | +20.0 % |",
        f"benchmark.py --upstream hf:{tmp_path.name}\n",
        f'model = AutoModel.from_pretrained("{tmp_path.name}")',
        "-u hubert_local -k s3prl.pt",
    ):
        assert line in text, line
    assert str(tmp_path.parent) not in text, "nobody else has the folders of this machine"
    assert "kernels differ by 1.23 % here" in text
    assert "slerp" not in text and "not checked" not in text
    assert text.count("```") % 2 == 0


def test_a_record_from_before_costs_were_noted_has_a_card(tmp_path: Path) -> None:
    write_card(tmp_path, {key: value for key, value in RECORD.items() if key != "seconds"})
    assert "- cost" not in (tmp_path / "README.md").read_text()


def test_what_does_not_apply_is_not_said(tmp_path: Path) -> None:
    recipe = {**RECORD["recipe"], "only": None, "origin": "unchecked", "pos_conv": "kernel"}
    changes = {"recipe": recipe, "choose": None, "slerp_fallbacks": 200, "licence": ""}
    text = card(tmp_path, **changes)
    assert "- only" not in text and "Why alpha" not in text and "- licence" not in text
    assert "slerp was linear in 200 of 211 tensors" in text
    assert "was not checked" in text and "the kernel were merged" not in text
    assert "the kernel was merged" in text


def test_a_file_of_another_kind_is_used_as_one(tmp_path: Path) -> None:
    text = card(tmp_path, file="decoar2.pt", pos_conv_difference=None)
    assert "-k decoar2.pt" in text
    assert "AutoModel" not in text and "positional convolution" not in text


@pytest.mark.parametrize("alpha, shown", [([0, 0.5], "0, 0.5"), ({"cnn": 0}, "cnn 0")])
def test_alpha_over_depth_and_by_filter_is_in_the_title(
    tmp_path: Path, alpha: Any, shown: str
) -> None:
    assert card(tmp_path, params={"alpha": alpha}).startswith(
        f"# Merged upstream: linear, alpha {shown}\n"
    )


def test_the_card_of_a_fine_tuning(tmp_path: Path) -> None:
    record = {
        "recipe": {"upstream": "hubert_demo", "steps": 800, "name": ""},
        "base": "hubert_demo", "metric": "accuracy", "best_dev": 76.5, "seconds": 75.123,
        "peak_memory_bytes": 1_234_000_000, "stored_bytes": 378_000_000,
        "learned_parameters": 4_700_000,
        "moved": {"cnn": 0.0, "layer 1": 0.13},
    }  # fmt: skip
    write_card(tmp_path, record)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Fine-tuned upstream\n")
    assert "| layer 1 | 13.000 % |" in text and "- best dev: 76.5" in text
    assert (
        "- cost: 75.1 s, at most 1.23 GB of memory, 378 MB stored, 4.7 M weights learnt\n" in text
    )
    assert "steps: 800" in text and "name:" not in text
