"""Wherever frames come from, heads and predictions are the same to the last byte (on a CPU)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import soundfile
import torch

import upstream
from downstream import recipe
from downstream.report.results import load_results
from downstream.run import execute
from downstream.run.execute import Unfinished
from downstream.run.prepare import prepare
from downstream.run.schedule import Request, RunOptions, survey
from tests import tiny
from upstream.features.extract import extract
from upstream.features.provide import provide
from upstream.features.store import Store

USER_CLASS = '''
"""Frames of 20 ms; how many there are is told by nothing but a forward, which pads the batch."""
import torch
from upstream.base import Hidden, Upstream, valid

class Frames(Upstream):
    num_layers, dim, stride = 2, 320, 320

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(320, 320, generator=generator) / 18)

    def forward(self, wavs, lens):
        x = torch.nn.functional.pad(wavs, (0, 640 + -wavs.shape[1] % 320)).unflatten(1, (-1, 320))
        lens = (lens + 319) // 320
        x = x * valid(lens, x.shape[1])[:, :, None]
        return Hidden(torch.stack([x, x @ self.weight]), lens)
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 utterances, among them many whose frames an estimate from their seconds gets wrong."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    rows = ["path\tspeaker\tsplit\ttext"]
    splits = ["train"] * 30 + ["dev"] * 8 + ["test"] * 10
    for number, split in enumerate(splits):
        samples = 320 * rng.randint(10, 60) + rng.choice((0, 79, 80, 81, 319))
        (wav,) = tiny.noise(samples, seed=number)
        soundfile.write(folder / f"{number}.wav", wav.numpy(), 16000)
        text = " ".join(rng.choice(("HUB", "BET", "SEA", "DOT")) for _ in range(2))
        rows.append(f"{number}.wav\ts{number % 5}\t{split}\t{text}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return folder


def suite_of(folder: Path, corpus: Path, window: str = "") -> Path:
    folder.mkdir()
    source = f"corpus: {{name: manifest, root: {corpus}, target: text}}\nkind: task\n"
    train = f"train: {{steps: 24, batch: 6, lr: [5.0e-2], eval_every: 8{window}}}\n"
    (folder / "letters.yaml").write_text(
        f"{source}task: asr\nhead: {{projector: 8, hidden: 8, depth: 1}}\n{train}"
    )
    (folder / "words.yaml").write_text(f"{source}task: pr\ntokens: train\n{train}")
    return folder


@pytest.fixture(params=["hubert", "wavlm", "data2vec", "fbank", "user"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "user":
        (tmp_path / "frames.py").write_text(USER_CLASS)
        return f"{tmp_path / 'frames.py'}:Frames"
    if request.param == "fbank":
        return "fbank"
    return str(tiny.hf_folder(tmp_path, request.param))


def run(spec: str, suite: Path, how: RunOptions, names: str = "letters words") -> None:
    files = recipe.suite(str(suite))
    tasks = [prepare(recipe.load(files[name], {}), how.results) for name in names.split()]
    execute.run(survey([Request("some", spec)], tasks, 1, how), how)


def outcome(results: Path) -> dict[str, bytes]:
    """Predictions and heads of every cell, as they stand in their files."""
    return {
        f"{one.cell.task} {file.name}": file.read_bytes()
        for one in load_results(results)
        for file in (one.folder / "predictions.jsonl", one.folder / "head.safetensors")
    }


def start_anew(results: Path) -> None:
    """As if no cell were finished; features stay."""
    for path in results.rglob("score.json"):
        path.unlink()
    for path in results.rglob("state.pt"):
        path.unlink()


def damage(how: RunOptions) -> None:
    """One byte in the last shard of frames."""
    *_, rows = sorted(how.store.root.rglob("float16/*/rows.npy"))
    content = bytearray(rows.read_bytes())
    content[-1000] ^= 1
    rows.write_bytes(content)


def evict(how: RunOptions) -> None:
    for entry in how.store.entries():
        assert how.store.remove(entry)


def test_kept_recomputed_evicted_and_damaged(spec: str, corpus: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path / "plain", corpus)

    def options(name: str, **changes: object) -> RunOptions:
        return RunOptions(tmp_path / name, **({"workers": 1, "device": "cpu"} | changes))  # type: ignore[arg-type]

    kept = options("kept")
    run(spec, suite, kept)
    expected = outcome(kept.results)
    assert len(expected) == 4

    ways: dict[str, dict[str, object]] = {
        "recomputed": {"features": "recompute"},
        "full": {"cache_gb": 0.0},
        "small batches": {"batch_seconds": 1.0},
        "large batches": {"batch_seconds": 600.0, "features": "recompute"},
    }
    for name, changes in ways.items():
        how = options(name, **changes)
        run(spec, suite, how)
        assert outcome(how.results) == expected, name
        frames = list(how.store.root.rglob("float16"))
        assert bool(frames) == (name == "small batches"), name

    for name, spoil in {"damaged": damage, "evicted": evict}.items():
        start_anew(kept.results)
        spoil(kept)
        try:
            run(spec, suite, kept)
        except Unfinished:  # the same command computes what was damaged again
            assert name == "damaged"
            run(spec, suite, kept)
        assert outcome(kept.results) == expected, name

    for task in ("letters", "words"):  # one after the other, each with a pass of its own
        run(spec, suite, options(f"alone {task}"), task)
        alone = outcome(tmp_path / f"alone {task}")
        assert alone.items() <= expected.items() and len(alone) == 2, task


@pytest.mark.parametrize("variant", ["hubert", "fbank"])
def test_blocks_of_a_window(variant: str, corpus: Path, tmp_path: Path) -> None:
    spec = "fbank" if variant == "fbank" else str(tiny.hf_folder(tmp_path, variant))
    suite = suite_of(tmp_path / "blocks", corpus, ", window: 0.15")
    outcomes = []
    for place, changes in enumerate(
        ({}, {"features": "recompute"}, {"features": "recompute", "batch_seconds": 1.0})
    ):
        how = RunOptions(tmp_path / str(place), 1, "cpu", **changes)  # type: ignore[arg-type]
        run(spec, suite, how)
        outcomes.append(outcome(how.results))
    assert len(outcomes[0]) == 4
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_two_processes(corpus: Path, tmp_path: Path) -> None:
    spec, suite = str(tiny.hf_folder(tmp_path, "hubert")), suite_of(tmp_path / "plain", corpus)
    for name, changes in {
        "kept 1": {"workers": 1},
        "kept 2": {"workers": 2},
        "recomputed 2": {"workers": 2, "features": "recompute"},
    }.items():
        run(spec, suite, RunOptions(tmp_path / name, device="cpu", **changes))  # type: ignore[arg-type]
    assert outcome(tmp_path / "kept 1") == outcome(tmp_path / "kept 2")
    assert outcome(tmp_path / "kept 1") == outcome(tmp_path / "recomputed 2")


@pytest.mark.parametrize("kind", ["mean", "float16", "int8"])
def test_features_of_any_batch(kind: str, spec: str, corpus: Path, tmp_path: Path) -> None:
    """Means too, in whatever order and company an utterance passes."""
    suite = suite_of(tmp_path / "plain", corpus)
    task = prepare(recipe.load(recipe.suite(str(suite))["words"], {}), tmp_path / "r")
    loaded, clips = upstream.load(spec), task.clips
    together, apart = Store(tmp_path / "together"), Store(tmp_path / "apart")
    extract(loaded, clips, [kind], together)  # type: ignore[list-item]
    for clip in clips[::-3]:
        extract(loaded, [clip], [kind], apart)  # type: ignore[list-item]
    chosen = clips[::-3]
    one = together.open(loaded.fingerprint(), kind, chosen)  # type: ignore[arg-type]
    other = apart.open(loaded.fingerprint(), kind, chosen)  # type: ignore[arg-type]
    x, lens = one.batch(range(len(chosen)))
    y, _ = other.batch(range(len(chosen)))
    assert torch.equal(x, y)
    if kind != "mean":
        again = provide(loaded, clips, kind, Store(tmp_path / "none"), where="recompute")  # type: ignore[arg-type]
        assert again.lens.tolist() == together.open(loaded.fingerprint(), kind, clips).lens.tolist()  # type: ignore[arg-type]
        z, again_lens = again.batch([clips.index(clip) for clip in chosen])
        assert torch.equal(x, z) and torch.equal(lens, again_lens)
