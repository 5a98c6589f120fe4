"""Stage 2: merged upstreams and folders."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import upstream
from downstream.run.schedule import RunOptions
from merging import merged as interpolation
from merging import requests, write
from merging.recipe import command, load_recipe, placed, recipe_of
from merging.weights import compatibility as matching
from tests import tiny
from upstream.checkpoints import tensor_files as files
from upstream.common.errors import UserError


def test_merged_upstream_is_built_on_demand_and_identified_by_its_weights(
    recipes: Path, tmp_path: Path
) -> None:
    where = {"recipe": str(recipes / "merged.yaml"), "results": str(tmp_path / "r")}
    prints = {a: upstream.load("merged", alpha=a, **where).fingerprint() for a in (0.0, 0.25, 1.0)}
    assert upstream.load("merged", **where).fingerprint() == prints[0.25]
    assert len(set(prints.values())) == 3
    base = upstream.load(load_recipe(recipes / "merged.yaml").base)
    assert prints[0.0] == base.fingerprint()
    tuned = upstream.load("finetuned", **where)
    merged = upstream.load("merged", alpha=1.0, **where)
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, tuned.state_dict()[name], atol=1e-6)


def test_a_merge_is_settled_once_into_a_folder_that_workers_load(
    recipes: Path, tmp_path: Path
) -> None:
    options = RunOptions(tmp_path / "r", 1, "cpu")
    listed, _ = requests.requests("merged", recipes, options.results, options)
    folder = Path(listed[-1].load().source)
    assert [each.name for each in listed[1:]] == ["finetuned", "merged"]
    assert all(str(options.results / "upstreams") in each.spec for each in listed[1:])
    record = json.loads((folder / "merge.json").read_text())
    assert record["fingerprints"]["merged"] == listed[-1].load().fingerprint()
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    where = {"recipe": str(recipes / "merged.yaml"), "results": str(options.results)}
    assert upstream.load("merged", **where).source == str(folder)
    assert upstream.load("merged", alpha=0.25, **where).source == str(folder), "by content"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_an_interrupted_merge_does_not_look_finished(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"recipe": str(recipes / "merged.yaml"), "results": str(tmp_path / "r")}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "write_card", interrupt)  # the weights are written by then
        upstream.load("merged", **where)
    (weights,) = (tmp_path / "r" / "upstreams").glob("merged@*/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    upstream.load("merged", **where).fingerprint()
    assert weights.read_bytes() == content, "made again"
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"merged@.*damaged"):
        upstream.load("merged", **where).fingerprint()


def test_a_merge_has_heard_what_its_models_have(tmp_path: Path) -> None:
    base = related(tmp_path)
    (base / "heard.txt").write_text("a\n")
    (tmp_path / "tuned-1" / "heard.txt").write_text("a\nb:0.0-1.0\n")
    plan = recipe_of(str(base), [str(tmp_path / "tuned-1")], None, {})
    interpolation.write(plan, Path(), tmp_path / "out", tmp_path / "r")
    assert (tmp_path / "out" / "heard.txt").read_text() == "a\nb:0.0-1.0\n"
    assert upstream.load(str(tmp_path / "out")).heard == {"a", "b:0.0-1.0"}
    for folder in (base, tmp_path / "tuned-1"):
        (folder / "heard.txt").unlink()
    interpolation.write(plan, Path(), tmp_path / "out", tmp_path / "r")
    assert upstream.load(str(tmp_path / "out")).heard == frozenset()


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "bert"}', "layers", "\0"])
def test_the_same_form_refuses_a_config_that_is_not_the_weights(
    tmp_path: Path, content: str
) -> None:
    base = related(tmp_path)
    if content == "layers":
        known = json.loads((base / "config.json").read_text())
        content = json.dumps({**known, "num_hidden_layers": 2})
    plan = recipe_of(str(base), [str(tmp_path / "tuned-1")], None, {})
    interpolation.write(plan, Path(), tmp_path / "good", tmp_path / "r", "same")
    (base / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(base)) as caught:
        interpolation.write(plan, Path(), tmp_path / "out", tmp_path / "r", "same")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def related(folder: Path, seed: int = 1, size: float = 0.01, variant: str = "hubert") -> Path:
    """A tiny model folder and a fine-tuned form of it beside."""
    base = tiny.hf_folder(folder, variant)
    tuned = folder / f"tuned-{seed}"
    shutil.copytree(base, tuned)
    state = safetensors.torch.load_file(base / "model.safetensors")
    rng = torch.Generator().manual_seed(seed)
    moved = {name: t + size * torch.randn(t.shape, generator=rng) for name, t in state.items()}
    safetensors.torch.save_file(moved, tuned / "model.safetensors", {"format": "pt"})
    return base


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_written_folder_is_complete_and_the_same_every_time(tmp_path: Path) -> None:
    base = related(tmp_path)
    plan = recipe_of(str(base), [str(tmp_path / "tuned-1")], None, {"alpha": [0.1, 0.5]})
    found = [
        interpolation.write(plan, Path(), tmp_path / out, tmp_path / "r") for out in ("a", "b")
    ]
    one, two = digests(tmp_path / "a"), digests(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert one[name] == two[name]
    record = json.loads((tmp_path / "a" / "merge.json").read_text())
    merged = upstream.load(str(tmp_path / "a"))
    assert record["fingerprints"]["merged"] == merged.fingerprint()
    assert record["base_fingerprint"] == upstream.load(str(base)).fingerprint()
    assert len(record["fingerprints"]["tuned"]) == 1
    effective = record["effective_alpha"]
    assert [effective[f"layer {n}"] for n in (1, 2, 3)] == pytest.approx([0.1, 0.3, 0.5], abs=1e-4)
    assert 0 < record["pos_conv_difference"] < 1
    for key in ("versions", "git", "recipe", "params", "tensors"):
        assert record[key]
    assert "effective alpha 0.3000" in "\n".join(found[0].lines())
    assert "kernel of pos_conv" in "\n".join(found[0].lines())


def test_a_merge_that_fails_half_way_leaves_no_weights(tmp_path: Path) -> None:
    base = related(tmp_path)
    weights = tmp_path / "tuned-1" / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    last = "encoder.layers.2.final_layer_norm.bias"  # finite, but not along the way
    state[last] = torch.full_like(state[last], 3e38)
    safetensors.torch.save_file(state, weights, {"format": "pt"})
    plan = recipe_of(str(base), [str(tmp_path / "tuned-1")], None, {"alpha": 2.0})
    with pytest.raises(UserError, match=f"the merge of {last} is not finite"):
        interpolation.write(plan, Path(), tmp_path / "out", tmp_path / "r")
    assert not list((tmp_path / "out").iterdir())


def test_weights_that_are_made_one_by_one_are_all_there(tmp_path: Path) -> None:
    like = {"a": torch.empty(2, device="meta"), "b": torch.empty(3, 1, device="meta")}
    path = tmp_path / "w.safetensors"
    values = {"b": torch.ones(3, 1), "a": torch.zeros(2)}
    files.save_tensors(like, path, values=iter(values.items()))
    read = safetensors.torch.load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in values.items())
    before = path.read_bytes()
    for wrong in ({"a": values["a"]}, {"a": values["b"], "b": values["b"]}):
        with pytest.raises(ValueError, match=r"b never came|a is \(3, 1\), not \(2,\)"):
            files.save_tensors(like, path, values=iter(wrong.items()))
    assert path.read_bytes() == before


def test_same_form_goes_back_into_the_base_file(tmp_path: Path) -> None:
    """Any architecture: only names and shapes count, and what is no encoder tensor stays."""
    torch.manual_seed(0)
    names = ("post_extract_proj.weight", "encoder.layers.0.fc1.weight", "encoder.layers.0.fc1.bias")
    weights = {name: torch.randn(8, 8) for name in names}
    other = {name: tensor + 0.01 * torch.randn(8, 8) for name, tensor in weights.items()}
    for file, state in (("base.pt", weights), ("tuned.pt", other)):
        torch.save({"cfg": {"kind": "decoar"}, "model": state}, tmp_path / file)
    plan = recipe_of(str(tmp_path / "base.pt"), [str(tmp_path / "tuned.pt")], None, {"alpha": 0.5})
    for out in ("a", "b"):
        interpolation.write(plan, Path(), tmp_path / out, tmp_path / "r", "same")
    written = torch.load(tmp_path / "a" / "base.pt", weights_only=True)
    assert written["cfg"] == {"kind": "decoar"}
    for name in names:
        torch.testing.assert_close(written["model"][name], (weights[name] + other[name]) / 2)
    assert digests(tmp_path / "a")["base.pt"] == digests(tmp_path / "b")["base.pt"]
    assert "base.pt" in (tmp_path / "a" / "README.md").read_text()


def test_unrelated_and_unlike_models_are_refused(tmp_path: Path) -> None:
    base = related(tmp_path)
    strangers = tiny.hf_folder(tmp_path, "hubert", seed=1)
    out, results = tmp_path / "out", tmp_path / "r"
    plan = recipe_of(str(base), [str(strangers)], None, {})
    with pytest.raises(UserError, match=r"no fine-tuned form of the base.*origin: unchecked"):
        interpolation.write(plan, Path(), out, results)
    with pytest.raises(UserError, match="no fine-tuned form"):
        interpolation.write(plan, Path(), out, results, "same")
    plan = recipe_of(str(base), [str(strangers)], None, {"origin": "unchecked"})
    interpolation.write(plan, Path(), out, results)
    assert "was not checked" in (out / "README.md").read_text()
    plan = recipe_of(str(base), [str(tiny.hf_folder(tmp_path, "wavlm"))], None, {})
    with pytest.raises(UserError, match=r"is not like .*family wavlm, not hubert"):
        interpolation.write(plan, Path(), out, results)
    record = tmp_path / "tuned-1" / "finetune.json"
    record.write_text(json.dumps({"base_fingerprint": "0123"}))
    plan = recipe_of(str(base), [str(tmp_path / "tuned-1")], None, {})
    with pytest.raises(UserError, match="made from base 0123, not from"):
        interpolation.write(plan, Path(), out, results)
    record.write_text(json.dumps({"base_fingerprint": upstream.load(str(base)).fingerprint()}))
    interpolation.write(plan, Path(), out, results)
    assert matching.recorded_base(out) == upstream.load(str(base)).fingerprint()


def test_merging_writes_to_no_input(tmp_path: Path) -> None:
    """Weights are mapped files: a merge in place would reach them."""
    base = related(tmp_path)
    before = digests(base)
    plan = recipe_of(str(base), [str(tmp_path / "tuned-1")], None, {"alpha": 1.0})
    interpolation.write(plan, Path(), tmp_path / "out", tmp_path / "r")
    assert digests(base) == before


MISTAKES = {
    "method": ("method: linaer", "did you mean linear"),
    "key": ("alpha: 0.5", "unknown key 'alpha'"),
    "param": ("params: {alhpa: 0.5}", "params: unknown key 'alhpa'; did you mean alpha"),
    "alpha": ("params: {alpha: much}", "params: alpha: must be float"),
    "several": ("several: maen", "not one of mean, sum, sequential"),
    "origin": ("origin: no", "origin: False is not one of"),
    "statistics": ("method: fisher", "fisher needs calibrate"),
    "both": ("params: {alpha: 0.5}\nchoose: {tasks: [word]}", "params: alpha or choose, not both"),
    "empty": ("choose: {tasks: []}", "at least one alpha and one task"),
    "two choices": ("choose: {tasks: [word], alpha: [0, 1], members: greedy}", "not both"),
    "one member": ("choose: {tasks: [word], members: greedy}", "needs two or more tuned"),
    "none": ("tuned: []", "name at least one"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_merge_recipe_is_one_line(name: str, recipes: Path) -> None:
    lines, message = MISTAKES[name]
    path = recipes / "merged.yaml"
    content = yaml.safe_load(path.read_text()) | yaml.safe_load(lines)
    if "choose" in lines:
        content["params"] = yaml.safe_load(lines).get("params", {})
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_the_command_that_repeats_a_merge(recipes: Path) -> None:
    path, out = recipes / "merged.yaml", Path("out")
    assert command(load_recipe(path), path, out, "hf") == f"benchmark.py merge {path} --output out"
    given = {"alpha": [0, 0.5], "only": ["attention"], "method": "ties", "density": 0.5}
    plan = load_recipe(path, placed(given))
    words = shlex.split(command(plan, path, out, "same"))
    assert words[:3] == ["benchmark.py", "merge", str(path)]
    again = {k: yaml.safe_load(v) for k, v in (w.split("=") for w in words if "=" in w)}
    assert again == given
    flags = command(recipe_of("a", ["b", "c"], "ties", {"alpha": 0.5}), Path(), out, "hf")
    expected = "--base a --tuned b c --set alpha=0.5 --set 'method=\"ties\"' --output out"
    assert flags == f"benchmark.py merge {expected}"


@pytest.mark.parametrize("method", ["fisher", "regmean", "lot"])
def test_a_recipe_calibrates_what_its_method_needs(
    recipes: Path, tmp_path: Path, method: str
) -> None:
    path = recipes / "merged.yaml"
    content = yaml.safe_load(path.read_text())
    content |= {"method": method, "calibrate": {"task": "label.yaml", "utterances": 3}}
    path.write_text(yaml.safe_dump(content))
    where = {"recipe": str(path), "results": str(tmp_path / "r")}
    merged = upstream.load("merged", **where)
    linear = upstream.load("merged", method="linear", **where)
    assert merged.fingerprint() != linear.fingerprint()
    assert upstream.load("merged", **where).fingerprint() == merged.fingerprint()
    out = interpolation.write(load_recipe(path), path, tmp_path / "out", tmp_path / "r")
    assert out.record["fingerprints"]["merged"] == merged.fingerprint()
    assert out.record["stored_bytes"] == 4 * sum(p.numel() for p in merged.model.parameters())
    assert out.record["seconds"] > 0 and out.record["peak_memory_bytes"] > 1e7
