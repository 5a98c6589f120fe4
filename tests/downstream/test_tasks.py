"""The contract of a task: any kind of record, any head, nothing trained, one spelling of a text."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from downstream import recipe
from downstream.base import TASKS, Count, Item, Labels, Record, Task, Trial
from downstream.report.results import Score, read_cell
from downstream.run import cell as cells
from downstream.run.prepare import Prepared, prepare
from downstream.tasks import asr, sid
from upstream.common.errors import UserError


class Spectra:
    """Features of two layers: the log spectrum of the middle of each clip, eight bands."""

    layers, dim, error = 2, 8, 0.0

    def __init__(self, prepared: Prepared) -> None:
        self.mean = prepared.kind == "mean"
        self.lens = torch.tensor([12 + i % 3 for i in range(len(prepared.clips))])
        waves = [clip.load()[:4000] for clip in prepared.clips]
        bands = [torch.fft.rfft(wav).abs()[:2000].reshape(8, 250).mean(1).log() for wav in waves]
        self.values = torch.stack(bands)[None].expand(2, -1, -1)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        lens, x = self.lens[list(indices)], self.values[:, list(indices)]
        return x if self.mean else x[:, :, None].repeat(1, 1, int(lens.max()), 1), lens


def score(suite: Path, results: Path, name: str, *overrides: str) -> tuple[Score, list[Record]]:
    loaded = recipe.load(suite / f"{name}.yaml", recipe.overrides(overrides))
    prepared, identity = prepare(loaded, results), cells.Identity("spectra", "0" * 12, "")
    result = cells.run(identity, prepared, 0, Spectra(prepared), results)
    folder = cells.cell(identity, prepared, 0).folder(results)
    return result, read_cell(folder / "score.json").predictions


class Verification(Task):
    """Test-only: do two utterances have the same label? Cosine of means, nothing trained."""

    def records(
        self, items: Sequence[Item], outputs: Sequence[Tensor], labels: Labels
    ) -> list[Record]:
        vectors = torch.stack([x.mean(1)[0] if x.dim() == 3 else x[0] for x in outputs])
        vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
        return [
            Trial(
                id=f"{items[a].id} {items[b].id}",
                enrolment=items[a].id,
                test=items[b].id,
                score=float(vectors[a] @ vectors[b]),
                label=int(items[a].target == items[b].target),
                speaker=items[a].speaker,
            )
            for a, b in itertools.combinations(range(len(items)), 2)
        ]


@pytest.mark.parametrize("features", ["mean", "frames"])
def test_a_task_of_trials_that_trains_nothing(
    features: Any, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Verification("verify", features, None, ("eer",), sid.TASK.labels)
    monkeypatch.setitem(TASKS._entries, "verify", task)
    result, records = score(suite, tmp_path / "r", "label", "task=verify", "train=null")
    assert len(records) == 24 * 23 / 2 and all(isinstance(line, Trial) for line in records)
    assert result.metric == "eer" and result.lr == {} and result.n == len(records)
    assert 0 <= result.score < 30, "three tones are easy to tell apart"
    assert task.score(records)["eer"] == result.score
    with pytest.raises(UserError, match="head: name: a head is named by text"):
        recipe.load(suite / "label.yaml", {"task": "verify", "train": None, "head.projector": 3})


def test_a_score_is_the_unweighted_mean_over_folds() -> None:
    lines = [
        Count("a", "s", "x", "y", errors, total, fold)
        for fold, errors, total in (("f1", 1.0, 1.0), ("f2", 0.0, 1.0), ("f2", 1.0, 3.0))
    ]
    assert sid.TASK.score(lines)["accuracy"] == pytest.approx(100 * (0 + 3 / 4) / 2)


def test_several_metrics_are_counted_apart() -> None:
    both = replace(asr.TASK, metrics=("cer", "wer"))
    labels = both.labels("superb", [])
    item, heard = Item("u", "s", "A CAT"), labels.encode("A BAT")
    records = both.records([item], [heard], labels)
    assert [line.metric for line in records] == ["cer", "wer"]
    assert both.score(records) == {"cer": pytest.approx(20), "wer": pytest.approx(50)}


HEAD = """
from torch import nn
from downstream.tasks.heads import Utterance


class Deep(Utterance):
    def __init__(self, layers: int, dim: int, classes: int, *, width: int = 4) -> None:
        super().__init__(layers, dim, classes, projector=width)
        self.linear = nn.Sequential(nn.Tanh(), self.linear)
"""


def test_a_recipe_may_name_its_head(suite: Path, tmp_path: Path) -> None:
    usual, _ = score(suite, tmp_path / "r", "label")
    named, _ = score(suite, tmp_path / "r", "label", "head={name: utterance}")
    assert (usual.score, usual.dev) == (named.score, named.dev)
    (suite / "mine.py").write_text(HEAD)
    own, _ = score(suite, tmp_path / "r", "label", "head={name: 'mine.py:Deep', width: 16}")
    assert own.score > 50 and own.dev != usual.dev and own.recipe["head"]["width"] == 16


def test_a_head_is_checked_like_everything(suite: Path, tmp_path: Path) -> None:
    def fault(**head: Any) -> str:
        with pytest.raises(UserError) as caught:
            recipe.load(suite / "label.yaml", {"head": head})
        return str(caught.value)

    (suite / "mine.py").write_text(HEAD)
    assert "did you mean utterance?" in fault(name="uterance")
    assert "did you mean Deep?" in fault(name="mine.py:Dep")
    assert "unknown key 'with'; did you mean width?" in fault(**{"name": "mine.py:Deep", "with": 3})
    assert "no such file" in fault(name="theirs.py:Deep")
    (suite / "broken.py").write_text("1 / 0")
    assert "broken.py:1: ZeroDivisionError" in fault(name="broken.py:Deep")
    for size in (0, -1, 10**12):
        assert "projector" in fault(projector=size)
    before = recipe.load(suite / "label.yaml", {"head": {"name": "mine.py:Deep"}}).hash
    (suite / "mine.py").write_text(HEAD.replace("Tanh", "ReLU"))
    assert recipe.load(suite / "label.yaml", {"head": {"name": "mine.py:Deep"}}).hash != before


def respell(suite: Path, tones: Path, change: Any) -> None:
    """The same corpus with its texts changed, in a folder of its own."""
    folder = suite / "corpus"
    folder.mkdir(exist_ok=True)
    head, *rows = (tones / "manifest.tsv").read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    lines = [[str(tones / c[0]), *c[1:4], change(n, c[4])] for n, c in enumerate(cells)]
    (folder / "manifest.tsv").write_text("\n".join([head, *map("\t".join, lines)]) + "\n")


TRAINED = ("train.steps=150", "train.lr=[3.0e-2]", "train.specaug=false")


@pytest.mark.parametrize("tokens", ["superb", "train"])
def test_the_case_of_a_transcript_changes_nothing(
    tokens: str, suite: Path, tones: Path, tmp_path: Path
) -> None:
    options = (*TRAINED, f"tokens={tokens}")
    upper, expected = score(suite, tmp_path / "r", "word", *options)
    assert upper.score < 100 and not upper.warnings
    for change in (lambda n, t: t.lower(), lambda n, t: t.lower() if n % 2 else t.title()):
        respell(suite, tones, change)
        again, records = score(
            suite, tmp_path / "r", "word", *options, f"corpus.root={suite / 'corpus'}"
        )
        assert again.score == upper.score and not again.warnings
        assert [r._replace(id="") for r in records] == [r._replace(id="") for r in expected]


def test_characters_outside_the_vocabulary_are_a_counted_warning(
    suite: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    respell(suite, tones, lambda n, t: f"{t} 7ü7" if n < 3 else t)
    where = f"corpus.root={suite / 'corpus'}"
    result, records = score(suite, tmp_path / "r", "word", where, "tokens=superb")
    (warning,) = result.warnings
    assert "9 symbols of 3 targets" in warning and "7 (6), Ü (3)" in warning
    assert "tokens: train" in warning
    assert capsys.readouterr().err.count(warning) == 1
    assert not any("<unk>" in line.hypothesis for line in records)
    lossless, _ = score(suite, tmp_path / "r", "word", where, "tokens=train")
    assert not lossless.warnings


def test_a_label_that_only_the_test_set_has_is_seen_before_any_training(
    suite: Path, tones: Path, tmp_path: Path
) -> None:
    table = (tones / "manifest.tsv").read_text().splitlines()
    table[-1] = table[-1].replace("high", "hihg")
    (tones / "typo.tsv").write_text("\n".join(table))
    with pytest.raises(UserError, match=r"label 'hihg' is in dev or test.*did you mean high\?"):
        prepare(recipe.load(suite / "label.yaml", {"corpus.file": "typo.tsv"}), tmp_path)


def test_prepared_survives_the_disk(suite: Path, tmp_path: Path) -> None:
    crop = {"crop": {"seconds": 0.4, "per_utterance": 3}}
    for prepared in (
        prepare(recipe.load(suite / "word.yaml"), tmp_path),
        prepare(recipe.load(suite / "label.yaml", crop), tmp_path),
    ):
        path = prepared.save(tmp_path / "kept")
        again = Prepared.load(path)
        assert again == prepared and again.revision == prepared.revision
        assert prepared.save(tmp_path / "kept") == path
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match="delete it"):
        Prepared.load(path)


def test_a_cell_knows_its_features_and_whose_utterances_they_are(
    suite: Path, tones: Path, tmp_path: Path
) -> None:
    """Intervals rest on the speakers: a cell of other speakers is not finished."""
    result, _ = score(suite, tmp_path / "r", "label")
    assert result.features == "float32 means"
    assert score(suite, tmp_path / "r", "word")[0].features == "float16 frames"
    identity = cells.Identity("spectra", "0" * 12, "")
    same = prepare(recipe.load(suite / "label.yaml"), tmp_path / "r")
    assert cells.missing(identity, same, 1, tmp_path / "r") == []
    others = replace(same, items=[item._replace(speaker="x") for item in same.items])
    assert others.revision == same.revision
    assert cells.missing(identity, others, 1, tmp_path / "r") == [0]
    path = cells.cell(identity, same, 0).folder(tmp_path / "r") / "score.json"
    content = json.loads(path.read_text())
    del content["result"]["clusters"], content["result"]["features"]  # as older cells are
    path.write_text(json.dumps(content))
    assert cells.missing(identity, same, 1, tmp_path / "r") == []
    assert math.isfinite(read_cell(path).score.score)
