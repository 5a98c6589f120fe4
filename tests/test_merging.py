"""Stage 1 and stage 2: what is frozen stays, the schedule, and the properties of a merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merging
import upstream
from merging import finetune, interpolation
from merging.methods import METHODS
from merging.modules import effective_alpha
from tests import tiny
from upstream.errors import UserError

NUMBERS = st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4)


def test_schedule_is_the_papers() -> None:
    """Golden values, spec section 3.1."""
    rate = [finetune.schedule(s, 50_000) for s in (0, 2_500, 5_000, 24_999, 37_500, 50_000)]
    assert rate == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]


@settings(max_examples=50, deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS)
def test_linear_properties(base: list[float], one: list[float], two: list[float]) -> None:
    b, s, t = torch.tensor(base), torch.tensor(one), torch.tensor(two)
    linear = METHODS["linear"]
    assert torch.equal(linear(b, [s], alpha=0.0), b)
    assert torch.allclose(linear(b, [s], alpha=1.0), s, atol=1e-5)
    assert torch.allclose(linear(b, [s, t], alpha=0.3), linear(b, [t, s], alpha=0.3), atol=1e-6)


def test_merge_is_float32_and_leaves_the_pretraining_head_and_integers() -> None:
    base = {
        "w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "n": torch.tensor([3]),
        "final_proj.weight": torch.ones(2), "label_embs_concat": torch.ones(2),
    }  # fmt: skip
    tuned = {k: v + 1 for k, v in base.items()}
    merged = merging.merge(base, [tuned], alpha=0.25)
    assert merged["w"].dtype == torch.float32
    assert torch.equal(merged["w"], torch.tensor([1.25, 2.25]))
    for kept in ("n", "final_proj.weight", "label_embs_concat"):
        assert torch.equal(merged[kept], base[kept])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("a"), "a is missing"),
        (lambda s: s.update(c=torch.ones(1)), "c is not in the base"),
        (lambda s: s.update(a=torch.ones(3)), r"a is \(3,\), not \(2,\)"),
        (lambda s: s.update(a=torch.full((2,), float("nan"))), "merge of a is not finite"),
    ],
)
def test_mismatched_models_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    base = {"a": torch.ones(2), "b": torch.ones(1)}
    tuned = dict(base)
    change(tuned)
    with pytest.raises(UserError, match=message):
        merging.merge(base, [tuned])


def test_wrong_method_and_parameter_have_near_matches() -> None:
    base = {"a": torch.ones(2)}
    with pytest.raises(UserError, match="did you mean linear"):
        merging.merge(base, [base], method="linaer")
    with pytest.raises(UserError, match="did you mean alpha"):
        merging.merge(base, [base], alhpa=0.5)
    with pytest.raises(UserError, match="alpha: must be float"):
        merging.merge(base, [base], alpha="much")


def test_effective_alpha_is_the_alpha_of_a_linear_merge() -> None:
    base, tuned = (tiny.encoder("hubert", seed=s).model.state_dict() for s in (0, 1))
    merged = merging.merge(base, [tuned], alpha=0.25)
    found = effective_alpha(base, [tuned], merged)
    assert {"cnn", "pos_conv", "layer 1"} <= set(found)
    assert all(abs(alpha - 0.25) < 1e-5 for alpha in found.values())


@pytest.mark.parametrize("name", ["finetune", "finetune_word"])
def test_stable_finetuning_moves_the_transformer_and_not_the_cnn(
    recipes: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finetune.build_tuned(recipes / f"{name}.yaml", tmp_path / "r")
    record = json.loads((folder / "finetune.json").read_text())
    assert record["moved"]["cnn"] == 0 and record["moved"]["layer 3"] > 0
    assert len(record["history"]) == 4
    assert "(frozen)" in capsys.readouterr().out
    assert (folder / "README.md").read_text().startswith("# Fine-tuned")
    base = upstream.load(record["recipe"]["upstream"])
    tuned = upstream.load(str(folder))
    assert tuned.fingerprint() != base.fingerprint()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert finetune.build_tuned(recipes / f"{name}.yaml", tmp_path / "r") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, "built once"


def test_head_only_phase_leaves_the_upstream_alone(recipes: Path, tmp_path: Path) -> None:
    text = (recipes / "finetune.yaml").read_text() + "head_only: 1.0\n"
    (recipes / "finetune.yaml").write_text(text)
    folder = finetune.build_tuned(recipes / "finetune.yaml", tmp_path / "r")
    assert set(json.loads((folder / "finetune.json").read_text())["moved"].values()) == {0.0}


def test_interrupted_finetuning_goes_on_and_ends_the_same(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = finetune.build_tuned(recipes / "finetune.yaml", tmp_path / "a")
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0.0)
    original, count = finetune.Tuning._update, []

    def stop(self: finetune.Tuning, *args: object) -> None:
        count.append(1)
        if len(count) == 13:
            raise KeyboardInterrupt
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune.Tuning, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.build_tuned(recipes / "finetune.yaml", tmp_path / "b")
    monkeypatch.setattr(finetune.Tuning, "_update", original)
    resumed = finetune.build_tuned(recipes / "finetune.yaml", tmp_path / "b")
    one, two = (upstream.load(str(folder)) for folder in (unbroken, resumed))
    assert one.fingerprint() == two.fingerprint()
    assert not (resumed / "state.pt").exists()


def test_merged_upstream_is_built_on_demand_and_identified_by_its_weights(
    recipes: Path, tmp_path: Path
) -> None:
    where = {"recipe": str(recipes / "merged.yaml"), "results": str(tmp_path / "r")}
    prints = {a: upstream.load("merged", alpha=a, **where).fingerprint() for a in (0.0, 0.25, 1.0)}
    assert upstream.load("merged", **where).fingerprint() == prints[0.25]
    assert len(set(prints.values())) == 3
    base = upstream.load(interpolation.load_recipe(recipes / "merged.yaml").base)
    assert prints[0.0] == base.fingerprint()
    tuned = upstream.load("finetuned", **where)
    merged = upstream.load("merged", alpha=1.0, **where)
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, tuned.state_dict()[name], atol=1e-6)
