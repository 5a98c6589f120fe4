"""Stage 1: what is frozen stays, interruptions change nothing, and what it says of itself."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import upstream
from merging.tuning import build_tuned, loop, tuned_folder
from merging.tuning.aims import Aim, Masked
from merging.tuning.log import Log
from merging.tuning.objectives import TaskObjective
from merging.tuning.recipe import LATER, STRATEGIES, TuningRecipe, load_recipe, open_plan
from merging.tuning.strategies import Stable, Strategy
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.features.store import Store


def changed(recipes: Path, name: str = "finetune", **keys: Any) -> Path:
    """The suite's fine-tuning recipe with other keys."""
    path = recipes / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    return path


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "finetune.json").read_text())


def test_schedule_is_the_papers() -> None:
    """Golden values, spec section 3.1."""
    rate = [loop.schedule(s, 50_000) for s in (0, 2_500, 5_000, 24_999, 37_500, 50_000)]
    assert rate == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("name", ["finetune", "finetune_word"])
def test_stable_finetuning_moves_the_transformer_and_not_the_cnn(
    recipes: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_tuned(recipes / f"{name}.yaml", tmp_path / "r")
    facts = record(folder)
    assert facts["moved"]["cnn"] == 0 and facts["moved"]["layer 3"] > 0
    assert len(facts["history"]) == 4
    assert "(frozen)" in capsys.readouterr().out
    assert (folder / "README.md").read_text().startswith("# Fine-tuned")
    content = (folder / "finetune.json").read_text() + (folder / "README.md").read_text()
    assert str(tmp_path) not in content, "no path of this machine"
    plan = yaml.safe_load((recipes / f"{name}.yaml").read_text())
    base, tuned = upstream.load(plan["upstream"]), upstream.load(str(folder))
    assert tuned.fingerprint() == facts["fingerprint"] != base.fingerprint()
    assert tuned_folder(recipes / f"{name}.yaml", tmp_path / "r")[0] == folder
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_tuned(recipes / f"{name}.yaml", tmp_path / "r") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, "built once"
    files = {"README.md", "config.json", "finetune.json", "heard.txt", "model.safetensors"}
    files.add("log.jsonl")
    assert {p.name for p in folder.iterdir()} == files | {"preprocessor_config.json"}


def test_it_says_what_it_heard_and_what_it_cost(recipes: Path, tmp_path: Path) -> None:
    """Keys of exactly the clips of train and dev, so that a test on them can be seen for it."""
    plan = open_plan(recipes / "finetune.yaml", tmp_path / "r")
    folder = build_tuned(recipes / "finetune.yaml", tmp_path / "r")
    split = plan.prepared.splits[""]
    heard = {plan.prepared.clips[i].key for part in ("train", "dev") for i in split[part]}
    assert (folder / "heard.txt").read_text().splitlines() == sorted(heard)
    assert not heard & {plan.prepared.clips[i].key for i in split["test"]}
    facts = record(folder)
    (folder / "heard.txt").unlink()  # as in a folder that was built before it was written down
    assert build_tuned(recipes / "finetune.yaml", tmp_path / "r") == folder
    assert upstream.load(str(folder)).heard == heard
    weights = (folder / "model.safetensors").stat().st_size
    assert facts["stored_bytes"] == pytest.approx(weights, rel=0.1)
    assert facts["seconds"] > 0 and facts["peak_memory_bytes"] > weights


def test_head_only_phase_leaves_the_upstream_alone(recipes: Path, tmp_path: Path) -> None:
    folder = build_tuned(changed(recipes, head_only=1.0), tmp_path / "r")
    assert set(record(folder)["moved"].values()) == {0.0}
    folder = build_tuned(changed(recipes, strategy="regular"), tmp_path / "r")
    moved = record(folder)["moved"]
    assert moved["cnn"] == 0 and moved["layer 1"] > 0, "regular has no such phase"


LATER_VALUES = (
    "regular", 0.0, 0.0, 0.0, {"rank": 2}, 1e-3, 1, ["swa-0.5"], "bfloat16", True, 8.0,
    Masked({}), [Aim(0.5, "word.yaml")],
)  # fmt: skip


def test_a_key_that_came_later_changes_a_build_only_where_it_is_written(recipes: Path) -> None:
    """Without it the facts, in their order, are what a build's key was made of before it came."""
    recipe = load_recipe(recipes / "finetune.yaml")
    assert (
        list(recipe.facts())
        == (
            "kind upstream task steps batch eval_every lr accumulate clip head_only warmup hold "
            "specaug seed fold head name"
        ).split()
    )
    for key, value in zip(LATER, LATER_VALUES, strict=True):
        plain = dataclasses.asdict(dataclasses.replace(recipe, **{key: value}))[key]
        assert dataclasses.replace(recipe, **{key: value}).facts()[key] == plain


def test_dropouts_are_the_upstreams_own_or_the_recipes(recipes: Path, tmp_path: Path) -> None:
    def dropouts(path: Path) -> list[float]:
        layer = open_plan(path, tmp_path / "r").encoder.model.encoder.layers[0]
        hidden = {layer.dropout.p, layer.feed_forward.output_dropout.p}
        return [*hidden, layer.attention.dropout, layer.feed_forward.intermediate_dropout.p]

    assert dropouts(recipes / "finetune.yaml") == [0.1, 0.1, 0.1]
    assert dropouts(changed(recipes, activation_dropout=0.0)) == [0.1, 0.1, 0.0]
    path = changed(recipes, dropout=0.2, attention_dropout=0.3)
    assert dropouts(path) == [0.2, 0.3, 0.0]
    folder = build_tuned(path, tmp_path / "r")
    assert upstream.load(str(folder)).fingerprint() == record(folder)["fingerprint"]
    shipped = load_recipe(PROJECT / "recipes" / "superb" / "finetune.yaml")
    assert shipped.dropouts() == {"activation_dropout": 0.0}, "as s3prl has it"


@pytest.mark.parametrize(
    "key, value",
    [
        ("lr", -1.0), ("lr", 0.0), ("lr", math.nan), ("lr", math.inf), ("steps", 0), ("batch", -1),
        ("accumulate", 0), ("eval_every", 0), ("clip", 0.0), ("head_only", 1.5), ("warmup", -0.1),
        ("hold", math.nan), ("dropout", 1.0), ("activation_dropout", -0.1), ("seed", -1),
        ("seed", 2**40), ("strategy", "stabel"), ("precision", "float16"), ("checkpointing", 1),
        ("batch_seconds", 0.0), ("batch_seconds", 8.0), ("batch", None),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_one_line(recipes: Path, key: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=key if key != "strategy" else "strategy .*did you mean stable"
    ) as e:
        load_recipe(changed(recipes, **{key: value}))
    assert "\n" not in str(e.value)


def test_another_run_in_the_folder_is_not_continued(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        build_tuned(recipes / "finetune.yaml", tmp_path / "r", tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"state.pt: is of another recipe; choose an empty folder"):
        build_tuned(changed(recipes, lr=0.02), tmp_path / "r", tmp_path / "out")
    for state in (tmp_path / "out").glob("state*"):
        state.unlink()
    build_tuned(recipes / "finetune.yaml", tmp_path / "r", tmp_path / "out")
    with pytest.raises(UserError, match="out: holds another upstream; choose an empty folder"):
        build_tuned(changed(recipes, lr=0.03), tmp_path / "r", tmp_path / "out")


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Save the state after every update, and stop in the middle of one."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    original = loop.Loop._update

    def stop(self: loop.Loop, step: int) -> None:
        original(self, step)
        if step == update:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_update", stop)


def same_after_a_stop(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> Path:
    """Built at once, and stopped and built: the same weights. The folder."""
    unbroken = build_tuned(recipe, tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, update)
        build_tuned(recipe, tmp_path / "b")
    resumed = build_tuned(recipe, tmp_path / "b")
    one, two = (upstream.load(str(folder)) for folder in (unbroken, resumed))
    assert one.fingerprint() == two.fingerprint()
    assert record(unbroken)["history"] == record(resumed)["history"]
    assert not (resumed / "state.pt").exists()
    logs = [(folder / "log.jsonl").read_text() for folder in (unbroken, resumed)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 20
    return resumed


@pytest.mark.parametrize("update", [1, 13])  # in the head-only phase, and after it
def test_interrupted_finetuning_goes_on_and_ends_the_same(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    same_after_a_stop(recipes / "finetune.yaml", tmp_path, monkeypatch, update)


KILLED = """
import os, sys
from pathlib import Path
import torch
from merging.tuning import build_tuned, loop
torch.set_num_threads(1)
loop.SAVE_SECONDS, last, update = 0.0, int(sys.argv[3]), loop.Loop._update
def killed(self, step):
    update(self, step)
    if step == last:
        os.kill(os.getpid(), 9)
loop.Loop._update = killed
print(build_tuned(Path(sys.argv[1]), Path(sys.argv[2])))
assert "transformers" not in sys.modules, "seconds to import, in every process"
"""


def test_killed_and_begun_again_by_two_commands_at_once(recipes: Path, tmp_path: Path) -> None:
    recipe, results = recipes / "finetune.yaml", tmp_path / "killed"

    def command(last: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", KILLED, str(recipe), str(results), str(last)]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=PROJECT, stdout=pipe, stderr=pipe, text=True)

    dead = command(last=7)
    dead.communicate()
    assert dead.returncode == -9
    outputs = [running.communicate() for running in [command(last=-1), command(last=-1)]]
    assert [err for _, err in outputs] == ["", ""]
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert sorted("step 20" in out for out, _ in outputs) == [False, True], "one trains"
    assert all("step 5:" not in out for out, _ in outputs), "what was done is not done again"
    folder = Path(outputs[0][0].splitlines()[-1])
    assert not list(folder.glob(".*")) and not (folder / "state.pt").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        unbroken = build_tuned(recipe, tmp_path / "unbroken")
    finally:
        torch.set_num_threads(threads)
    assert record(folder)["fingerprint"] == record(unbroken)["fingerprint"]


@pytest.fixture
def strategy(recipes: Path) -> Iterator[Callable[[type[Strategy]], Path]]:
    """Registers a strategy for the test, and gives a recipe that asks for it."""

    def use(made: type[Strategy]) -> Path:
        STRATEGIES.add("mine", made)
        return changed(recipes, strategy="mine")

    yield use
    STRATEGIES._entries.pop("mine", None)


class Moves(Stable):
    def after_step(self, step: int) -> None:
        self.model.feature_extractor.conv_layers[0].conv.weight.data.add_(1e-3)


class Idle(Stable):
    def trains(self, name: str, step: int) -> bool:
        return super().trains(name, step) or name == "masked_spec_embed"


@pytest.mark.parametrize(
    "made, message",
    [(Moves, "conv.weight is frozen, but moved"), (Idle, "masked_spec_embed never had a gradient")],
)
def test_a_strategy_that_does_not_keep_its_word_is_found_out(
    strategy: Callable[[type[Strategy]], Path], tmp_path: Path, made: type[Strategy], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"mine: .*{message}"):
        build_tuned(strategy(made), tmp_path / "r")


class Averaged(Strategy):
    """An exponential average of the weights, drawn to where they began."""

    def __init__(self, model: nn.Module, recipe: TuningRecipe) -> None:
        super().__init__(model, recipe)
        self.start = super().weights()
        self.state = super().weights()

    def penalty(self) -> Tensor:
        named = self.model.named_parameters()
        return 1e-2 * sum((p - self.start[n]).square().sum() for n, p in named if p.requires_grad)

    def after_step(self, step: int) -> None:
        for name, tensor in super().weights().items():
            self.state[name].lerp_(tensor, 0.1)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.state.items()}


class Adapted(Strategy):
    """A low-rank adapter on one projection, folded into it in the end."""

    class Wrapped(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            width = linear.in_features
            self.linear = linear
            self.down, self.up = nn.Linear(width, 2, False), nn.Linear(2, width, False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.up(self.down(x))

    def __init__(self, model: nn.Module, recipe: TuningRecipe) -> None:
        super().__init__(model, recipe)
        attention = model.encoder.layers[1].attention
        attention.q_proj = self.wrapped = Adapted.Wrapped(attention.q_proj)

    def trains(self, name: str, step: int) -> bool:
        return ".up." in name or ".down." in name

    def weights(self) -> dict[str, Tensor]:
        added = self.wrapped.up.weight @ self.wrapped.down.weight
        named = {name.replace(".linear.", "."): t for name, t in super().weights().items()}
        plain = {n: t for n, t in named.items() if ".up." not in n and ".down." not in n}
        plain["encoder.layers.1.attention.q_proj.weight"] += added.detach()
        return plain


@pytest.mark.parametrize("made", [Averaged, Adapted])
def test_other_strategies_fit_and_resume(
    strategy: Callable[[type[Strategy]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    made: type[Strategy],
) -> None:  # fmt: skip
    recipe = strategy(made)
    folder = same_after_a_stop(recipe, tmp_path, monkeypatch, 8)
    moved = {module: share for module, share in record(folder)["moved"].items() if share}
    assert ("layer 2" in moved) and (made is Averaged or set(moved) == {"layer 2"})


def test_every_update_is_logged(recipes: Path, tmp_path: Path) -> None:
    folder = build_tuned(changed(recipes, head_lr=0.02), tmp_path / "r")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        factor = loop.schedule(int(line["step"]) - 1, 20)
        assert line["lr"] == pytest.approx(1e-2 * factor)
        assert line["head_lr"] == pytest.approx(0.02 * factor)
        assert math.isfinite(line["loss"]) and line["norm"] > 0
    log = Log(folder / "log.jsonl")
    with log.path.open("a") as file:
        file.write('{"step": 21, "lo')  # killed while it wrote
    assert log.lines() == lines
    log.cut(3)
    assert log.lines() == lines[:3]


def test_a_loss_that_is_no_number_names_its_utterances(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = open_plan(recipes / "finetune.yaml", tmp_path / "r")
    objective = TaskObjective(plan, Store(tmp_path / "cache"))
    monkeypatch.setattr(objective.head, "loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(UserError, match=r"update 1: the loss is nan for .*\d-\d+, ") as caught:
        loop.Loop(plan, objective, tmp_path / "state.pt").run("broken")
    assert all(name in str(caught.value) for name in objective.names(0))


def test_a_task_of_trials_is_fine_tuned_on(recipes: Path, tones: Path, tmp_path: Path) -> None:
    """Partners of a trial may lie in different batches of dev."""
    (recipes / "asv.yaml").write_text(
        "kind: task\ntask: asv\nhead: {width: 8, pooled: 8}\n"
        f"corpus: {{name: paired, root: {tones}, dev: 0.4, test: 0.3}}\n"
        "train: {steps: 1, batch: 1, lr: [1.0e-2], eval_every: 1}\n"
    )
    folder = build_tuned(changed(recipes, task="asv.yaml", steps=4, eval_every=2), tmp_path / "r")
    assert 0 <= record(folder)["best_dev"] <= 100
