"""alpha as a number, over depth and by filter: every form, the precedence, and mistakes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merging import merge
from merging.weights import alphas
from merging.weights.rule import places_of
from tests import tiny
from upstream.checkpoints.tensor_names import Place, place_of
from upstream.common.errors import UserError

LAYER = "encoder.layers.{}.attention.k_proj.weight"
NAMES = [
    "feature_extractor.conv_layers.0.conv.weight",
    "feature_projection.projection.weight",
    "encoder.layer_norm.weight",
    *(LAYER.format(i) for i in range(12)),
    "encoder.layers.2.feed_forward.output_dense.weight",
    "encoder.layers.2.final_layer_norm.weight",
]
PLACES = places_of(NAMES)


def resolved(alpha: Any, name: str, depth: int = 12) -> float:
    return alphas.resolve(alpha, place_of(name), depth, name)


def test_a_list_is_assigned_or_interpolated_over_the_layers() -> None:
    one_each = [i / 7 for i in range(12)]
    assert [resolved(one_each, LAYER.format(i)) for i in range(12)] == one_each
    ends = [resolved([0.0, 1.0], LAYER.format(i)) for i in range(12)]
    assert ends == pytest.approx([i / 11 for i in range(12)])
    peak = [resolved([0.0, 1.0, 0.0], LAYER.format(i), 5) for i in range(5)]
    assert peak == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_list_gives_its_first_value_below_the_layers_and_its_last_above() -> None:
    found = {name: resolved([0.1, 0.9], name) for name in NAMES[:3]}
    assert list(found.values()) == [0.1, 0.1, 0.9]
    assert resolved([0.1, 0.9], "masked_spec_embed") == 0.1
    assert resolved([0.1, 0.9], LAYER.format(0), depth=1) == 0.1


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.integers(1, 12))
def test_a_list_never_leaves_its_range(values: list[float], layer: int) -> None:
    found = alphas.resolve(values, Place(f"layer {layer}", layer, "ffn"), 12)
    assert min(values) - 1e-12 <= found <= max(values) + 1e-12


@pytest.mark.parametrize("turned", [False, True])
def test_the_narrowest_filter_decides_whatever_the_order(turned: bool) -> None:
    rules = [
        ("default", 0.25), ("attention", 0.5), ("layer 3", 1.0), ("k_proj", 0.7),
        ("2.attention.k_proj", 0.8), ("cnn", 0.0), ("layer_norm", 0.3), ("norm", 0.4),
    ]  # fmt: skip
    alpha = dict(reversed(rules) if turned else rules)
    expected = {
        LAYER.format(0): 0.7,  # a piece of a name before the part
        LAYER.format(2): 0.8,  # the longest piece
        "encoder.layers.0.attention.v_proj.weight": 0.5,
        "encoder.layers.2.attention.v_proj.weight": 1.0,  # the module before the part
        "encoder.layers.5.feed_forward.output_dense.weight": 0.25,
        "encoder.layers.5.final_layer_norm.weight": 0.3,  # `norm` is not a piece of this name
        "encoder.layer_norm.weight": 0.4,
        NAMES[0]: 0.0,
    }
    assert {name: resolved(alpha, name) for name in expected} == expected


def test_only_takes_the_same_filters() -> None:
    assert alphas.selected(None, place_of(NAMES[0]), NAMES[0])
    chosen = [n for n in NAMES if alphas.selected(["layer 2", "ffn"], place_of(n), n)]
    assert chosen == [LAYER.format(1), "encoder.layers.2.feed_forward.output_dense.weight"]


def test_fairseq_names_have_places_too() -> None:
    names = ["feature_extractor.conv_layers.0.0.weight", "encoder.layers.1.self_attn.k_proj.bias"]
    assert [p.part for p in places_of(names).values()] == ["conv", "attention"]


@pytest.mark.parametrize(
    "alpha, message",
    [
        ("much", "must be float"),
        (True, "must be float"),
        (float("nan"), "at most 100"),
        ([], "at least one number"),
        ([0, "a"], r"alpha\[1\]: must be float"),
        ({"cnn": None}, "alpha.cnn: must be float"),
    ],
)
def test_what_is_no_alpha(alpha: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        alphas.read(alpha, "alpha")


@pytest.mark.parametrize(
    "alpha, only, message",
    [
        ({"atention": 0.5, "default": 0}, None, "did you mean attention"),
        ({"layer 13": 0.5, "default": 0}, None, "did you mean layer"),
        (0.5, ["pos_cov"], "did you mean pos_conv"),
        (0.5, [], "only: name at least one"),
        ([0.1] * 13, None, "13 values for 12 transformer layers"),
        ({"cnn": 0, "attention": 1}, None, "nothing is said of feature_projection.*add default"),
    ],
)
def test_what_does_not_fit_the_encoder(alpha: Any, only: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        alphas.check(alphas.read(alpha, "a"), only, PLACES, "merge")


def test_only_what_is_merged_needs_an_alpha() -> None:
    alphas.check({"attention": 0.5}, ["attention"], PLACES, "merge")


def test_selective_attention_merge_of_two_models() -> None:
    """arXiv 2501.08468, by hand: W0 + l_i (W1 - W0) + (1 - l_i) (W2 - W0), l_i = l a^i, of queries,
    keys and values; all else is the first model's. Here: from the first to the second by 1 - l_i.
    """
    zero, one, two = (tiny.model("hubert", seed).state_dict() for seed in (0, 1, 2))
    share = [0.9 * 0.7**layer for layer in range(1, 4)]
    pieces = [f"{name}_proj.weight" for name in "qkv"]
    merged = merge(one, [two], only=pieces, alpha=[1 - each for each in share])
    changed = set()
    for layer, part in itertools.product(range(3), "qkv"):
        name = f"encoder.layers.{layer}.attention.{part}_proj.weight"
        vectors = [model[name] - zero[name] for model in (one, two)]
        due = zero[name] + share[layer] * vectors[0] + (1 - share[layer]) * vectors[1]
        assert torch.allclose(merged[name], due, atol=1e-6)
        changed.add(name)
    assert {name for name in one if not torch.equal(one[name], merged[name])} == changed


@pytest.mark.parametrize("several", ["mean", "sum", "sequential"])
def test_alphas_over_depth_on_parts_of_several_models(several: Any) -> None:
    zero, one, two = (tiny.model("hubert", seed).state_dict() for seed in (0, 1, 2))
    merged = merge(zero, [one, two], only=["attention"], alpha=[0.5, 0.0], several=several)
    for layer, alpha in enumerate((0.5, 0.25, 0.0)):
        name = f"encoder.layers.{layer}.attention.q_proj.weight"
        due = zero[name] + alpha * (one[name] - zero[name])
        if several == "sequential":
            due = due + alpha * (two[name] - due)
        else:
            due = due + alpha * (two[name] - zero[name])
            due = (due + zero[name]) / 2 if several == "mean" else due
        assert torch.allclose(merged[name], due, atol=1e-6)
        name = f"encoder.layers.{layer}.feed_forward.output_dense.weight"
        assert torch.equal(merged[name], zero[name])
