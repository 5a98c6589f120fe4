"""Merging methods: what holds for every one of them, mergekit's numbers, and each one's own law."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.choose import greedy_soup
from merging.methods import METHODS, RESERVED, STATISTICS
from merging.methods.dense import linear, slerp_falls_back
from merging.methods.sparse import by_content
from upstream.checkpoints.tensor_names import Place
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.common.schema import bind

SHAPES = [(), (1,), (7,), (1, 1), (4, 6), (5, 1), (3, 2, 5)]


class Law(NamedTuple):
    """What a method does when it is told to leave nothing out."""

    whole: dict[str, Any] = {}  # parameters that leave nothing out: alpha 1 is the tuned model
    linear: bool = True  # and other alphas are `linear`, for one model
    reaches: bool = True  # the tuned model, at alpha 1
    counts: Sequence[int] = (1, 2, 3)  # numbers of tuned models that it takes


LAWS = {
    "linear": Law(),
    "task_arithmetic": Law(),
    "soup": Law(),
    "slerp": Law(linear=False, counts=(1,)),
    "lines": Law({"shallow": 1.0}),
    "model_stock": Law(linear=False, counts=(2, 3)),  # alpha 1 is the tuned one if all are the same
    "low_rank": Law({"keep": 1.0}),
    "ties": Law({"density": 1.0}),
    "dare": Law({"density": 1.0}),
    "breadcrumbs": Law({"density": 1.0, "gamma": 0.0}),
    "della": Law({"density": 1.0, "epsilon": 0.0}),
    "fisher": Law(linear=False),
    "regmean": Law(linear=False),
    "tsv_m": Law(),
    "iso_c": Law(linear=False, reaches=False),
    "lot": Law({"stats": []}),  # inputs in all directions: see its own tests
}


class Case(NamedTuple):
    base: Tensor
    tuned: list[Tensor]
    scale: float
    seed: int


@st.composite
def cases(draw: st.DrawFn, counts: Sequence[int]) -> Case:
    """Tensors of any shape and magnitude; models that differ much, little, not at all."""
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 2**31))
    scale, moved = 10.0 ** draw(st.integers(-30, 30)), draw(st.sampled_from([0.0, 1e-4, 1.0]))
    make = torch.Generator().manual_seed(seed)
    base = scale * torch.randn(shape, generator=make)
    count = draw(st.sampled_from(counts))
    tuned = [base + moved * scale * torch.randn(shape, generator=make) for _ in range(count)]
    return Case(base, tuned, scale * 10, seed)


def statistics(kind: str, models: Sequence[Tensor]) -> list[Tensor]:
    """A made-up statistic that belongs to a model's content, so that both can change places."""
    made = []
    for model in models:
        content = int.from_bytes(model.numpy().tobytes()[:4], "little")
        make = torch.Generator().manual_seed(content)
        if kind == "fisher":
            made.append(torch.rand(model.shape, generator=make).square())
        elif model.ndim == 2:
            inputs = torch.randn(3, model.shape[1], generator=make)  # fewer than inputs: singular
            made.append(inputs.T @ inputs)
    return made


def call(
    method: str, base: Tensor, tuned: Sequence[Tensor], seed: int = 0, **params: Any
) -> Tensor:
    """A method with what the engine would fill in."""
    filled = {
        "rng": torch.Generator().manual_seed(seed),
        "place": Place("layer 2", 2, "ffn"),
        "depth": 3,
        "stats": statistics(STATISTICS.get(method, "fisher"), [base, *tuned]),
    }
    wanted = inspect.signature(METHODS[method]).parameters
    return METHODS[method](base, tuned, **{k: v for k, v in filled.items() if k in wanted} | params)


def near(one: Tensor, two: Tensor, scale: float) -> bool:
    return bool(((one.double() - two.double()).abs() <= 1e-6 * scale).all())


def test_every_method_has_its_law() -> None:
    assert set(LAWS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_signature_is_the_recipes_schema(method: str) -> None:
    parameters = inspect.signature(METHODS[method]).parameters
    assert list(parameters)[:2] == ["base", "tuned"]
    for name, parameter in list(parameters.items())[2:]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert (parameter.default is parameter.empty) == (name in RESERVED)
    assert bind(METHODS[method], {"alpha": 1}, method, given=RESERVED) == {"alpha": 1.0}
    assert ("stats" in parameters) == (method in STATISTICS)
    assert 20 < len(METHODS.about(method)) < 100


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_laws_of_all_methods(method: str, data: st.DataObject) -> None:
    law = LAWS[method]
    base, tuned, scale, seed = data.draw(cases(law.counts))
    before = [base.clone(), *(t.clone() for t in tuned)]

    merged = call(method, base, tuned, seed)
    assert merged.dtype == torch.float32 and merged.shape == base.shape
    assert torch.isfinite(merged).all()
    assert torch.equal(merged, call(method, base, tuned, seed)), "the same seed, the same merge"
    assert near(merged, call(method, base, tuned[::-1], seed), scale), "order does not matter"
    assert torch.equal(call(method, base, tuned, seed, alpha=0.0), base)
    stay = [base] * len(tuned)
    assert near(call(method, base, stay, seed, alpha=1.0), base, scale), "zero task vectors"
    same = [tuned[0]] * min(law.counts)
    if law.reaches:
        assert near(call(method, base, same, seed, alpha=1.0, **law.whole), tuned[0], scale)
    if law.linear:
        params = {"alpha": 0.3, **law.whole}
        assert near(call(method, base, same, seed, **params), linear(base, same, alpha=0.3), scale)
    assert all(torch.equal(x, y) for x, y in zip(before, [base, *tuned]))


BASE = torch.tensor([[0.5, -0.25, 1.0, 0.75], [-1.5, 0.1, 0.3, -0.6]])
ONE = BASE + torch.tensor([[0.21, -0.1, -0.42, 0.05], [0.4, 0.31, -0.07, -0.33]])
TWO = BASE + torch.tensor([[0.35, 0.15, 0.32, -0.04], [0.22, -0.06, 0.28, -0.6]])
SOME = {"density": 0.5}
BAND = {"density": 0.5, "gamma": 0.25}


@pytest.mark.parametrize(
    "method, tuned, params, expected",
    [
        ("ties", [ONE], SOME, [0.5, -0.25, 0.895, 0.75, -1.4, 0.1775, 0.3, -0.6825]),
        ("ties", [ONE, TWO], SOME, [0.5875, -0.25, 0.895, 0.75, -1.4, 0.1775, 0.37, -0.71625]),
        ("dare", [ONE, TWO], SOME, [0.5875, -0.275, 1, 0.75, -1.345, 0.1625, 0.3525, -0.75]),
        (
            "dare", [ONE, TWO], {**SOME, "elect": True},
            [0.675, -0.3, 1.0, 0.75, -1.345, 0.255, 0.44, -0.9],
        ),
        (
            "breadcrumbs", [ONE, TWO], BAND,
            [0.52625, -0.24375, 1.04, 0.75, -1.4725, 0.13875, 0.335, -0.64125],
        ),
        (
            "breadcrumbs", [ONE, TWO], {**BAND, "elect": True},
            [0.5525, -0.2125, 1.08, 0.75, -1.445, 0.1775, 0.37, -0.6825],
        ),
        (
            "slerp", [ONE], {},
            [0.560185, -0.278815, 0.905784, 0.772581, -1.417432, 0.1805, 0.286041, -0.692148],
        ),
        (
            "model_stock", [ONE, TWO], {"alpha": 1.0},
            [0.613595, -0.239858, 0.979715, 0.752028, -1.374234, 0.150712, 0.342598, -0.788649],
        ),
    ],
)  # fmt: skip
def test_agrees_with_mergekit(
    method: str, tuned: list[Tensor], params: dict[str, Any], expected: list[float]
) -> None:
    """Numbers of mergekit 0.1.5 (made by the functions of test_mergekit.py), seed 7, alpha 0.25."""
    found = call(method, BASE, tuned, seed=7, **{"alpha": 0.25, **params})
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_della_drops_what_mergekit_drops_and_divides_by_the_chance() -> None:
    """Mask of mergekit 0.1.5 at seed 7; chances by rank from 0.3 to 0.7, as it has them."""
    params = {"density": 0.5, "epsilon": 0.2, "alpha": 1.0}
    found = call("della", BASE, [ONE], seed=7, **params) - BASE
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    chance = 0.3 + 0.4 / 3 * torch.tensor([[2, 1, 3, 0], [3, 1, 0, 2]])
    torch.testing.assert_close(found, mask * (ONE - BASE) / chance, atol=1e-6, rtol=0)


WRONG = [
    ("slerp", [ONE, TWO], {}, "slerp: needs one tuned model, not 2; use linear"),
    ("model_stock", [ONE], {}, "model_stock: needs two or more"),
    ("ties", [ONE], {"density": 0.0}, "ties: density: 0.* must be above 0 and at most 1"),
    ("dare", [ONE], {"density": 20.0}, "dare: density: 20.* must be above 0"),
    ("dare", [ONE], {"density": float("nan")}, "dare: density: nan must be above 0"),
    ("low_rank", [ONE], {"keep": 1.5}, "low_rank: keep: 1.5 must be above 0"),
    ("breadcrumbs", [ONE], {"density": 1.0}, "gamma: 0.01 must be at most 1 - density"),
    ("breadcrumbs", [ONE], {"gamma": -0.1}, "gamma: -0.1 must be at least 0"),
    ("della", [ONE], {"epsilon": -0.1}, "della: epsilon: -0.1 must be at least 0"),
    ("della", [ONE], {"density": 1.0}, "della: epsilon: density 1 - 0.15"),
    ("della", [ONE], {"density": 0.1}, "must be above 0"),
    ("fisher", [ONE], {"alpha": 1.5}, "fisher: alpha: 1.5 must be from 0 to 1"),
    ("regmean", [ONE], {"alpha": -0.5}, "regmean: alpha: -0.5 must be"),
    ("regmean", [ONE], {"off_diagonal": 1.1}, "regmean: off_diagonal: 1.1 must be at least 0 and"),
]


@pytest.mark.parametrize("method, tuned, params, message", WRONG)
def test_mistakes_are_one_line(
    method: str, tuned: list[Tensor], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(method, BASE, tuned, **bind(METHODS[method], params, method, given=RESERVED))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_slerp_goes_along_the_arc_or_falls_back(size: float) -> None:
    east, north = size * torch.tensor([2.0, 0.0]), size * torch.tensor([0.0, 2.0])
    half = METHODS["slerp"](east, [north], alpha=0.5)
    torch.testing.assert_close(half, torch.full((2,), size * 2**0.5), atol=0, rtol=1e-6)
    assert not slerp_falls_back(east, north)
    for other in (east * 3, -east, torch.zeros(2), east + 0.01 * north):
        assert slerp_falls_back(east, other) and slerp_falls_back(other, east)
        halfway = METHODS["slerp"](east, [other], alpha=0.5)
        torch.testing.assert_close(halfway, (east + other) / 2, atol=1e-6 * size, rtol=1e-6)
    for cosine, parallel in ((0.9994, False), (0.9996, True)):
        other = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
        assert slerp_falls_back(east, other) is slerp_falls_back(east, -other) is parallel


@pytest.mark.parametrize("place, share", [
    (Place("cnn", None, "conv"), 0.2),
    (Place("layer 1", 1, "attention"), 0.2),
    (Place("layer 7", 7, "ffn"), 0.2 + 0.8 * 6 / 11),
    (Place("layer 12", 12, "ffn"), 1.0),
    (Place("head", None, "head"), 1.0),
])  # fmt: skip
def test_lines_grows_with_depth(place: Place, share: float) -> None:
    params = {"alpha": 0.5, "shallow": 0.2, "place": place, "depth": 12}
    found = call("lines", BASE, [ONE], **params)
    torch.testing.assert_close(found, BASE + 0.5 * share * (ONE - BASE))


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize("cosine, share", [(1.0, 1.0), (0.5, 2 / 3), (0.0, 0.0), (-0.9, 0.0)])
def test_model_stock_goes_as_far_as_the_models_agree(
    size: float, cosine: float, share: float
) -> None:
    """t = 2 c / (1 + c) for two models, whatever the length of the task vectors."""
    base = torch.zeros(2)
    tuned = [size * torch.tensor([1.0, 0.0]), size * torch.tensor([cosine, (1 - cosine**2) ** 0.5])]
    found = METHODS["model_stock"](base, tuned)
    torch.testing.assert_close(found, share * (tuned[0] + tuned[1]) / 2, atol=1e-6 * size, rtol=0)


def test_task_arithmetic_adds_where_linear_averages() -> None:
    found = METHODS["task_arithmetic"](BASE, [ONE, TWO], alpha=0.5)
    torch.testing.assert_close(found, BASE + 0.5 * (ONE - BASE) + 0.5 * (TWO - BASE))


def test_soups() -> None:
    """The mean of the tuned models; greedy: the best one, then each that does not make it worse."""
    torch.testing.assert_close(METHODS["soup"](BASE, [ONE, TWO]), (ONE + TWO) / 2)
    assert torch.equal(METHODS["soup"](BASE, [ONE, TWO]), METHODS["soup"](9 * BASE, [ONE, TWO]))
    scores = {(0,): 0.5, (1,): 0.9, (2,): 0.7, (3,): 0.8}
    scores |= {(1, 3): 0.85, (1, 2): 0.9, (1, 2, 0): 0.95}
    asked: list[tuple[int, ...]] = []

    def score(members: Sequence[int]) -> float:
        asked.append(tuple(members))
        return scores[tuple(members)]

    assert greedy_soup(score, 4) == [1, 2, 0]
    assert len(asked) == len(set(asked)) == 7, "no soup is scored twice"
    assert greedy_soup(lambda members: 1.0, 1) == [0]


@pytest.mark.parametrize("method", ["dare", "della"])
def test_random_dropping_keeps_the_expectation(method: str) -> None:
    """Also of small values in a row with large ones, which DELLA drops more often."""
    row = torch.tensor([0.01, -0.1, 1.0, 10.0])
    vector = row.expand(20_000, 4).contiguous()
    params = {"density": 0.5, "alpha": 1.0, "elect": False}
    drawn = call(method, torch.zeros_like(vector), [vector], **params)
    torch.testing.assert_close(drawn.mean(0), row, rtol=0.05, atol=0)
    kept = (drawn != 0).float().mean(0)
    expected = [0.5] * 4 if method == "dare" else [0.35, 0.45, 0.55, 0.65]
    torch.testing.assert_close(kept, torch.tensor(expected), atol=0.02, rtol=0)
    other = call(method, torch.zeros_like(vector), [vector], seed=1, **params)
    assert not torch.equal(other, drawn)
    alone = call(method, torch.zeros(20_000, 1), [torch.ones(20_000, 1)], **params)
    assert set(alone.unique().tolist()) == {0.0, 2.0}, "a row of one value: the mean chance"


def test_random_masks_are_of_their_own_and_belong_to_content() -> None:
    base, tuned = torch.zeros(1000), [torch.full((1000,), 1.0), torch.full((1000,), 100.0)]
    found = call("dare", base, tuned, density=0.5, alpha=1.0)
    assert set(found.round().tolist()) == {0, 1, 100, 101}, "each model has its own mask"
    assert torch.equal(found, call("dare", base, tuned[::-1], density=0.5, alpha=1.0))
    assert [t.shape for t in by_content([torch.tensor(1.0), torch.ones(2)[::2]])]


def test_ties_ignores_a_tied_vote_and_keeps_equal_magnitudes() -> None:
    base, one = torch.zeros(3), torch.tensor([1.0, 2.0, -3.0])
    other = torch.tensor([-1.0, 2.0, 1.0])
    found = call("ties", base, [one, other], alpha=1.0, density=1.0)
    assert found.tolist() == [0.0, 2.0, -3.0]
    assert call("ties", base, [-one, -other], alpha=1.0, density=1.0).tolist() == [0.0, -2.0, 3.0]
    equal = torch.tensor([0.5, -0.5, 0.5, 0.1])
    kept = call("ties", torch.zeros(4), [equal], alpha=1.0, density=0.3)
    assert kept.tolist() == [0.5, -0.5, 0.5, 0.0]


def test_methods_are_listed_without_torch() -> None:
    code = (
        "import sys; from merging.methods import METHODS; "
        "assert len([METHODS.about(n) for n in METHODS]) > 10; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
