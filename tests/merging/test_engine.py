"""Stage 2 on tensors: the released arithmetic, the properties of a merge, and every mistake."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import merging
from merging.methods import ELEMENTWISE, METHODS
from merging.weights import compatibility as matching
from merging.weights.engine import Report, ahead, merge, merge_tensors
from merging.weights.movement import EffectiveAlpha, Weights, movement
from merging.weights.rule import PIECE, MergeOptions, places_of
from tests import tiny
from upstream.checkpoints.tensor_names import module_of, to_fairseq
from upstream.common.errors import UserError

State = dict[str, Tensor]
NUMBERS = st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4)
GAIN, KERNEL = "encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v"


def near(base: Mapping[str, Tensor], seed: int, size: float = 0.01) -> State:
    """A fine-tuned form of a model: every value a little off."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: t + size * torch.randn(t.shape, generator=rng) if t.is_floating_point() else t.clone()
        for name, t in base.items()
    }


@pytest.fixture(scope="module")
def hubert() -> State:
    """A tiny HuBERT under fairseq's and s3prl's names, with its pre-training head."""
    state = {to_fairseq(n, False): t for n, t in tiny.model("hubert").state_dict().items()}
    return state | {"final_proj.weight": torch.ones(4, 32), "label_embs_concat": torch.ones(5, 4)}


def released(base: State, tuned: list[State], alpha: float) -> State:
    """base + alpha * mean of task vectors, as the paper's released code computes it."""
    merged = {}
    for name, tensor in base.items():
        vectors = [other[name] - tensor for other in tuned]
        if name.startswith(("final_proj", "label_embs_concat")):
            vectors = [torch.zeros_like(tensor)]
        merged[name] = tensor + alpha * (sum(vectors) / len(vectors))
    return merged


@pytest.mark.parametrize("count", [1, 2, 3])
def test_linear_is_the_released_arithmetic_bit_for_bit(hubert: State, count: int) -> None:
    tuned = [near(hubert, seed) for seed in range(count)]
    ours, theirs = merging.merge(hubert, tuned, alpha=0.25), released(hubert, tuned, 0.25)
    assert list(ours) == list(hubert)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_released_arithmetic_at_full_size() -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "conv_dim": [512] * 7, "num_conv_pos_embeddings": 128}  # fmt: skip
    model = tiny.model("hubert", **sizes, num_conv_pos_embedding_groups=16, num_attention_heads=12)
    base = {to_fairseq(n, False): t for n, t in model.state_dict().items()}
    tuned = near(base, 1)
    ours, theirs = merging.merge(base, [tuned], alpha=0.25), released(base, [tuned], 0.25)
    assert all(torch.equal(ours[name], theirs[name]) for name in base)


@settings(max_examples=30, deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS, st.floats(-1, 2))
def test_properties_of_a_merge(
    base: list[float], one: list[float], two: list[float], alpha: float
) -> None:
    b, s, t = ({"w": torch.tensor(values)} for values in (base, one, two))
    zero = merge(b, [s, t], alpha=0.0)["w"]
    assert torch.equal(zero.view(torch.int32), b["w"].view(torch.int32)), "-0.0 stays -0.0"
    torch.testing.assert_close(merge(b, [s], alpha=1.0), s, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        merge(b, [s, t], alpha=alpha), merge(b, [t, s], alpha=alpha), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(merge(b, [b, b], alpha=alpha), b)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_large_tensors_pass_in_pieces_with_the_same_bits(method: str) -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(300, 700, generator=rng)
    assert base.numel() > 4 * PIECE
    base[0, 0] = -0.0
    one, two = base.clone(), base.clone()
    one[-1] += 0.01  # in one piece only
    two[150:] += torch.randn(150, 700, generator=rng)
    report = Report()
    merged = merge({"w": base}, [{"w": one}, {"w": two}], method, report=report, alpha=0.3)["w"]
    assert torch.equal(merged, METHODS[method](base, [one, two], alpha=0.3))
    whole = EffectiveAlpha()
    whole.add("other", base, [one, two], merged)
    assert report.effective.result() == pytest.approx(whole.result(), rel=1e-6)
    assert torch.signbit(merge({"w": base}, [{"w": base}], method)["w"][0, 0]), "the base's bits"


def test_what_is_made_ahead_comes_in_order_and_fails_where_it_does() -> None:
    made: list[str] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            made.append(name)
            yield name, torch.ones(1)
        raise UserError("broken")

    stream = ahead(source())
    assert next(stream)[0] == "a"
    assert [next(stream)[0], next(stream)[0]] == ["b", "c"] and made == ["a", "b", "c"]
    with pytest.raises(UserError, match="broken"):
        next(stream)


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
        merged[kept].zero_()
        assert base[kept].any(), "a result shares no memory with its inputs"


class Lazy(Mapping[str, Tensor]):
    """Makes a tensor when it is indexed, counts how often, and knows which ones are alive."""

    def __init__(self, state: State) -> None:
        self.state, self.asked = state, Counter[str]()
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __getitem__(self, name: str) -> Tensor:
        self.asked[name] += 1
        tensor = self.state[name].clone()
        self.alive.add(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_each_tensor_is_read_once_and_let_go(hubert: State) -> None:
    base, tuned = Lazy(hubert), Lazy(near(hubert, 0))
    most = 0
    for _ in merge_tensors(base, [tuned], "linear", {}, MergeOptions()):
        most = max(most, len(base.alive) + len(tuned.alive))
    assert most <= 4, "two tensors of two models at most: the factors of a weight-normed kernel"
    for model in (base, tuned):
        assert dict(model.asked) == dict.fromkeys(hubert, 1)


def test_several_models_by_mean_sum_and_sequence() -> None:
    base = {"w": torch.tensor([0.0])}
    one, two = {"w": torch.tensor([4.0])}, {"w": torch.tensor([8.0])}
    how = {s: merge(base, [one, two], alpha=0.25, several=s)["w"].item()
           for s in ("mean", "sum", "sequential")}  # fmt: skip
    # 0.25 * (4 + 8) / 2; 0.25 * 4 + 0.25 * 8; first 1.0, then 1 + 0.25 * (8 - 1)
    assert how == {"mean": 1.5, "sum": 3.0, "sequential": 2.75}
    for several in ("sum", "sequential"):
        alone = merge(base, [one], alpha=0.3, several=several)
        assert torch.equal(alone["w"], merge(base, [one], alpha=0.3)["w"])


def test_only_and_filters_reach_their_tensors(hubert: State) -> None:
    tuned = near(hubert, 0)
    places = places_of(hubert)

    def module(name: str) -> str:
        return places[name].module

    report = Report()
    merged = merge(hubert, [tuned], only=["attention"], report=report, alpha=0.5)
    moved = {name for name in hubert if not torch.equal(merged[name], hubert[name])}
    assert moved == {name for name in hubert if "self_attn." in name}
    assert set(report.effective.result()) == {"layer 1", "layer 2", "layer 3"}
    assert report.effective.moved() == pytest.approx(movement(hubert, merged, module), rel=1e-5)
    report = Report()
    alpha = {"cnn": 0, "layer 2": [0.75][0], "pos_conv": 1, "default": 0.25}
    merged = merge(hubert, [tuned], alpha=alpha, report=report)
    assert report.effective.moved() == pytest.approx(movement(hubert, merged, module), rel=1e-5)
    found = report.effective.result()
    expected = {"cnn": 0, "pos_conv": 1, "layer 1": 0.25, "layer 2": 0.75, "layer 3": 0.25}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def kernel(state: Mapping[str, Tensor]) -> Tensor:
    return torch._weight_norm(state[KERNEL], state[GAIN], 2)


def test_positional_kernels_are_merged_as_factors_or_as_kernels(hubert: State) -> None:
    tuned = near(hubert, 0, 0.1)
    reports = {"factors": Report(), "kernel": Report()}
    merged = {how: merge(hubert, [tuned], alpha=0.25, pos_conv=how, report=report)
              for how, report in reports.items()}  # fmt: skip
    middle = kernel(hubert) + 0.25 * (kernel(tuned) - kernel(hubert))
    torch.testing.assert_close(kernel(merged["kernel"]), middle)
    assert torch.equal(merged["factors"][GAIN], merge(hubert, [tuned], alpha=0.25)[GAIN])
    apart = float((kernel(merged["factors"]) - middle).norm() / middle.norm())
    assert apart > 1e-4, "the two differ"
    for report in reports.values():
        assert report.pos_conv == pytest.approx(apart, rel=1e-4)
        assert report.effective.result()["pos_conv"] == pytest.approx(0.25, abs=1e-4)
    kept = merge(hubert, [tuned], alpha=0.0, pos_conv="kernel")
    assert all(torch.equal(kept[name], hubert[name]) for name in (GAIN, KERNEL))


def effective_alpha(base: Weights, tuned: Sequence[Weights], merged: Weights) -> dict[str, float]:
    """The effective alpha per module of whole models."""
    found = EffectiveAlpha()
    for name, tensor in base.items():
        if tensor.is_floating_point():
            others = [t[name].float() for t in tuned]
            found.add(module_of(name), tensor.float(), others, merged[name].float())
    return found.result()


def test_effective_alpha_is_right_to_five_digits_and_ordered(hubert: State) -> None:
    torch.manual_seed(0)
    base = torch.randn(1_500_000) * 3 + 1
    tuned, merged = base + 0.01 * torch.randn_like(base), base + 0.003 * torch.randn_like(base)
    merged += 0.4 * (tuned - base)
    found = EffectiveAlpha()
    found.add("cnn", base, [tuned], merged)
    vector, way = (tuned.double() - base.double()), (merged.double() - base.double())
    exact = float(way @ vector / (vector @ vector))
    assert found.result()["cnn"] == pytest.approx(exact, rel=1e-5)
    model, other = (tiny.model("hubert", seed).state_dict() for seed in (0, 1))
    whole = effective_alpha(model, [other], merge(model, [other], alpha=0.25))
    assert list(whole)[:4] == ["cnn", "projection", "pos_conv", "layer 1"]
    assert all(abs(alpha - 0.25) < 1e-5 for alpha in whole.values())
    assert str(effective_alpha(model, [model], model)["cnn"]) == "nan"


def test_random_methods_depend_on_seed_and_name_alone(hubert: State) -> None:
    tuned = [near(hubert, 0)]
    first, again, other = (
        merge(hubert, tuned, "dare", density=0.5, seed=seed, alpha=0.5) for seed in (0, 0, 1)
    )
    part = merge(hubert, tuned, "dare", density=0.5, seed=0, alpha=0.5, only=["layer 2"])
    name = "encoder.layers.1.fc1.weight"
    assert torch.equal(first[name], again[name]) and torch.equal(first[name], part[name])
    assert not torch.equal(first[name], other[name])


def test_the_engine_tells_methods_depth_and_statistics(hubert: State) -> None:
    tuned = near(hubert, 0)
    report = Report()
    merge(hubert, [tuned], "lines", alpha=0.6, report=report)
    found = report.effective.result()
    layers = [found[f"layer {number}"] for number in (1, 2, 3)]
    assert layers == pytest.approx([0, 0.3, 0.6], abs=1e-4)

    ones = {name: torch.ones_like(t) for name, t in hubert.items()}
    sure = {name: 1e6 * t for name, t in ones.items()}
    merged = merge(hubert, [tuned], "fisher", alpha=0.5, stats=[ones, sure])
    name = "encoder.layers.0.fc1.weight"
    torch.testing.assert_close(merged[name], tuned[name], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="needs gram statistics"):
        merge(hubert, [tuned], "regmean")
    with pytest.raises(UserError, match="without statistics"):
        merge(hubert, [tuned], "fisher", stats=[ones, sure], several="sequential")


def test_slerp_says_how_often_it_was_linear(hubert: State) -> None:
    report = Report()
    merge(hubert, [near(hubert, 0, 1e-5)], "slerp", report=report)
    assert report.slerp_fallbacks == report.tensors == len(hubert) - 2  # all but the head


def spoil(name: str, value: Any) -> Callable[[State], Any]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("a"), "tuned model 1 does not match the base: a is missing"),
        (lambda s: s.clear(), "a is missing; b is missing; c is missing and more"),
        (spoil("e", torch.ones(1)), "e is not in the base"),
        (spoil("a", torch.ones(3)), r"a is \(3,\), not \(2,\)"),
        (spoil("a", torch.ones(2, 1)), r"a is \(2, 1\), not \(2,\)"),
        (spoil("a", torch.ones(2, dtype=torch.int64)), "a is int64, not float32"),
        (spoil("d", torch.ones(1)), "d is float32, not int64"),
        (spoil("a", torch.full((2,), float("nan"))), "a is not finite; tuned model 1 holds NaN"),
        (spoil("b", torch.full((1,), float("inf"))), "b is not finite; tuned model 1 holds"),
        (spoil("b", torch.full((1,), 3e38)), "merge of b is not finite$"),
    ],
)
def test_mismatched_and_broken_models_are_refused(
    change: Callable[[State], Any], message: str
) -> None:
    base = {"a": torch.ones(2), "b": torch.full((1,), -3e38), "c": torch.ones(1),
            "d": torch.tensor([1])}  # fmt: skip
    tuned = dict(base)
    change(tuned)
    with pytest.raises(UserError, match=message) as caught:
        merging.merge(base, [tuned])
    assert "\n" not in str(caught.value)


def test_large_finite_values_are_no_fault() -> None:
    base = {"w": torch.full((8,), 1e38)}
    assert torch.equal(merge(base, [base])["w"], base["w"])


def test_wrong_method_parameter_and_setting_have_near_matches() -> None:
    base = {"a": torch.ones(2)}
    for options, message in (
        ({"method": "linaer"}, "did you mean linear"),
        ({"alhpa": 0.5}, "did you mean alpha"),
        ({"method": "dare", "sede": 1}, "did you mean seed"),
        ({"method": "ties", "place": 1}, "unknown key 'place'"),
        ({"alpha": "much"}, "alpha: must be float"),
        ({"seed": 1}, "unknown key 'seed'"),
        ({"pos_conv": "kernels"}, "pos_conv: 'kernels' is not one of factors, kernel"),
        ({"several": "maen"}, "not one of mean, sum, sequential"),
        ({"only": "attention"}, "only: must be a list"),
    ):
        with pytest.raises(UserError, match=message):
            merging.merge(base, [base], **options)
    with pytest.raises(UserError, match="at least one"):
        merging.merge(base, [])


def test_origin_by_cosine_and_by_record(tmp_path: Path) -> None:
    base, other = (tiny.model("hubert", seed).state_dict() for seed in (0, 1))
    assert matching.cosine(base, near(base, 0)) > 0.9
    assert abs(matching.cosine(base, other)) < matching.UNRELATED
    matching.require_origin(base, near(base, 0), "it", None, None)
    with pytest.raises(UserError, match=r"cosine.*origin: unchecked"):
        matching.require_origin(base, other, "it", None, None)
    (tmp_path / "finetune.json").write_text('{"base_fingerprint": "abc"}')
    assert matching.recorded_base(tmp_path) == "abc"
    assert matching.recorded_base(tmp_path / "model.safetensors") == "abc"
    matching.require_origin(base, other, "it", "abc", "abc")
    with pytest.raises(UserError, match="made from base abc, not from def"):
        matching.require_origin(base, base, "it", "abc", "def")
    (tmp_path / "finetune.json").write_text("[]")
    with pytest.raises(UserError, match="not a record"):
        matching.recorded_base(tmp_path)
