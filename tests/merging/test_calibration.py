"""Fisher information and Gram matrices: against exact Jacobians and captured inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from merging.methods.fitted import regmean
from merging.weights import calibration as calibrate
from merging.weights.calibration import Calibration, calibrated, fisher, gram, statistics
from tests import tiny
from upstream import audio
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder

WINDOW, HOP = 400, 320  # samples


def exact_fisher(encoder: Encoder, wavs: list[Tensor]) -> dict[str, Tensor]:
    """The definition: the whole Jacobian of the padded batch's valid last states, row by row."""
    names, leaves = zip(*encoder.model.named_parameters())
    hidden = encoder(*audio.pad(wavs))
    result = {name: torch.zeros_like(leaf) for name, leaf in zip(names, leaves)}
    for row, frames in enumerate(hidden.lens.tolist()):
        for value in hidden.layers[-1, row, :frames].flatten():
            gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients):
                if gradient is not None:
                    result[name] += gradient.square() / (frames * len(wavs))
    return result


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Relative L1 distance over all entries."""
    change = sum(float((one[name] - two[name]).abs().sum()) for name in two)
    return change / sum(float(value.abs().sum()) for value in two.values())


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Equal but for rounding: to 1e-4 of each tensor's largest entry."""
    limits = {name: 1e-4 * float(value.abs().max()) + 1e-9 for name, value in two.items()}
    return one.keys() == two.keys() and all(
        torch.allclose(one[name], two[name], rtol=0, atol=limit) for name, limit in limits.items()
    )


def hadamard(size: int) -> Tensor:
    """Rows of signs that are orthogonal: the mean over them has no sampling error."""
    rows = torch.ones(1, 1)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_fisher_is_the_jacobians_of_the_padded_batch(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All signs of an orthogonal set: exact, for every family, and one tensor per weight."""

    def signs(wav: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
        draws, frames, dim = shape
        return hadamard(draws)[:, : frames * dim].reshape(shape)

    monkeypatch.setattr(calibrate, "_signs", signs)
    encoder = tiny.encoder(tmp_path, variant)
    wavs = tiny.noise(WINDOW + HOP, WINDOW + 10)  # two frames and one
    found = fisher(encoder, wavs, draws=64)
    assert close(found, exact_fisher(encoder, wavs))
    state = encoder.model.state_dict()
    assert {n: f.shape for n, f in found.items()} == {n: t.shape for n, t in state.items()}


def test_fisher_comes_nearer_with_draws(tmp_path: Path) -> None:
    encoder, wavs = tiny.encoder(tmp_path), tiny.noise(WINDOW + 2 * HOP, WINDOW)
    exact = exact_fisher(encoder, wavs)
    errors = [distance(fisher(encoder, wavs, draws=draws), exact) for draws in (1, 16, 256)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # 1 / sqrt(draws) would be 4 and 16
    assert errors[2] < 0.1


def test_fisher_of_a_last_bias_is_one_and_of_what_does_not_matter_zero(tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path)
    last = encoder.model.encoder.layers[-1]
    with torch.no_grad():
        last.feed_forward.output_dense.weight.zero_()
    found = fisher(encoder, tiny.noise(4000, 3000), draws=400)
    block = "encoder.layers.2"
    # h moves with it one to one in every frame
    assert torch.allclose(found[f"{block}.final_layer_norm.bias"].mean(), torch.tensor(1.0), 0.05)
    assert not found["masked_spec_embed"].any()
    assert not found[f"{block}.feed_forward.intermediate_dense.weight"].any()
    # a softmax does not see what is added to all its scores
    attention = f"{block}.attention"
    keys, queries = (found[f"{attention}.{p}_proj.bias"].max() for p in "kq")
    assert keys < 1e-6 * queries


def test_fisher_depends_on_seed_and_utterances_not_on_order_or_state(tmp_path: Path) -> None:
    encoder, wavs = tiny.encoder(tmp_path), tiny.noise(3000, 2000, 1000)
    found = fisher(encoder, wavs, seed=1)
    encoder.train()
    encoder.requires_grad_(False)
    with torch.no_grad():
        again = fisher(encoder, wavs, seed=1)
    assert all(torch.equal(again[name], value) for name, value in found.items())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert close(fisher(encoder, wavs[::-1], seed=1), found)
    alone = [fisher(encoder, [wav], seed=1) for wav in wavs]
    assert close({n: torch.stack([a[n] for a in alone]).mean(0) for n in found}, found)
    assert not close(fisher(encoder, wavs, seed=2), found)


@pytest.mark.parametrize("measure", [fisher, gram])
def test_nothing_to_measure_or_not_finite_is_one_line(
    tmp_path: Path, measure: Callable[..., dict[str, Tensor]]
) -> None:
    encoder = tiny.encoder(tmp_path)
    with pytest.raises(UserError, match="nothing to calibrate on"):
        measure(encoder, [])
    with pytest.raises(UserError, match="are not finite"):
        measure(encoder, [torch.full((WINDOW,), float("nan"))])


def captured(encoder: Encoder, wavs: list[Tensor]) -> dict[str, Tensor]:
    """The valid rows [N, in] that each Linear sees in one padded batch."""
    rows: dict[str, Tensor] = {}
    lens = encoder.frames(torch.tensor([len(wav) for wav in wavs])).tolist()

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        own = [row[..., :frames, :].flatten(0, -2) for row, frames in zip(inputs[0], lens)]
        rows[f"{name}.weight"] = torch.cat(own)

    modules = [(n, m) for n, m in encoder.model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(partial(keep, n)) for n, m in modules]
    with torch.no_grad():
        encoder(*audio.pad(wavs))
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_gram_is_of_the_valid_inputs_of_every_linear(tmp_path: Path, variant: str) -> None:
    encoder, wavs = tiny.encoder(tmp_path, variant), tiny.noise(4000, 1500)
    frames = int(encoder.frames(torch.tensor([4000, 1500])).sum())
    expected = {n: x.T @ x / frames for n, x in captured(encoder, wavs).items()}
    found = gram(encoder, wavs)
    assert close({name: found[name] for name in expected}, expected)
    assert close(gram(encoder, wavs[::-1]), found)
    state = encoder.model.state_dict()
    matrices = {n for n, t in state.items() if t.dim() == 2 and "rel_attn_embed" not in n}
    norms = {n for n in state if "layer_norm.weight" in n and "feature_extractor" not in n}
    assert set(found) == matrices | norms and all(value.any() for value in found.values())
    assert not any(module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_of_a_layer_norm_gram_has_the_squares_that_its_scale_acts_on(
    tmp_path: Path, variant: str
) -> None:
    """Read off its outputs: with a scale of 1 and no bias they are those inputs."""
    encoder, wavs = tiny.encoder(tmp_path, variant), tiny.noise(4000, 1500)
    name = "encoder.layers.1.final_layer_norm"
    norm, outputs = encoder.model.get_submodule(name), []
    with torch.no_grad():
        norm.weight.fill_(1.0)
        norm.bias.zero_()
        hook = norm.register_forward_hook(lambda _, __, y: outputs.append(y[0]))
        found = gram(encoder, wavs)[f"{name}.weight"]
        hook.remove()
    torch.testing.assert_close(found, torch.cat(outputs).square().mean(0))


@pytest.mark.parametrize("variant", ["hubert", "wavlm-large"])
def test_grams_give_the_least_squares_merge(tmp_path: Path, variant: str) -> None:
    """What RegMean is for: on the calibration audio the merged Linear comes as near to the outputs
    of each model's own as any one Linear can; the mean does not."""
    wavs = tiny.noise(32_000, 16_000)
    encoders = [tiny.encoder(tmp_path, variant, seed) for seed in (0, 1)]
    grams = [gram(encoder, wavs) for encoder in encoders]
    inputs = [captured(encoder, wavs) for encoder in encoders]
    for name in inputs[0]:
        base, tuned = (encoder.model.state_dict()[name] for encoder in encoders)
        x = torch.cat([rows[name] for rows in inputs]).double()
        own = [rows[name].double() @ w.double().T for rows, w in zip(inputs, (base, tuned))]
        y = torch.cat(own)
        stats = [g[name] for g in grams]
        merged = regmean(base, [tuned], alpha=0.5, off_diagonal=1.0, stats=stats)
        candidates = (torch.linalg.lstsq(x, y)[0].T, merged, (base + tuned) / 2)
        best, found, mean = (float((x @ w.double().T - y).square().sum()) for w in candidates)
        assert best <= found < best + 0.01 * mean, name  # the method's ridge pulls to the mean
        assert found < 0.75 * mean, name


class Sound(NamedTuple):
    """A clip whose audio is in memory."""

    key: str
    wav: Tensor

    def load(self) -> Tensor:
        return self.wav


@pytest.fixture
def sounds() -> list[Sound]:
    return [Sound(f"k{i}", wav) for i, wav in enumerate(tiny.noise(1000, 1500, 800))]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Sources of the encoders that statistics were measured of, in order."""
    sources: list[str] = []
    for name in ("fisher", "gram"):
        original = getattr(calibrate, name)

        def spy(encoder: Encoder, wavs: Sequence[Tensor], original=original, **settings):  # type: ignore[no-untyped-def]
            sources.append(encoder.source)
            return original(encoder, wavs, **settings)

        monkeypatch.setattr(calibrate, name, spy)
    return sources


@pytest.mark.parametrize("kind, measure", [("fisher", fisher), ("gram", gram)])
def test_statistics_are_kept_and_found_by_content(  # type: ignore[no-untyped-def]
    tmp_path: Path, sounds: list[Sound], measured: list[str], kind, measure
) -> None:
    encoder = tiny.encoder(tmp_path)
    found = statistics(kind, encoder, sounds, tmp_path / "s")
    expected = measure(encoder, [sound.wav for sound in sounds])
    assert close(found, expected) and all(v.dtype == torch.float32 for v in found.values())
    statistics(kind, tiny.encoder(tmp_path), sounds[::-1], tmp_path / "s")
    assert len(measured) == 1
    statistics(kind, encoder, sounds[:2], tmp_path / "s")
    statistics(kind, tiny.encoder(tmp_path, seed=1), sounds, tmp_path / "s")
    assert len(measured) == 3
    statistics(kind, encoder, sounds, tmp_path / "s", seed=1)
    assert len(measured) == (4 if kind == "fisher" else 3)  # a Gram matrix draws nothing
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "s").glob("*/*"))


def test_unwritable_and_damaged_statistics_are_one_line(
    tmp_path: Path, sounds: list[Sound]
) -> None:
    encoder, folder = tiny.encoder(tmp_path), tmp_path / "s"
    folder.write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        statistics("gram", encoder, sounds, folder)
    folder.unlink()
    statistics("gram", encoder, sounds, folder)
    (path,) = folder.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged; delete it"):
        statistics("gram", encoder, sounds, folder)


def test_calibrated_goes_on_with_the_model_it_stopped_at(
    recipes: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [tiny.encoder(tmp_path, seed=seed) for seed in (0, 1)]
    plan = Calibration(task="label.yaml", utterances=5)
    where = (plan, recipes, tmp_path / "r")
    save = calibrate.save_tensors

    def interrupted(*arguments: Any) -> None:
        if len(measured) == 2:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(calibrate, "save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated("gram", encoders, *where)
    monkeypatch.setattr(calibrate, "save_tensors", save)
    base, tuned = calibrated("gram", encoders, *where)
    assert measured == [encoders[0].source, encoders[1].source, encoders[1].source]
    wavs = [clip.load() for clip in calibrate.utterances(*where)]
    assert close(base, gram(encoders[0], wavs)) and close(tuned, gram(encoders[1], wavs))


def test_utterances_are_a_seeded_choice_of_the_training_split(
    recipes: Path, tmp_path: Path
) -> None:
    def choose(count: int, seed: int = 0) -> list[str]:
        plan = Calibration("label.yaml", count, seed)
        return [Path(c.path).name for c in calibrate.utterances(plan, recipes, tmp_path / "r")]

    few, many = choose(5), choose(36)
    assert many[:5] == few and len(set(many)) == 36
    assert {name[0] for name in many} == {"0", "1", "2"}, "speakers of the training split"
    assert choose(5, seed=1) != few
    for count in (0, 37):
        with pytest.raises(UserError, match="between 1 and 36, the training utterances of label"):
            choose(count)
