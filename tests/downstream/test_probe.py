"""Probes without training: against other implementations, and on any classification recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmark
from downstream.base import TASKS, Item, Part
from downstream.report.results import load_results
from downstream.tasks import closed_form
from tests.downstream.test_tasks import score
from upstream.common.errors import UserError


def clusters(seed: int, count: int = 90, dim: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Vectors around a centre of their class, each dimension of another size."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=generator)
    y[:classes] = torch.arange(classes)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    x = centres[y] + 0.7 * torch.randn(count, dim, generator=generator)
    return x * torch.linspace(0.5, 2, dim), y


def test_the_linear_classifier_is_discriminant_analysis() -> None:
    analysis = pytest.importorskip("sklearn.discriminant_analysis")
    x, y = clusters(0)
    vectors, _ = clusters(1, 400)
    found = closed_form.discriminants(x, y, 5)(vectors)
    assert tuple(found) == closed_form.SHRINKAGE
    wrong = 0
    for share, guess in found.items():
        # its lsqr solver weighs the classes' covariances by their size and shrinks the sum alike
        theirs = analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share)
        wrong += int((guess != torch.tensor(theirs.fit(x, y).predict(vectors))).sum())
    assert wrong <= 2, "but for rounding"


def test_neighbours_are_the_definition() -> None:
    x, y = clusters(0, 60)
    vectors, _ = clusters(1, 50)
    found = closed_form.neighbours(x, y, 5)(vectors)
    assert tuple(found) == closed_form.NEIGHBOURS
    for row, vector in enumerate(vectors):
        near = torch.cosine_similarity(vector[None], x).argsort(descending=True)
        for k, guess in found.items():
            votes = y[near[: int(k)]].tolist()
            most = max(map(votes.count, votes))
            tied = {c for c in votes if votes.count(c) == most}
            ranks = {c: sum(r for r, v in enumerate(votes) if v == c) for c in tied}
            assert ranks[int(guess[row])] == min(ranks.values())


def test_fewer_utterances_than_neighbours_or_dimensions() -> None:
    x, y = clusters(0, 8, 20, 4)
    for fit in (closed_form.neighbours, closed_form.discriminants):
        for guess in fit(x, y, 4)(x).values():
            assert guess.shape == (8,)
        assert (next(iter(fit(x, y, 4)(x).values())) == y).all()


@pytest.mark.parametrize(("name", "setting"), [("knn", "k"), ("probe", "shrinkage")])
def test_layer_and_setting_are_chosen_on_dev_alone(name: str, setting: str) -> None:
    task = TASKS[name]
    labels = task.labels("", [f"c{k}" for k in range(5)])

    def part(seed: int, count: int) -> Part:
        """Two layers of noise, and between them the classes."""
        x, y = clusters(seed, count)
        rest = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(seed))
        means = torch.stack([rest[0], x, rest[1]], 1)
        items = [Item(str(i), f"s{i % 3}", f"c{k}") for i, k in enumerate(y.tolist())]
        return Part(items, [*means])

    parts = {"train": part(0, 90), "dev": part(1, 40)}
    settled = task.calibrate(lambda split: parts[split], labels)
    assert settled.chosen["layer"] == 1 and len(settled.chosen["dev"]) == 3
    assert settled.chosen["dev"][1] == max(settled.chosen["dev"]) > 80
    assert setting in settled.chosen
    test = part(2, 600)  # more than a block
    records = task.records(test.items, settled.use(*test), labels)
    assert task.score(records)["accuracy"] > 80


@pytest.mark.parametrize("name", ["knn", "probe"])
def test_any_classification_recipe_can_be_probed(name: str, suite: Path, tmp_path: Path) -> None:
    result, records = score(suite, tmp_path / "r", "label", f"task={name}", "train=null")
    assert result.score > 50 and result.lr == {} and result.steps == 0
    assert len(records) == 24 and result.chosen[""]["layer"] == 0  # both are the same


def test_a_recipe_of_folds_and_crops_can_be_probed(suite: Path, tmp_path: Path) -> None:
    folds = "corpus.split_by=speaker", "corpus.folds=3", "corpus.split=null", "folds=true"
    text = (suite / "label.yaml").read_text()
    (suite / "cut.yaml").write_text(text + "crop: {seconds: 0.4}\n")
    for more in ("crop=null", "crop.per_utterance=2"):
        given = ("task=probe", "train=null", *folds, more)
        result, records = score(suite, tmp_path / "r", "cut", *given)
        assert set(result.chosen) == {"fold1", "fold2", "fold3"}
        assert result.score > 50 and len(records) == 72  # by chance 33


def test_from_the_command_line(suite: Path, tmp_path: Path) -> None:
    words = ["--upstream", "fbank_no_cmvn", "--suite", str(suite), "--downstream", "label"]
    words += ["--results", str(tmp_path / "r"), "--workers", "1", "--device", "cpu"]
    assert benchmark.main([*words, "--set", "task=probe", "--set", "train=null"]) == 0
    (result,) = load_results(tmp_path / "r")
    assert result.score.score > 90 and result.cell.seed == 0


def test_an_empty_split_is_one_line_before_anything_is_computed(
    suite: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no utterances in split 'dev'"):
        where = "corpus.split=null", "corpus.test=0.5"
        score(suite, tmp_path / "r", "label", "task=knn", "train=null", *where)
