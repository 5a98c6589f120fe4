"""Several objectives in one run, masked prediction without labels, and runs that build on runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import upstream
from downstream.base import Metric
from downstream.tasks.segments import write as segments
from merging import requests
from merging.merged import merged, write
from merging.pretraining import targets
from merging.recipe import load_recipe as load_merge
from merging.tuning import build_tuned, loop
from merging.tuning.masked import DEV, Cosine, MaskedObjective
from merging.tuning.mixture import Mixture, objective_of
from merging.tuning.ranks import ALL, Portion
from merging.tuning.recipe import load_recipe, open_plan
from tests import tiny
from tests.merging.test_ranks import apart, start
from tests.merging.test_scale import STILL
from tests.merging.test_tuning import changed, record, same_after_a_stop
from upstream.common.errors import UserError
from upstream.features.store import Store


class Counted:
    """An objective whose loss says which micro-batch it is."""

    metric: Metric = MaskedObjective.metric

    def __init__(self, name: str, heard: str) -> None:
        self.name, self.heard = name, frozenset({heard})
        self.head = nn.Linear(1, 1)

    def loss(self, encoder: Any, number: int) -> Tensor:
        return torch.tensor(float(number))

    def names(self, number: int) -> list[str]:
        return [f"{self.name}{number}"]

    def dev(self, encoder: Any) -> dict[str, float]:
        return {self.name: float(ord(self.name))}

    def weights(self, numbers: Sequence[int]) -> list[float]:
        return [(number + 1) / sum(k + 1 for k in numbers) for number in numbers]

    def complete(self, first: int, end: int) -> bool:
        return first < end


def mixture(shares: list[float], weights: list[float] | None = None) -> Mixture:
    parts = [Counted(chr(97 + k), f"clip{k}") for k in range(len(shares) + 1)]
    return Mixture(parts, shares, weights or [1.0] * len(parts))


@pytest.mark.parametrize(
    "shares", [[0.5], [0.1], [0.9], [0.25, 0.25], [0.3, 0.3, 0.3], [0.333, 0.05], [0.7, 0.29]]
)
def test_micro_batches_are_dealt_evenly(shares: list[float]) -> None:
    mixed = mixture(shares)
    turns = [mixed.turn(number) for number in range(1000)]
    each = [1 - sum(shares), *shares]
    seen = Counter[int]()
    for number, (which, turn) in enumerate(turns):
        assert turn == seen[which], "each has all of its own, in order"
        seen[which] += 1
        assert mixed.before(number + 1) == [seen[k] for k in range(len(each))]
        for k, share in enumerate(each):
            assert abs(seen[k] - share * (number + 1)) <= len(each), "at any time"
    for k, share in enumerate(each):
        assert abs(seen[k] - 1000 * share) < 2
    assert turns[0] == (0, 0)
    assert mixed.turn(777) == turns[777], "whatever was asked for before"


def test_what_a_mixture_says_is_what_its_parts_say() -> None:
    mixed = mixture([0.5], [1.0, 0.25])
    encoder: Any = None
    assert [mixed.loss(encoder, number).item() for number in range(6)] == [0, 0, 1, 0.25, 2, 0.5]
    assert [mixed.names(number) for number in range(4)] == [["a0"], ["b0"], ["a1"], ["b1"]]
    assert mixed.dev(encoder) == {"a": 97.0, "b": 98.0}
    assert mixed.heard == {"clip0", "clip1"}
    assert mixed.weights([2, 3, 4]) == pytest.approx([2 / 3 * 2 / 5, 1 / 3, 2 / 3 * 3 / 5])
    assert mixed.weights([3]) == [1.0]
    assert not mixed.complete(0, 1) and mixed.complete(0, 2) and not mixed.complete(2, 2)


def both(recipes: Path, **keys: Any) -> Path:
    """Labels and words at once."""
    word = {"task": "word.yaml", "share": 0.5, "specaug": True, "weight": 0.5}
    word["head"] = {"projector": 8, "hidden": 8, "depth": 1}
    return changed(recipes, also=[word | keys])


def test_two_tasks_at_once_resume_exactly(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = same_after_a_stop(both(recipes), tmp_path, monkeypatch, 8)
    facts = record(folder)
    assert facts["metric"] == "accuracy" and facts["best_dev"] == max(
        line["dev"] for line in facts["history"]
    )
    assert all(set(line["also"]) == {"word wer"} for line in facts["history"])
    assert facts["recipe"]["also"][0]["share"] == 0.5
    alone = record(build_tuned(changed(recipes, also=[]), tmp_path / "r"))
    assert alone["fingerprint"] != facts["fingerprint"] and "also" not in alone["recipe"]


def test_each_head_learns_and_what_either_hears_is_heard(recipes: Path, tmp_path: Path) -> None:
    plan = open_plan(both(recipes, layer=1), tmp_path / "r")
    objective = objective_of(plan, Store(tmp_path / "cache"))
    running = loop.Loop(plan, objective, tmp_path / "state.pt")
    running.run("both")
    assert {"head.0.linear.weight", "head.1.linear.weight"} <= running.learned
    split = plan.prepared.splits[""]
    clips = {plan.prepared.clips[i].key for part in ("train", "dev") for i in split[part]}
    assert plan.heard == objective.heard == clips
    assert plan.recipe.highest is None


def test_a_rare_objective_is_waited_for(recipes: Path, tmp_path: Path) -> None:
    """Its head has no gradient before the first evaluation, nor has the last layer."""
    path = changed(recipes, layer=1, also=[{"task": "word.yaml", "share": 0.1, "head": SMALL}])
    moved = record(build_tuned(path, tmp_path / "r"))["moved"]
    assert moved["layer 3"] > 0


SMALL = {"projector": 8, "hidden": 8, "depth": 1}


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ([{"share": 0.5}], r"also\[0\]: needs a task \(a file\), or else masked"),
        ([{"task": "word.yaml", "share": 1.0}], "share: 1.0 must be .* below 1"),
        ([{"task": "word.yaml", "share": 0.5}, {"task": "x.yaml", "share": 0.5}], "leave nothing"),
        ([{"task": "label.yaml", "share": 0.5}], "two objectives are called 'label'"),
        ([{"task": "wrod.yaml", "share": 0.5}], "wrod.yaml: no such file; did you mean word"),
        ([{"task": "word.yaml", "share": 0.5, "haed": {}}], "unknown key 'haed'; did you mean"),
        ([{"task": "word.yaml", "share": 0.5, "head": {"x": 1}}], r"also\[0\]: head: unknown key"),
        ([{"task": "word.yaml", "share": 0.5, "weight": 0}], "weight"),
        ([{"task": "word.yaml", "share": 0.04}], "word: share 0.04 of 20 micro-batches is none"),
    ],
)
def test_wrong_objectives_are_one_line(recipes: Path, also: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(changed(recipes, also=also))
    assert "\n" not in str(caught.value)


def test_segments_in_time_are_an_objective_too(recipes: Path, tones: Path, tmp_path: Path) -> None:
    """The pitch of each frame, beside the words."""
    rows = (tones / "manifest.tsv").read_text().splitlines()
    fields = [row.split("\t") for row in rows]
    for row in fields[1:]:
        row.append(segments([(row[3], 0.0, 0.3)]))
    table = tmp_path / "segments.tsv"
    lines = [[str(tones / row[0]), *row[1:]] for row in fields[1:]]
    table.write_text("\n".join("\t".join(row) for row in [[*fields[0], "phones"], *lines]))
    (recipes / "pc.yaml").write_text(
        f"kind: task\ntask: pc\ncorpus: {{name: manifest, root: {tmp_path}, file: segments.tsv, "
        "target: phones}\ntrain: {steps: 20, batch: 12, lr: [1.0e-2], eval_every: 10}\n"
    )
    word = {"task": "word.yaml", "share": 0.25, "head": SMALL}
    facts = record(build_tuned(changed(recipes, task="pc.yaml", also=[word]), tmp_path / "r"))
    assert facts["metric"] == "frame_accuracy" and facts["best_dev"] > 40, "a third is chance"


# --- masked prediction ----------------------------------------------------------------------------


def masked(recipes: Path, tones: Path, **keys: Any) -> Path:
    """Masked prediction on the bare audio of the tones."""
    corpus = {"name": "audio", "root": str(tones), "dev": 0.2}
    content = yaml.safe_load((recipes / "finetune.yaml").read_text())
    content.pop("task")
    content["masked"] = {"corpus": corpus, "clusters": 8, "layer": 1, "mask_span": 3} | keys
    path = recipes / "masked.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("variant", ["hubert", "wavlm"])
def test_masked_prediction_learns_and_leaves_the_cnn(
    recipes: Path, tones: Path, tmp_path: Path, variant: str
) -> None:
    base = str(tiny.hf_folder(tmp_path, variant, 5))
    masked(recipes, tones)
    path = changed(recipes, "masked", upstream=base, steps=60, eval_every=20, lr=5e-3)
    folder = build_tuned(path, tmp_path / "r")
    facts = record(folder)
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert facts["metric"] == "masked_accuracy" and facts["best_dev"] > 100 / 8
    assert facts["moved"]["cnn"] == 0 < facts["moved"]["layer 3"]
    assert upstream.load(str(folder)).heard == frozenset(), "no label was heard"
    assert not any("codes" in name for name in upstream.load(str(folder)).state_dict())


def test_masked_prediction_resumes_exactly_and_reads_its_targets(
    recipes: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = masked(recipes, tones, unmasked_weight=0.5)
    same_after_a_stop(path, tmp_path, monkeypatch, 8)
    monkeypatch.setattr(targets, "means", lambda *_: pytest.fail("k-means again"))
    again = build_tuned(changed(recipes, "masked", lr=0.02), tmp_path / "b")
    assert record(again)["metric"] == "masked_accuracy"
    (stored,) = (tmp_path / "b" / "cache" / "clusters").iterdir()
    stored.write_bytes(b"half")
    with pytest.raises(UserError, match=r"\.pt: damaged; delete it"):
        build_tuned(changed(recipes, "masked", lr=0.03), tmp_path / "b")


def objective(path: Path, tmp_path: Path) -> MaskedObjective:
    plan = open_plan(path, tmp_path / "r")
    return MaskedObjective(plan, Store(tmp_path / "r" / "cache"))


def test_targets_are_the_nearest_centres_of_the_untuned_upstream(
    recipes: Path, tones: Path, tmp_path: Path
) -> None:
    path = masked(recipes, tones)
    made, plan = objective(path, tmp_path), open_plan(path, tmp_path / "r")
    states = []
    with torch.no_grad():
        for clip in plan.prepared.clips:
            wav = clip.load()
            states.append(plan.encoder(wav[None], torch.tensor([len(wav)])).layers[1, 0])
    assert [len(t) for t in made.targets] == [len(s) for s in states]
    frames, labels = torch.cat(states), torch.cat(made.targets).long()
    centres = torch.stack([frames[labels == k].mean(0) for k in range(8)])
    nearest = torch.cdist(frames, centres).argmin(1)
    assert (nearest == labels).float().mean() > 0.9
    files = [Path(clip.path).name for clip in plan.prepared.clips]
    assert len(files) == 72 and len(set(files)) == 72, "labels and splits of the corpus are unused"


def test_masks_are_a_function_of_the_utterance_and_the_micro_batch(
    recipes: Path, tones: Path, tmp_path: Path
) -> None:
    made = objective(masked(recipes, tones, mask_start=0.08, mask_span=10), tmp_path)
    mask = made.mask(3, 5, 500)
    assert torch.equal(mask, made.mask(3, 5, 500))
    assert not torch.equal(mask, made.mask(4, 5, 500))
    assert not torch.equal(mask, made.mask(3, 6, 500))
    assert not torch.equal(mask, made.mask(DEV, 5, 500))
    share = torch.cat([made.mask(0, i, 2000) for i in range(20)]).float().mean().item()
    assert share == pytest.approx(1 - 0.92**10, abs=0.03), "spans overlap"
    assert all(made.mask(0, i, 3).any() for i in range(50)), "something is always hidden"


def test_the_loss_is_the_cross_entropy_of_what_is_hidden(
    recipes: Path, tones: Path, tmp_path: Path
) -> None:
    path = masked(recipes, tones, unmasked_weight=0.25)
    made, plan = objective(path, tmp_path), open_plan(path, tmp_path / "r")
    inside, outside = [], []
    with torch.no_grad():
        for i in made.stream[0]:
            x, lens = made.batch([i])
            mask = made.mask(0, i, int(lens))
            hidden = plan.encoder.contextual(x, lens, lens, mask[None]).layers[-1, 0]
            logits = made.head(hidden)
            each = F.cross_entropy(logits, made.targets[i].long(), reduction="none")
            inside.append(each[mask])
            outside.append(each[~mask])
        hidden, seen = torch.cat(inside), torch.cat(outside)
        due = (hidden.sum() + 0.25 * seen.sum()) / (len(hidden) + 0.25 * len(seen))
        assert made.loss(plan.encoder, 0).item() == pytest.approx(due.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_any_cut_of_an_update_is_the_update(
    recipes: Path, tones: Path, tmp_path: Path, weight: float
) -> None:
    """Micro-batches of so many seconds, and two shares of each, weighted by their frames."""
    path = masked(recipes, tones, unmasked_weight=weight)
    path = changed(recipes, "masked", batch=None, batch_seconds=2.0, accumulate=3)
    plan = open_plan(path, tmp_path / "r")
    store = Store(tmp_path / "r" / "cache")
    whole, *shares = (MaskedObjective(plan._replace(share=each), store) for each in (ALL, *HALVES))
    encoder = plan.encoder.eval()
    for each in shares:
        each.head.load_state_dict(whole.head.state_dict())
    update = range(3)

    def parts(made: MaskedObjective) -> list[tuple[float, float]]:
        return [
            (share, made.loss(encoder, number).item())
            for number, share in zip(update, made.weights(update))
        ]

    with torch.no_grad():
        cut = [part for each in shares for part in parts(each)]
        summed, count = 0.0, 0.0  # frame by frame
        for number in update:
            logits, right, mask, seen = whole._predicted(encoder, whole.stream[number], number)
            each = F.cross_entropy(logits[mask | seen], right[mask | seen], reduction="none")
            counts = mask[mask | seen] + weight * seen[mask | seen]
            summed, count = summed + float((counts * each).sum()), count + float(counts.sum())
        assert len({len(whole.stream[number]) for number in update}) > 1, "batches of seconds"
        for pieces in (parts(whole), cut):
            assert sum(share for share, _ in pieces) == pytest.approx(1)
            total = sum(share * loss for share, loss in pieces)
            assert total == pytest.approx(summed / count, rel=1e-5)


HALVES = Portion(0, 2), Portion(1, 2)


def test_the_head_is_hubert_s() -> None:
    """Cosines over 0.1, whatever the lengths."""
    torch.manual_seed(0)
    head, x = Cosine(6, 5), torch.randn(3, 6)
    with torch.no_grad():
        projected = head.projector(x)
        due = torch.cosine_similarity(projected[:, None], head.codes[None], -1) / 0.1
        assert torch.allclose(head(x), due, atol=1e-5)


def test_long_audio_is_taken_in_equal_parts(recipes: Path, tones: Path, tmp_path: Path) -> None:
    plan = open_plan(masked(recipes, tones, seconds=0.2), tmp_path / "r")
    whole = open_plan(masked(recipes, tones), tmp_path / "r")
    assert len(whole.prepared.clips) == 72 < len(plan.prepared.clips)
    assert max(clip.seconds for clip in plan.prepared.clips) <= 0.2
    assert plan.prepared.seconds == pytest.approx(whole.prepared.seconds)
    assert plan.key != whole.key


def test_replay_beside_a_task(recipes: Path, tones: Path, tmp_path: Path) -> None:
    wanted = yaml.safe_load(masked(recipes, tones).read_text())["masked"]
    path = changed(recipes, also=[{"masked": wanted, "share": 0.5, "weight": 0.1}])
    folder = build_tuned(path, tmp_path / "r")
    facts = record(folder)
    assert facts["metric"] == "accuracy"
    assert all(0 <= line["also"]["masked_accuracy"] <= 100 for line in facts["history"])
    alone = open_plan(changed(recipes, also=[]), tmp_path / "r")
    assert upstream.load(str(folder)).heard == alone.heard


@pytest.mark.slow
def test_two_processes_mix_what_one_mixes(recipes: Path, tones: Path, tmp_path: Path) -> None:
    wanted = yaml.safe_load(masked(recipes, tones).read_text())["masked"]
    also = [{"masked": wanted, "share": 0.34}]
    path = changed(recipes, also=also, lr=1e-4, eval_every=20, batch=5, **STILL)
    (code, out, _), (other, _, fault) = start(2, path, tmp_path / "two")
    assert (code, other) == (0, 0), fault
    pair, alone = Path(out.splitlines()[-1]), build_tuned(path, tmp_path / "one")
    assert apart(alone, pair) < 1e-5
    histories = [record(folder)["history"][-1]["also"] for folder in (alone, pair)]
    assert histories[0] == pytest.approx(histories[1], abs=1.0)
    assert len(list((tmp_path / "two" / "cache" / "clusters").iterdir())) == 1


def test_wrong_masked_prediction_is_one_line(recipes: Path, tones: Path, tmp_path: Path) -> None:
    def fault(keys: dict[str, Any] | None = None, **others: Any) -> str:
        path = masked(recipes, tones, **(keys or {}))
        with pytest.raises(UserError) as caught:
            build_tuned(changed(recipes, "masked", **others) if others else path, tmp_path / "r")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "hidden states 0 to 3" in fault({"layer": 4})
    assert "frames of audio are too few for 30000 clusters" in fault({"clusters": 30_000})
    assert "head: is for a task" in fault(head={"projector": 8})
    assert "layer: is for a task" in fault(layer=1)
    assert "needs a task (a file), or else masked" in fault(task="label.yaml")
    assert "did you mean audio" in fault({"corpus": {"name": "audo", "root": "."}})
    assert "unknown key 'dve'" in fault({"corpus": {"name": "audio", "root": ".", "dve": 1}})
    base = tiny.hf_folder(tmp_path, "hubert", 6)
    state = upstream.load(str(base)).model.state_dict()  # type: ignore[union-attr]
    from safetensors.torch import save_file

    save_file(
        {k: v for k, v in state.items() if k != "masked_spec_embed"},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "holds no masked_spec_embed" in fault(upstream=str(base))


# --- one after the other --------------------------------------------------------------------------


def sequential(recipes: Path) -> Path:
    """The words are learnt from the merged upstream of the labels, and merged into that."""
    changed(recipes, "finetune_word", upstream="merged.yaml")
    content = {"kind": "merge", "base": "merged.yaml", "tuned": ["finetune_word.yaml"]}
    path = recipes / "second.yaml"
    path.write_text(yaml.safe_dump(content | {"params": {"alpha": 0.5}}))
    return path


def test_a_merged_upstream_is_the_next_base(recipes: Path, tmp_path: Path) -> None:
    path, results = sequential(recipes), str(tmp_path / "r")
    first = merged(str(recipes / "merged.yaml"), results=results)
    second = merged(str(path), results=results)
    tuned = build_tuned(recipes / "finetune_word.yaml", tmp_path / "r")
    assert record(tuned)["base_fingerprint"] == first.fingerprint() != second.fingerprint()
    ends = [first.state_dict(), upstream.load(str(tuned)).state_dict()]
    for name, value in second.state_dict().items():
        due = (ends[0][name] + ends[1][name]) / 2
        assert torch.allclose(value, due, atol=1e-5), name
    labels = open_plan(recipes / "finetune.yaml", tmp_path / "r").heard
    assert labels <= upstream.load(str(tuned)).heard == second.heard


def test_the_next_base_may_be_merged_otherwise(recipes: Path, tmp_path: Path) -> None:
    sequential(recipes)
    names = ("merged.yaml", "merged.yaml:alpha=0.75")
    first, other = (
        open_plan(changed(recipes, "finetune_word", upstream=name), tmp_path / "r")
        for name in names
    )
    assert first.fingerprint != other.fingerprint and first.key != other.key
    due = merged(str(recipes / "merged.yaml"), results=str(tmp_path / "r"), alpha=0.75)
    assert other.fingerprint == due.fingerprint()


def test_a_plan_builds_nothing_and_names_the_whole_chain(recipes: Path, tmp_path: Path) -> None:
    path, results = sequential(recipes), tmp_path / "r"
    listed, reference = requests.requests(str(path), recipes, results)
    assert reference == str(recipes / "merged.yaml")
    waiting = {each.name: requests.unbuilt(each) for each in listed}
    why = waiting[str(path)]
    steps = [f"{name}: 20 steps of fine-tuning" for name in ("finetune", "finetune_word")]
    assert why and why.why == ", ".join(steps)
    assert why.like.spec.endswith("hubert-0")
    assert len(why.runs) == 2 and all(seconds > 0 for _, seconds in why.runs)
    assert not (results / "upstreams").exists()
    build_tuned(recipes / "finetune_word.yaml", results)
    listed, _ = requests.requests(str(path), recipes, results)
    after = requests.unbuilt(listed[-1])
    assert after is None or after.why == "merging"


def test_a_recipe_as_base_has_no_file_to_imitate(recipes: Path, tmp_path: Path) -> None:
    path = sequential(recipes)
    with pytest.raises(UserError, match="base: a merge recipe has no file of its own"):
        write(load_merge(path), path, tmp_path / "out", tmp_path / "r", "same")


@pytest.mark.parametrize("which", ["finetune", "merge"])
def test_an_upstream_cannot_rest_on_itself(recipes: Path, tmp_path: Path, which: str) -> None:
    if which == "finetune":
        changed(recipes, upstream="merged.yaml")
    else:
        changed(recipes, "merged", base="merged.yaml")
    with pytest.raises(UserError, match="its upstream is made from itself"):
        merged(str(recipes / "merged.yaml"), results=str(tmp_path / "r"))
    with pytest.raises(UserError, match="its upstream is made from itself"):
        requests.requests("merged", recipes, tmp_path / "r")
