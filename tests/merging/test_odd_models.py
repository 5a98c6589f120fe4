"""Models to merge that are as training leaves them, and lines that say what to do with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor

from merging.merged import write
from merging.recipe import recipe_of
from upstream.checkpoints.tensor_names import KERNEL, MASK
from upstream.common.errors import UserError
from upstream.encoder.encoder import load

State = dict[str, Tensor]


def _load(path: Path) -> State:
    state: State = safetensors.torch.load_file(path)
    return state


def pair(folder: Path, variant: str = "hubert") -> tuple[Path, Path]:
    """A base, and what a light fine-tuning made of it."""
    base = tiny.hf_folder(folder / "base", variant)
    tuned = tiny.hf_folder(folder / "tuned", variant)
    tiny.rewrite(tuned, lambda state: {n: t + 0.01 * t.abs().mean() for n, t in state.items()})
    return base, tuned


def merged(base: Path | str, tuned: Path | str, output: Path, form: str = "hf") -> Path:
    recipe = recipe_of(str(base), [str(tuned)], None, {"alpha": 0.5})
    write(recipe, Path(), output, output.parent / "results", form)
    return output


LACKING = [
    lambda state: {n: t for n, t in state.items() if n != MASK},
    lambda state: {n.replace(MASK, "mask_time_emb_vector"): t for n, t in state.items()},
    lambda state: {**state, MASK: torch.full((32,), float("nan"))},
    lambda state: {**state, "lm_head.weight": torch.ones(5, 32), "final_proj.bias": torch.ones(3)},
    lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
]


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("form", ["hf", "same"])
@pytest.mark.parametrize("change", LACKING)
def test_what_no_forward_needs_may_be_absent(
    change: Callable[[State], State], form: str, side: str, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path)
    whole = load(merged(base, tuned, tmp_path / "whole")).model.state_dict()
    tiny.rewrite(base if side == "base" else tuned, change)
    state = load(merged(base, tuned, tmp_path / "out", form)).model.state_dict()
    ours = load(base).model.state_dict()
    assert state.keys() == ours.keys(), "the base's tensors are the merge's"
    for name in state.keys() - {MASK}:
        assert torch.equal(state[name], whole[name])
    if MASK in state and MASK not in load(tuned).model.state_dict():
        assert torch.equal(state[MASK], ours[MASK])


def test_heads_of_other_sizes_stay_the_bases(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    for folder, size in ((base, 5), (tuned, 7)):
        tiny.rewrite(folder, lambda s, size=size: {**s, "lm_head.weight": torch.ones(size, 32)})  # type: ignore[misc]
    merged(base, tuned, tmp_path / "out", "same")
    assert _load(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (5, 32)


@pytest.mark.parametrize("form", ["hf", "same"])
def test_folded_weight_norm_is_merged(form: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    kernel = "encoder.pos_conv_embed.conv.weight"

    def folded(state: State) -> State:
        gain, direction = state.pop(f"{KERNEL}0"), state.pop(f"{KERNEL}1")
        whole = torch._weight_norm(direction, gain, 2)
        return {**state, kernel: whole}

    plain = load(merged(base, tuned, tmp_path / "plain"))
    tiny.rewrite(base, folded)
    tiny.rewrite(tuned, folded)
    out = load(merged(base, tuned, tmp_path / "out", form))
    assert (kernel in _load(tmp_path / "out" / "model.safetensors")) is (form == "same")
    positions = [model.model.encoder.pos_conv_embed.conv.weight for model in (plain, out)]
    # v is interpolated as it lies in the files, and here its length is another
    assert torch.allclose(*positions, atol=0.02)


def test_options_are_named_as_one_types_them(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (tuned / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    with pytest.raises(UserError) as error:
        merged(base, tuned, tmp_path / "out")
    line = str(error.value)
    assert f"{tuned}: is not like {base}: normalize true, not false" in line
    option = line.rpartition("write ")[2]
    assert option == f"{tuned}:normalize=false"
    merged(base, option, tmp_path / "out")
    with pytest.raises(UserError, match=r"write .*:padding=exact:normalize=false"):
        merged(base, f"{tuned}:padding=s3prl", tmp_path / "out")
    with pytest.raises(UserError, match=r"precision bfloat16, not float32.*:precision=float32"):
        merged(base, f"{option}:precision=bfloat16", tmp_path / "out")
    other = tiny.hf_folder(tmp_path / "other", "wav2vec2")
    with pytest.raises(UserError, match=r"family wav2vec2, not hubert"):
        merged(base, other, tmp_path / "out")
    large = tiny.hf_folder(tmp_path / "large", "hubert-large")
    with pytest.raises(UserError, match=r"merge it with the checkpoint that it was fine-tuned fr"):
        merged(base, large, tmp_path / "out")
