"""Query by example: warping against a plain recursion, the search against s3prl's, MTWV, layers."""

from __future__ import annotations

import math
import sys
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

import benchmark
from downstream.base import METRICS, TASKS, Item, Part, Trial
from downstream.report.compare import compare
from downstream.report.results import Cell, Score, load_results, save
from downstream.report.table import show, summary
from downstream.tasks import dtw, trials, twv
from downstream.tasks.search import search
from tests.optional import required
from upstream.common.errors import UserError


def lowest(distance: np.ndarray) -> float:
    """The cost of the best path over [M, T] by the definition, cell after cell, per query frame."""
    total = np.array(distance)
    for i in range(1, len(total)):
        for j in range(total.shape[1]):
            total[i, j] += total[i - 1, max(0, j - 2) : j + 1].min()
    return float(total[-1].min() / len(total))


def normalised(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    distance = np.exp(cdist(query, document, "cosine")) - 1
    low, high = distance.min(1, keepdims=True), distance.max(1, keepdims=True)
    return (distance - low) / np.clip(high - low, 1e-9, None)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 2, 3, 40])
@pytest.mark.parametrize("floats", [1.0, 1e9])
def test_warping_is_the_plain_recursion(
    frames: int, floats: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtw, "FLOATS", floats)  # one layer at a time, all together
    queries = [noise(m, 3, m, 6) for m in (7, 1, 19, 7, 30)]
    document = noise(99, 3, frames, 6)
    found = dtw.scores(dtw.packed(queries), document)
    assert found.shape == (3, 5)
    for k, query in enumerate(queries):
        for layer in range(3):
            cost = lowest(normalised(query[layer].numpy(), document[layer].numpy()))
            assert float(found[layer, k]) == pytest.approx(-cost, abs=1e-6)


def test_a_query_that_is_there_costs_nothing_and_two_frames_may_be_skipped() -> None:
    document = noise(0, 1, 60, 16)
    inside = [document[:, 20:32], document[:, 20:44:2], document[:, 20:26].repeat_interleave(2, 1)]
    beyond = [document[:, 20:56:3], document[:, 20:32].flip(1)]
    found = dtw.scores(dtw.packed([*inside, *beyond]), document)[0]
    assert found[:3].abs().max() < 1e-6 and (found[3:] < -0.1).all()


def split(
    queries: Sequence[Tensor], documents: Sequence[Tensor]
) -> tuple[list[Item], list[Tensor]]:
    """Query q0 is in document d0, and so on."""
    items = [
        Item(f"q{k}", f"s{k % 2}", trials.write([(int(k < len(documents)), f"d{k}")]))
        for k in range(len(queries))
    ]
    items += [Item(f"d{k}", "t", trials.write([])) for k in range(len(documents))]
    return items, [*queries, *documents]


def test_a_search_is_s3prls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own expert, its normalisations and all, with the plain recursion as dtw-python."""
    required("s3prl")

    def plain(x: np.ndarray, **options: Any) -> Any:
        assert (options["step_pattern"], options["open_begin"], options["open_end"]) == (
            "asymmetric", True, True,
        )  # fmt: skip
        return types.SimpleNamespace(normalizedDistance=lowest(x))

    class Tree(ElementTree.ElementTree):
        def write(self, file: Any, **_: Any) -> None:  # type: ignore[override]
            super().write(file)

    etree = types.SimpleNamespace(
        Element=ElementTree.Element, SubElement=ElementTree.SubElement, ElementTree=Tree
    )
    monkeypatch.setitem(sys.modules, "dtw", types.SimpleNamespace(dtw=plain))
    monkeypatch.setitem(sys.modules, "lxml", types.SimpleNamespace(etree=etree))
    sox = types.SimpleNamespace(apply_effects_file=None)  # what reads files
    monkeypatch.setitem(sys.modules, "torchaudio.sox_effects", sox)
    expert = required("s3prl.downstream.quesst14_dtw.expert")

    class Pool:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, act: Any, *args: Any) -> Any:
            return types.SimpleNamespace(result=lambda: act(*args))

    monkeypatch.setattr(expert, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(expert, "as_completed", list)
    queries = [3 + 2 * noise(k, 1, m, 5) for k, m in enumerate((9, 4, 12))]  # one is too short
    documents = [3 + 2 * noise(10 + k, 1, n, 5) for k, n in enumerate((20, 31, 11, 25))]
    items, outputs = split(queries, documents)
    settings = {
        "max_workers": 1, "feature_normalization": True, "silence_frame": None, "datarc": {},
        "dtwrc": {
            "dist_method": "cosine_exp", "minmax_norm": True, "step_pattern": "asymmetric",
            "subsequence": True,
        },
    }  # fmt: skip
    theirs = expert.DownstreamExpert(5, settings, str(tmp_path))
    theirs.test_dataset = types.SimpleNamespace(n_queries=3)
    names = [item.id for item in items]
    theirs.log_records("dev", {"features": [x[0] for x in outputs], "audio_names": names})
    (found,) = search(items, outputs)
    written = {
        (asked.attrib["termid"], term.attrib["file"]): float(term.attrib["score"])
        for asked in ElementTree.parse(tmp_path / "benchmark.stdlist.xml").getroot()
        for term in asked
    }
    ours = {(i.id, d): score for i, row in zip(items, found) for d, score in row.items()}
    assert ours.keys() == written.keys() and len(ours) == 12
    assert all(abs(ours[pair] - score) <= 1.01e-4 for pair, score in written.items())
    assert set(found[1].values()) == {0.0}


def brute(records: Sequence[Trial]) -> float:
    """By the definition, at every threshold."""
    by_query: dict[str, list[Trial]] = {}
    for trial in records:
        by_query.setdefault(trial.enrolment, []).append(trial)
    asked = [t for t in by_query.values() if any(each.label for each in t)]
    values = []
    for threshold in [*{t.score for t in records}, math.inf]:
        losses = []
        for mine in asked:
            true = [t for t in mine if t.label]
            others = [t for t in mine if not t.label]
            miss = sum(t.score < threshold for t in true) / len(true)
            alarm = sum(t.score >= threshold for t in others) / len(others) if others else 0
            losses.append(miss + 12.49 * alarm)
        values.append(1 - sum(losses) / len(losses))
    return 100 * max(values)


def made_up(seed: int, digits: int = 1) -> list[Trial]:
    rng = np.random.default_rng(seed)
    return [
        Trial(f"q{q} d{d}", f"q{q}", f"d{d}", round(rng.normal() + 3 * y, digits), y, f"q{q}")
        for q in range(6)
        for d in range(30)
        for y in [int(q > 0 and rng.random() < 0.2)]  # nothing is true of q0
    ]


@pytest.mark.parametrize("seed", range(8))
def test_mtwv_is_the_definition(seed: int) -> None:
    records = made_up(seed)  # with ties, which are accepted together
    assert twv.maximum(records) == pytest.approx(brute(records), abs=1e-9)
    assert twv.maximum(records[::-1]) == pytest.approx(twv.maximum(records), abs=1e-9)


def test_mtwv_at_its_ends() -> None:
    def records(*rows: tuple[float, int]) -> list[Trial]:
        return [Trial(str(k), "q", str(k), *row, "q") for k, row in enumerate(rows)]

    assert twv.maximum(records((2.0, 1), (1.0, 0))) == 100
    assert twv.maximum(records((1.0, 1), (2.0, 0))) == 0, "it is best to accept nothing"
    assert twv.maximum(records((1.0, 1), (1.0, 0))) == 0, "the same score, the same answer"
    assert twv.maximum(records((1.0, 1))) == 100
    with pytest.raises(UserError, match="a query that is in a document"):
        twv.maximum(records((1.0, 0)))


def test_mtwv_as_superb_publishes_it_is_of_all_languages() -> None:
    """The trials of all QUESST 2014: what was not searched scores -10, as its scorer is told."""
    records = made_up(3, digits=6)
    by_query = [[t for t in records if t.enrolment == f"q{q}"] for q in range(1, 6)]
    absent = [
        Trial("", mine[0].enrolment, "", -10.0, 0, "")
        for mine in by_query
        for _ in range(twv.DOCUMENTS - len(mine))
    ]
    others = [Trial("", f"other{q}", "", -10.0, 1, "") for q in range(3)]
    twice = METRICS["mtwv_superb"].score(records) / twv.SHARE * 5 / 8
    assert twice == pytest.approx(twv.maximum([*records, *absent, *others]))


class Planted:
    """Two layers; in the second, each query's frames are in its document."""

    def __init__(self, seed: int, queries: int = 6, documents: int = 8) -> None:
        words = [noise(seed + k, 1, 8, 6) for k in range(queries)]
        found = [noise(seed + 50 + k, 1, 30, 6) for k in range(documents)]
        for word, document in zip(words, found):
            document[:, 10:18] = word + 0.3 * noise(seed + 99, 1, 8, 6)
        self.items, outputs = split(words, found)
        self.outputs = [torch.cat([noise(i, *x.shape), x]) for i, x in enumerate(outputs)]

    @property
    def part(self) -> Part:
        return Part(self.items, self.outputs)


def test_the_layer_is_chosen_on_dev_and_used_on_test() -> None:
    task, dev, test = TASKS["qbe"], Planted(0), Planted(1000)
    labels = task.labels("", [])
    asked: list[str] = []
    settled = task.calibrate(lambda name: (asked.append(name), dev.part)[1], labels)
    assert asked == ["dev"], "the test set has no say"
    assert settled.chosen["layer"] == 1
    first, second = settled.chosen["mtwv"]
    assert first < 60 < second
    outputs = settled.use(*test.part)
    records = task.records(test.items, outputs, labels)
    assert len(records) == 6 * 8 and {r.speaker for r in records} == {"s0 + t", "s1 + t"}
    nobody = [i._replace(speaker=i.id) if i.id[0] == "d" else i for i in test.items]
    assert {r.speaker for r in task.records(nobody, outputs, labels)} == {"s0", "s1"}
    assert sum(r.label for r in records) == 6 and records[0].id == "q0 d0"
    assert task.score(records)["mtwv"] > 60
    alone = next(search(test.items, test.outputs, 1))
    assert alone == [*search(test.items, test.outputs)][1] == outputs


def test_a_split_that_cannot_be_searched_is_one_line() -> None:
    items, _ = split([noise(0, 1, 8, 4)], [noise(1, 1, 20, 4), noise(2, 1, 20, 4)])
    check = TASKS["qbe"].check
    check(items)
    wrong = [items[0]._replace(target=trials.write([(1, "d7")])), *items[1:]]
    with pytest.raises(
        UserError, match=r"q0: is compared with 'd7', which is no document of its split.*d0"
    ):
        check(wrong)
    with pytest.raises(UserError, match="nothing to find"):
        check(items[1:])
    with pytest.raises(UserError, match=r"q0: its target is no list of trials.*\"trials\": \[\]"):
        check([items[0]._replace(target="one"), *items[1:]])
    assert not TASKS["qbe"].labels("", []).unknown(items[0].target)


def result(root: Path, upstream: str, metric: str, records: Sequence[Trial]) -> None:
    """A finished cell of a task without a head."""
    score = Score(
        metric=metric, better=METRICS[metric].better, score=METRICS[metric].score(records), lr={},
        dev={}, n=len(records), speakers=12, steps=0, seconds=1, device="cpu", versions={}, git={},
        created="", recipe={},
    )  # fmt: skip
    cell = Cell(upstream, f"{upstream[0]}00000000000", "mine", metric, "ab" * 6, 0)
    save(root, cell, score, records)


def trials_of(seed: int, gap: float) -> list[Trial]:
    """Of a dozen queries, each by a speaker of its own; what is true of them is always the same."""
    noise = np.random.default_rng(seed).normal(size=(12, 40))
    return [
        Trial(f"q{q} d{d}", f"q{q}", f"d{d}", noise[q, d] + gap * true, true, f"s{q}")
        for q in range(12)
        for d in range(40)
        for true in [int((3 * q + d) % 10 == 0)]
    ]


@pytest.mark.parametrize("metric", ["mtwv", "mtwv_superb", "eer"])
def test_what_is_not_trained_is_compared_with_a_verdict(metric: str, tmp_path: Path) -> None:
    for upstream, gap in (("good", 4.0), ("poor", 1.5), ("same", 4.0)):
        result(tmp_path, upstream, metric, trials_of(0, gap))
    results = load_results(tmp_path)
    (row,) = compare("good", "poor", results).rows
    assert row.verdict == "better" and row.clusters == 12 and row.p_holm < 0.05
    assert row.difference == pytest.approx(row.score - row.reference_score)
    assert abs(row.low + row.high - 2 * row.difference) < 1e-9
    (row,) = compare("good", "same", results).rows
    assert row.verdict == "undecided" and row.difference == 0
    shown = show(summary(results, "mine", ["poor"]))
    assert f"{METRICS[metric].label} {METRICS[metric].arrow}" in shown and "better" in shown
    assert "12 speakers, 1 seeds" in shown and "withheld" not in shown


def test_what_is_left_out_is_left_out() -> None:
    records = made_up(1, digits=1)
    again = twv.of_kept(records)
    for q in range(6):
        keep = np.array([t.enrolment != f"q{q}" for t in records])
        rest = [t for t in records if t.enrolment != f"q{q}"]
        assert again(keep) == pytest.approx(brute(rest)) == pytest.approx(twv.maximum(rest))
    half = np.arange(len(records)) % 2 == 0  # of each query's trials some
    assert again(half) == pytest.approx(brute(records[::2]))
    with pytest.raises(UserError, match="a query that is in a document"):
        again(np.array([t.enrolment == "q0" for t in records]))


def test_from_audio_to_a_result(tmp_path: Path) -> None:
    """Words of three tones, to be found in strings of words among noise."""
    rng = np.random.default_rng(0)
    words = [[300, 900, 1700], [1700, 500, 300], [700, 1300, 400], [1100, 300, 1900]]

    def say(name: str, said: Sequence[int]) -> None:
        parts = [rng.normal(0, 0.05, 2400)]
        for word in said:
            seconds = np.arange(1600 + int(rng.integers(400))) / 16_000
            parts += [0.3 * np.sin(2 * np.pi * f * seconds) for f in words[word]]
            parts.append(rng.normal(0, 0.05, 2400))
        wav = np.concatenate(parts)
        soundfile.write(tmp_path / name, wav + 0.01 * rng.standard_normal(len(wav)), 16_000)

    rows = ["path\tsplit\ttrials"]
    for part in ("dev", "test"):
        documents = {f"{part}-d{k}": [k % 4, 3 - k // 2 % 4] for k in range(8)}
        for name, said in documents.items():
            say(f"{name}.wav", said)
            rows.append(f"{name}.wav\t{part}\t{trials.write([])}")
        for word in range(4):
            say(f"{part}-q{word}.wav", [word])
            true = trials.write((1, name) for name, said in documents.items() if word in said)
            rows.append(f"{part}-q{word}.wav\t{part}\t{true}")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "find.yaml").write_text(
        f"kind: task\ntask: qbe\ncorpus: {{name: manifest, root: {tmp_path}, target: trials}}\n"
    )
    words_of = ["--upstream", "fbank", "--suite", str(tmp_path / "mine"), "--device", "cpu"]
    root = tmp_path / "r"
    assert benchmark.main([*words_of, "--results", str(root), "--workers", "1"]) == 0
    (found,) = load_results(root)
    assert found.score.score > 50 and found.score.n == 32 and found.score.speakers == 4
    assert found.score.chosen == {"": {"layer": 0, "mtwv": [pytest.approx(100, abs=50)]}}
    assert found.summary.utterances == 32 and found.summary.unit == "speakers"
