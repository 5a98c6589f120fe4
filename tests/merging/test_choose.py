"""Curves of alpha; alpha and members chosen on held-out dev scores: rules, regret, once only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

import upstream
from downstream.recipe import RECIPES
from downstream.recipe import load as load_task
from downstream.run import execute as jobs
from downstream.run.schedule import Request, RunOptions
from merging import choose
from merging import merged as interpolation
from merging import requests as names
from merging.choose import Choose, Dev, deep, greedy, pick
from merging.recipe import load_recipe
from merging.tuning.recipe import load_recipe as load_tuning
from upstream.common.errors import UserError

METRICS = {"asr": "wer", "sid": "accuracy"}


def test_the_mean_relative_gain_decides_over_error_rates_and_accuracies() -> None:
    dev = {
        "asr": {"0": 20.0, "0.25": 18.0, "0.5": 16.0, "1": 30.0},
        "sid": {"0": 60.0, "0.25": 70.0, "0.5": 62.0, "1": 40.0},  # errors 40, 30, 38, 60
    }
    found = pick(dev, METRICS, ["0", "0.25", "0.5", "1"])
    gains = {"0": 0.0, "0.25": (0.1 + 0.25) / 2, "0.5": (0.2 + 0.05) / 2, "1": (-0.5 - 0.5) / 2}
    assert found.gain == pytest.approx(gains)
    assert found.chosen == "0.25" and found.regret == dict.fromkeys(found.dev, 0)
    found = pick(dev, METRICS, ["0", "0.5", "1"])
    assert found.chosen == "0.5", "0.25 was scored, but is no candidate here"
    assert found.regret == {"asr": 2.0, "sid": -8.0}
    assert "0.25 instead: -3.00 points worse on average" in found.lines()[-1]
    text = "\n".join(found.lines())
    assert "asr WER 16.00  sid ACC 62.00  relative gain +12.5 %" in text
    assert "0.25 instead: -3.00 points worse on average (asr 2.00, sid -8.00)" in text


def test_ties_go_to_the_nearest_of_a_quarter() -> None:
    level = {"asr": {"0": 10.0, "0.1": 8.0, "0.25": 9.0, "0.3": 8.0, "1": 8.0}}
    assert pick(level, METRICS, ["0", "0.1", "0.3", "1"]).chosen == "0.3"
    assert pick(level, METRICS, ["0.1", "1"]).chosen == "0.1"


def test_errors_near_nothing_and_diverged_heads() -> None:
    small = {"asr": {"0": 0.0, "0.25": 0.5, "1": 0.0}}
    assert pick(small, METRICS, ["0", "0.25", "1"]).gain["0.25"] == -0.5
    nan = {"asr": {"0": 5.0, "0.25": 6.0, "1": float("nan")}}
    assert pick(nan, METRICS, ["1", "0.25"]).chosen == "0.25"
    with pytest.raises(UserError, match=r"alpha 0 .*asr"):
        pick({"asr": {"0": float("nan"), "0.25": 6.0}}, METRICS, ["0.25"])


def test_what_a_choice_needs() -> None:
    assert Choose(["asr"], [0.5, 0.1]).scored == ["0", "0.1", "0.25", "0.5"]
    assert Choose(["asr"]).candidates == ["0", "0.1", "0.25", "0.5", "0.75", "1"]
    with pytest.raises(UserError, match="twice"):
        Choose(["asr"], [0.5, 0.5]).check("here")


@pytest.mark.parametrize(
    "specs, expected",
    [
        ("a,b", [["a"], ["b"]]),
        ("merged:alpha=0.5,fbank", [["merged:alpha=0.5"], ["fbank"]]),
        ("merged:alpha=0,0.25,1", [["merged:alpha=0", "merged:alpha=0.25", "merged:alpha=1"]]),
        (
            "fbank,merged:alpha=0,.5,method=ties,hubert_base:padding=s3prl",
            [
                ["fbank"],
                ["merged:alpha=0,method=ties", "merged:alpha=.5,method=ties"],
                ["hubert_base:padding=s3prl"],
            ],
        ),
        ("m.yaml:alpha=1e-1, 1:method=ties", [["m.yaml:alpha=1e-1:method=ties",
                                               "m.yaml:alpha=1:method=ties"]]),
        ("merged:alpha=0.5,0.25x", [["merged:alpha=0.5"], ["0.25x"]]),
    ],
)  # fmt: skip
def test_a_list_of_alphas_is_a_curve(specs: str, expected: list[list[str]]) -> None:
    assert names.curves(specs) == expected


def test_a_curve_is_measured_from_the_base_and_begins_there(recipes: Path, tmp_path: Path) -> None:
    listed, reference = names.requests("merged:alpha=0,0.5", recipes, tmp_path / "r")
    base = load_recipe(recipes / "merged.yaml").base
    assert [each.name for each in listed] == [base, "merged:alpha=0", "merged:alpha=0.5"]
    assert reference == base
    assert not list((tmp_path / "r").rglob("merge.json")), "a plan writes nothing"
    prints = [each.load().fingerprint() for each in listed]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(UserError, match="twice"):
        names.requests("merged:alpha=0.5,0.5", recipes, tmp_path / "r")


def choosing(recipes: Path, held_out: bool = True, **keys: Any) -> None:
    """The suite's merge chooses alpha, by default on the word task with audio of its own."""
    if held_out:  # of the speakers that `label` tests on, which nobody is fine-tuned on
        content = yaml.safe_load((recipes / "word.yaml").read_text())
        root = Path(content["corpus"]["root"])
        head, *rows = (root / "manifest.tsv").read_text().splitlines()
        tests = [row for row in rows if "\ttest\t" in row]
        parts = [row.replace("\ttest\t", f"\t{split}\t")
                 for row, split in zip(tests, ("train", "dev", "test") * len(tests))]  # fmt: skip
        (root / "others.tsv").write_text("\n".join([head, *parts]) + "\n")
        content["corpus"]["file"] = "others.tsv"
        (recipes / "word.yaml").write_text(yaml.safe_dump(content))
    path = recipes / "merged.yaml"
    content = yaml.safe_load(path.read_text())
    content.pop("params", None)
    content["choose"] = {"tasks": ["word"], "alpha": [0.5, 1], **keys}
    path.write_text(yaml.safe_dump(content))


def test_alpha_is_chosen_once_and_by_every_later_command(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    choosing(recipes)
    results = tmp_path / "r"
    how = RunOptions(results, 1, "cpu")
    where = {"recipe": str(recipes / "merged.yaml"), "results": str(results)}

    listed, _ = names.requests("merged", recipes, results)
    needs = names.unbuilt(listed[-1])
    assert needs and "steps of fine-tuning, alpha to choose from 4 on word" in needs.why
    assert [seconds for _, seconds in needs.runs if seconds > 0] and not list(
        results.rglob("*.safetensors")
    ), "planning builds nothing"
    with pytest.raises(UserError, match="chooses its alpha, which is not done yet"):
        upstream.load("merged", **where)

    listed, _ = names.requests("merged", recipes, results, how)
    out = capsys.readouterr().out
    assert "alpha chosen on dev scores of word" in out and "0.25 instead" in out
    kept = list((results / "chosen").iterdir())
    assert len(kept) == 1
    choice = json.loads(kept[0].read_text())
    assert choice["chosen"] in ("0.5", "1") and set(choice["gain"]) == {"0", "0.25", "0.5", "1"}
    assert names.unbuilt(listed[-1]) is None

    merged = listed[-1].load()
    record = json.loads((Path(merged.source) / "merge.json").read_text())
    assert record["params"]["alpha"] == float(choice["chosen"])
    assert upstream.load("merged", **where).fingerprint() == merged.fingerprint()
    same = upstream.load("merged", alpha=float(choice["chosen"]), **where)
    assert same.fingerprint() == merged.fingerprint()

    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("scored again"))
    again, _ = names.requests("merged", recipes, results, how)
    assert again == listed
    planned, _ = names.requests("merged", recipes, results)
    assert planned == listed, "a choice that was made is found by a plan"


def test_a_task_whose_audio_was_trained_on_cannot_choose(recipes: Path, tmp_path: Path) -> None:
    """By its audio, whatever its recipe is called and labels."""
    for task in ("label", "word"):
        choosing(recipes, held_out=False, tasks=[task])
        with pytest.raises(UserError, match=f"fine-tuned on 12 of the 12 dev utterances of {task}"):
            names.requests("merged", recipes, tmp_path / "r", RunOptions(tmp_path / "r", 1, "cpu"))
    choosing(recipes, tasks=["wrod"])
    with pytest.raises(UserError, match="did you mean word"):
        names.requests("merged", recipes, tmp_path / "r", RunOptions(tmp_path / "r", 1, "cpu"))


def test_a_greedy_soup_by_mean_gain() -> None:
    errors = {
        "base": 20.0, "0": 18.0, "1": 30.0, "2": 16.0, "0+1+2": 24.0,
        "0+2": 16.0, "0+1": 40.0, "1+2": 50.0,
    }  # fmt: skip
    asked: list[str] = []

    def score(candidates: Sequence[str]) -> Dev:
        asked.extend(candidates)
        return {"asr": {one: errors[one] for one in candidates}}

    found = greedy(score, METRICS, 3)
    assert found.chosen == "0+2", "0 does no harm and joins the best, 1 does and does not"
    assert asked == ["base", "0", "1", "2", "0+1+2", "0+2"], "nothing is scored twice"
    assert found.gain["0+2"] == pytest.approx(0.2) and found.usual == "0+1+2"
    assert found.regret == {"asr": 8.0}
    text = "\n".join(found.lines())
    assert text.startswith("members chosen on dev scores of asr: 0+2\n")
    assert "members 0+2   asr WER 16.00  relative gain +20.0 %" in text
    assert "0+1+2 instead: 8.00 points worse on average" in text
    errors["2"] = float("nan")  # diverged: neither alone nor with others
    errors["0+2"] = errors["0+1+2"] = float("nan")
    assert greedy(score, METRICS, 3).chosen == "0"


def soup(recipes: Path, folders: list[Path], **keys: Any) -> dict[str, Any]:
    """A recipe that chooses members among `folders`; the `merged` loader's options for it."""
    path = recipes / "merged.yaml"
    content = yaml.safe_load(path.read_text()) | {"method": "soup", "origin": "unchecked"}
    content |= {"tuned": [str(folder) for folder in folders], "params": {}}
    content["choose"] = {"tasks": ["label"], "members": "greedy"}
    path.write_text(yaml.safe_dump(content | keys))
    return {"recipe": str(path), "results": str(recipes / "r")}


def member(recipes: Path, name: str, change: Callable[[str, Tensor], Tensor]) -> Path:
    """The recipe's base with changed weights."""
    folder = recipes / name
    shutil.copytree(load_recipe(recipes / "merged.yaml").base, folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {name: change(name, tensor).contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_harmful_member_is_left_out_and_the_others_are_kept(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored by how far the weights are from better ones, which two of three members lie around."""
    rng = torch.Generator().manual_seed(0)

    def near(name: str, shift: float, noise: float) -> Path:
        return member(
            recipes, name, lambda _, t: t + shift + noise * torch.randn(t.shape, generator=rng)
        )

    folders = [near("one", 0.02, 0.02), near("lost", 0.0, 1.0), near("two", 0.02, 0.02)]
    where = soup(recipes, folders)
    first = "feature_projection.projection.weight"
    better = upstream.load(load_recipe(Path(where["recipe"])).base).model.state_dict()[first] + 0.02
    scored: list[str] = []

    def score(requests: Mapping[str, Request], *_: Any) -> Dev:
        scored.extend(requests)
        weights = {one: r.load().model.state_dict()[first] for one, r in requests.items()}
        return {"label": {one: 90 - float((w - better).norm()) for one, w in weights.items()}}

    monkeypatch.setattr(choose, "score", score)
    results = Path(where["results"])
    listed, _ = names.requests("merged", recipes, results, RunOptions(results, 1, "cpu"))
    choice = choose.read(next((results / "chosen").iterdir()))
    assert choice.chosen == "0+2" and choice.what == "members"
    assert scored[:5] == ["base", "0", "1", "2", "0+1+2"] and "0+2" in scored
    merged = listed[-1].load()
    given = upstream.load("merged", members="2+0", **where)
    assert given.fingerprint() == merged.fingerprint()
    assert given.source == merged.source, "the same merge, made once"
    written = interpolation.write(
        load_recipe(recipes / "merged.yaml"), recipes / "merged.yaml", tmp_path / "out", results
    )
    assert written.record["fingerprints"]["merged"] == merged.fingerprint()
    assert written.record["tuned"] == [str(folders[0]), str(folders[2])]
    text = (tmp_path / "out" / "README.md").read_text()
    for line in ("## Why members 0+2", "the greedy soup by mean relative gain", "| 0+1+2 | "):
        assert line in text, line
    other = names.requests("merged:alpha=0.5", recipes, results)[0][-1]
    needs = names.unbuilt(other)
    assert needs and "members to choose from 3 on label" in needs.why, (
        "another alpha, another choice"
    )


def test_members_are_chosen_on_real_dev_scores(recipes: Path) -> None:
    """Each member is as good as the base alone; their mean has no features left."""
    scale = "feature_projection.layer_norm"
    folders = [
        member(recipes, "same", lambda _, t: t),
        member(recipes, "flipped", lambda name, t: -t if name.startswith(scale) else t),
    ]
    where = soup(recipes, folders)
    results = Path(where["results"])
    with pytest.raises(UserError, match="chooses its members, which is not done yet"):
        upstream.load("merged", **where)
    names.requests("merged", recipes, results, RunOptions(results, 1, "cpu"))
    choice = choose.read(next((results / "chosen").iterdir()))
    assert choice.chosen in ("0", "1") and choice.gain["0+1"] < choice.gain[choice.chosen]
    assert choice.gain["0"] == 0, "the base itself"


def curve(errors: Callable[[Sequence[float]], float], asked: list[str]) -> choose.Score:
    """Dev scores of alphas at three depths, noted in `asked`."""

    def score(candidates: Sequence[str]) -> Dev:
        asked.extend(candidates)
        values = {one: [*map(float, one.split("/"))] for one in candidates}
        return {"asr": {one: errors(v if len(v) > 1 else v * 3) for one, v in values.items()}}

    return score


def test_alphas_over_depth_are_searched_one_by_one() -> None:
    """The lower layers are best left alone, the upper ones wholly fine-tuned."""
    asked: list[str] = []
    plan = Choose(["asr"], [0, 0.25, 0.5, 1], depths=3)

    def errors(alphas: Sequence[float]) -> float:
        return 10 + sum(abs(a - best) for a, best in zip(alphas, (0.0, 0.5, 1.0)))

    found = deep(curve(errors, asked), METRICS, plan)
    assert found.chosen == "0/0.5/1" and found.what == "alpha" and found.usual == "0.25"
    assert asked[:4] == ["0", "0.25", "0.5", "1"], "one alpha for all comes first"
    assert asked[4:7] == ["0.5/0.5/0", "0.5/0.5/0.25", "0.5/0.5/1"], "then the last layers"
    assert len(asked) == len(set(asked)) <= plan.count == 13
    assert found.regret == {"asr": pytest.approx(1.25)}
    assert max(found.gain, key=lambda one: found.gain[one]) == found.chosen
    # what makes no difference stays with the best single alpha, and is written as one
    level = deep(curve(lambda alphas: 10 - alphas[0], []), METRICS, Choose(["asr"], depths=3))
    assert level.chosen == "1"
    flat = deep(curve(lambda alphas: 10.0, []), METRICS, Choose(["asr"], depths=2))
    assert flat.chosen == "0.25"


def test_alphas_over_depth_are_chosen_kept_and_named(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how far the merged layers are from those that lie 0, then 1 of the way."""
    choosing(recipes, alpha=[0, 0.5, 1], depths=2)
    path, results = recipes / "merged.yaml", tmp_path / "r"
    where = {"recipe": str(path), "results": str(results)}
    best = upstream.load("merged", alpha="0/1", **where).model.state_dict()
    scored: list[str] = []

    def score(requests: Mapping[str, Request], *_: Any) -> Dev:
        scored.extend(requests)
        far = {}
        for one, request in requests.items():
            state = request.load().model.state_dict()
            far[one] = sum(float((state[name] - best[name]).norm()) for name in best)
        return {"word": {one: 10 + distance for one, distance in far.items()}}

    monkeypatch.setattr(choose, "score", score)
    needs = names.unbuilt(names.requests("merged", recipes, results)[0][-1])
    assert needs and "alpha to choose from 8 on word" in needs.why
    listed, _ = names.requests("merged", recipes, results, RunOptions(results, 1, "cpu"))
    assert len(scored) == len(set(scored)) <= 8
    merged = listed[-1].load()
    assert all(torch.equal(best[name], t) for name, t in merged.model.state_dict().items())
    record = interpolation.write(load_recipe(path), path, tmp_path / "out", results).record
    assert record["params"]["alpha"] == [0.0, 1.0] and record["choose"]["chosen"] == "0/1"
    assert "## Why alpha 0/1" in (tmp_path / "out" / "README.md").read_text()
    named, _ = names.requests(f"{path}:alpha=0/1,hubert_demo", recipes, results)
    assert [len(named), named[0].load().fingerprint()] == [2, merged.fingerprint()]


def test_alphas_over_depth_that_make_no_sense_are_one_line(recipes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="depths or members, not both"):
        Choose(["asr"], members="greedy", depths=2).check("here")
    path, how = recipes / "merged.yaml", RunOptions(tmp_path / "r", 1, "cpu")
    choosing(recipes, depths=1)
    with pytest.raises(UserError, match="choose: depths: 1 must be"):
        load_recipe(path)
    choosing(recipes, depths=9)
    with pytest.raises(UserError, match="choose: depths: alpha: 9 values for 3 transformer layers"):
        names.requests("merged", recipes, tmp_path / "r", how)
    for wrong in ("0/x", "0/", "0//1", "nan"):
        with pytest.raises(UserError, match=r"merged\.yaml: alpha: ") as caught:
            upstream.load("merged", alpha=wrong, recipe=str(path))
        assert "\n" not in str(caught.value)


def test_members_that_are_not_there_are_one_line(recipes: Path) -> None:
    where = soup(recipes, [member(recipes, f"m{n}", lambda _, t: t) for n in range(2)])
    for wrong in ("2", "0+0", "0,1", ""):
        with pytest.raises(UserError, match=r"its tuned models are 0, 1; name") as caught:
            upstream.load("merged", members=wrong, **where)
        assert "\n" not in str(caught.value)
    assert upstream.load("merged", members="1", **where).fingerprint()
    with pytest.raises(UserError, match="alpha"):
        names.requests("merged:alpha=x", recipes, Path(where["results"]))


def test_the_demo_chooses_on_other_audio_than_it_is_fine_tuned_on() -> None:
    demo = RECIPES / "demo"
    choice = load_recipe(demo / "chosen.yaml").choose
    tuned = load_task(demo / load_tuning(demo / "finetune.yaml").task)
    assert choice is not None
    for task in choice.tasks:
        assert load_task(demo / f"{task}.yaml").corpus["part"] != tuned.corpus["part"]
