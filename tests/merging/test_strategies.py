"""Every strategy on every family: what learns, that it is felt, and that the result is ordinary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import upstream
from merging.merged import finetuned, merged
from merging.tuning import build_tuned
from merging.tuning.collect import Collected
from merging.tuning.lowrank import LoRA, Sized
from merging.tuning.recipe import STRATEGIES, TuningRecipe, load_recipe
from merging.tuning.strategies import Anchored, Stable
from tests import tiny
from tests.merging.test_tuning import changed, record, same_after_a_stop
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder


def recipe_of(**keys: Any) -> TuningRecipe:
    fields = {
        "upstream": "",
        "task": "",
        "steps": 10,
        "batch": 1,
        "eval_every": 1,
        "head_only": 0.0,
    }
    return TuningRecipe("finetune", **(fields | keys))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("name", ["anchored", "lora", "dora", "regular"])
def test_every_strategy_acts_on_every_family(
    recipes: Path, tmp_path: Path, variant: str, name: str
) -> None:
    base = str(tiny.hf_folder(tmp_path, variant, 3))
    recipe = changed(recipes, upstream=base, strategy=name, steps=6, eval_every=6, lr=1e-3)
    folder = build_tuned(recipe, tmp_path / "r")
    before, after = (upstream.load(spec) for spec in (base, str(folder)))
    assert isinstance(before, Encoder) and isinstance(after, Encoder)
    assert after.model.state_dict().keys() == before.model.state_dict().keys(), "an ordinary one"
    old, new = before.model.state_dict(), after.model.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    learns = {n for n in old if n.endswith(("q_proj.weight", "v_proj.weight"))}
    assert moved == learns if name in ("lora", "dora") else moved > learns
    assert not any("feature_extractor" in name for name in moved)
    learned = record(folder)["learned_parameters"]
    adapted = 8 * sum(sum(old[name].shape) for name in learns)  # rank 8: [out, 8] and [8, in]
    rows = sum(len(old[name]) for name in learns)
    whole = sum(old[name].numel() for name in moved)
    assert learned == {"lora": adapted, "dora": adapted + rows}.get(name, whole)
    wavs, lens = torch.stack(tiny.noise(8000)), torch.tensor([8000])
    with torch.no_grad():
        change = (after(wavs, lens).layers - before(wavs, lens).layers).abs().amax((1, 2, 3))
    assert change[0] == 0 if name in ("lora", "dora") else True
    assert change[1:].min() > 1e-6, "the output feels it, whatever calls the weights"


@pytest.mark.parametrize("name", ["lora", "dora", "anchored"])
def test_strategies_resume_exactly(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = changed(recipes, strategy=name, collect=["ema-0.9", "swa-0.5", "early-0.5"])
    folder = same_after_a_stop(recipe, tmp_path, monkeypatch, 11)
    for part in ("ema-0.9", "swa-0.5", "early-0.5"):
        one = upstream.load(str(tmp_path / "a" / "upstreams" / folder.name / part))
        assert one.fingerprint() == upstream.load(str(folder / part)).fingerprint()
        assert one.heard == upstream.load(str(folder)).heard


def test_low_rank_changes_are_what_the_papers_say() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4)
    weight = linear.weight.detach().clone()
    holder = torch.nn.ModuleDict({"q_proj": linear})
    lora = LoRA(holder, recipe_of(), rank=2, scale=3.0)
    assert torch.equal(linear.weight, weight), "at first nothing changes"
    adapter = linear.parametrizations.weight[0]
    with torch.no_grad():
        adapter.b.normal_()
    assert torch.allclose(linear.weight, weight + 3 * adapter.b @ adapter.a)
    assert torch.equal(lora.weights()["q_proj.weight"], linear.weight)
    assert set(lora.weights()) == {"q_proj.weight", "q_proj.bias"}
    place = "encoder.layers.0.attention."
    assert [n for n, _ in holder.named_parameters() if lora.trains(place + n, 9)] == [
        f"q_proj.parametrizations.weight.0.{part}" for part in ("a", "b")
    ]

    sized = Sized(weight, 2, 1.0)
    assert torch.allclose(sized(weight), weight, atol=1e-6)
    with torch.no_grad():
        sized.b.normal_()
        sized.size.mul_(2)
    changed = weight + sized.b @ sized.a
    assert torch.allclose(sized(weight).norm(dim=1), 2 * weight.norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(sized(weight), changed), torch.ones(4))


def test_the_anchor_pulls_by_hand() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    for norm, expected in (("l2", 0.5 * 0.1 * 25), ("l1", 0.1 * 7), ("max", 0.1 * 4)):
        anchored = Anchored(model, recipe_of(), strength=0.1, norm=norm)  # type: ignore[arg-type]
        penalty = anchored.penalty()
        assert penalty is not None and penalty == 0
        with torch.no_grad():
            model.weight += torch.tensor([[3.0, -4.0]])
        assert anchored.penalty().item() == pytest.approx(expected)  # type: ignore[arg-type]
    model.weight.requires_grad = False
    assert anchored.penalty() is None, "while the head alone learns"


def test_a_stronger_anchor_moves_less(recipes: Path, tmp_path: Path) -> None:
    free = record(build_tuned(recipes / "finetune.yaml", tmp_path / "r"))["moved"]
    path = changed(recipes, strategy="anchored", params={"strength": 10.0})
    bound = record(build_tuned(path, tmp_path / "r"))["moved"]
    assert 0 < bound["layer 2"] < 0.5 * free["layer 2"]


def test_what_is_collected_is_what_its_name_says() -> None:
    run = [{"w": torch.tensor([float(step)])} for step in range(1, 11)]
    expected = {"early-0.2": 2.0, "swa-0.5": sum(range(5, 11)) / 6, "ema-0.9": 0.0}
    ema = 1.0
    for step in range(2, 11):
        ema = 0.9 * ema + 0.1 * step
    for name, value in (expected | {"ema-0.9": ema}).items():
        collected = Collected(name, 10)
        for done, weights in enumerate(run, 1):
            if collected.wants(done):
                collected.add(done, weights)
        assert float(collected.weights["w"]) == pytest.approx(value), name
    assert float(run[0]["w"]) == 1.0, "what it is given stays as it is"
    for wrong in ("ema", "early-1.5", "early-0.0", "swa-x", "last"):
        with pytest.raises(UserError, match=r"collect: .* is none of"):
            Collected(wrong, 10)


def test_a_merge_may_take_what_a_run_collected(recipes: Path, tmp_path: Path) -> None:
    changed(recipes, collect=["early-0.5", "swa-0.5"])
    content = yaml.safe_load((recipes / "merged.yaml").read_text())
    for name in ("early-0.5", "swa-0.5"):
        path = recipes / f"{name}.yaml"
        tuned = [f"finetune.yaml/{name}"]
        path.write_text(yaml.safe_dump(content | {"tuned": tuned, "params": {"alpha": 1.0}}))
        whole = merged(str(path), results=str(tmp_path / "r"))
        part = finetuned(str(path), results=str(tmp_path / "r"))
        ends = zip(whole.model.state_dict().values(), part.model.state_dict().values())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in ends), "alpha is 1"
    last = finetuned(str(recipes / "merged.yaml"), results=str(tmp_path / "r"))
    assert last.fingerprint() != part.fingerprint()
    path.write_text(yaml.safe_dump(content | {"tuned": ["finetune.yaml/swa-0.6"]}))
    with pytest.raises(UserError, match=r"does not collect 'swa-0\.6'; did you mean swa-0\.5"):
        merged(str(path), results=str(tmp_path / "r"))


def test_another_layer_may_feed_the_head(recipes: Path, tmp_path: Path) -> None:
    """What it does not hear of stays, of pre-norm encoders the final norm too."""
    for variant in ("hubert", "hubert-large"):
        base = str(tiny.hf_folder(tmp_path, variant, 4))
        folder = build_tuned(changed(recipes, upstream=base, layer=2), tmp_path / "r")
        moved = record(folder)["moved"]
        assert moved["layer 2"] > 0 == moved["layer 3"], variant
        assert (moved["norm"] > 0) == (variant == "hubert")
    with pytest.raises(UserError, match="has hidden states 0 to 3"):
        build_tuned(changed(recipes, layer=4), tmp_path / "r")


def test_the_head_may_have_a_rate_of_its_own(recipes: Path, tmp_path: Path) -> None:
    slow = record(build_tuned(changed(recipes, head_lr=1e-6), tmp_path / "r"))
    same = record(build_tuned(changed(recipes, head_lr=1e-2), tmp_path / "r"))
    plain = record(build_tuned(changed(recipes, head_lr=None), tmp_path / "r"))
    assert same["fingerprint"] == plain["fingerprint"] != slow["fingerprint"]


def test_wrong_params_are_one_line(recipes: Path) -> None:
    def fault(**keys: Any) -> str:
        with pytest.raises(UserError) as caught:
            load_recipe(changed(recipes, **keys))
        return str(caught.value)

    assert "params: unknown key 'rnak'; did you mean rank?" in fault(
        strategy="lora", params={"rnak": 3}
    )
    assert "rank" in fault(strategy="lora", params={"rank": 0})
    assert "params: unknown key 'rank'" in fault(strategy="stable", params={"rank": 1})
    assert "a name comes twice" in fault(params={}, collect=["ema-0.9", "ema-0.9"])
    assert all(name in STRATEGIES for name in ("stable", "regular", "anchored", "lora", "dora"))
    model = torch.nn.ModuleDict({"k_proj": torch.nn.Linear(2, 2)})
    with pytest.raises(UserError, match="targets: no layer is named so; there is: k_proj"):
        LoRA(model, recipe_of())
    assert issubclass(LoRA, Stable) and json.dumps(fault(head_lr=-1.0))
