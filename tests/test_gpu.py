"""What a GPU is asked for: on a real one where there is one, else on a pretended (pretend.py)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import benchmark
from downstream.report.results import load_results
from tests import tiny
from tests.downstream.test_superb import TASKS, shortened
from tests.downstream.test_superb import suite as superb  # noqa: F401 - a fixture
from tests.pretend import Device, pretended
from upstream import load
from upstream.base import Hidden, Upstream
from upstream.common.errors import UserError
from upstream.features import device as on_gpu
from upstream.features.clips import Clip
from upstream.features.clips import clips as load_clips
from upstream.features.codec import Kind
from upstream.features.extract import extract
from upstream.features.forward import Source
from upstream.features.provide import in_order
from upstream.features.shards import Writer
from upstream.features.store import Store

REAL = torch.cuda.is_available()


class Real:
    """A GPU, and what the CPU waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[str] = []
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", self.hear)
        torch.cuda.set_sync_debug_mode("warn")

    def hear(self, message: Warning | str, *_: object) -> None:
        if "synchroniz" in str(message):
            self.waits.append("a synchronizing operation")


Gpu: TypeAlias = "Device | Real"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """`device="cuda"` can be used, in this thread."""
    if not REAL:
        with pretended(monkeypatch) as device:
            yield device
        return
    with warnings.catch_warnings():
        yield Real(monkeypatch)
    torch.cuda.set_sync_debug_mode("default")


def run(suite: Path, base: str, results: Path, device: str, *words: str) -> None:
    given = [
        "--suite",
        str(suite),
        "--results",
        str(results),
        "--workers",
        "1",
        "--features",
        "cache",
    ]
    assert benchmark.main(["--upstream", base, *given, "--device", device, *words]) == 0


def _set(*changes: str) -> list[str]:
    return [word for each in changes for word in ("--set", each)]


@pytest.mark.parametrize(
    "task",
    # in the others are no heads but these
    [pytest.param(t, marks=[pytest.mark.slow] * (t in ("ks", "ic", "er", "sf"))) for t in TASKS],
)
def test_a_task_of_superb_is_the_same_on_a_gpu(
    task: str, superb: Path, tmp_path: Path, gpu: Gpu  # noqa: F811
) -> None:  # fmt: skip
    shortened(task, superb)
    base = str(tiny.hf_folder(tmp_path, "hubert"))
    words = [] if task == "qbe" else _set("train.steps=3", "train.eval_every=2", "train.seeds=1")
    run(superb, base, tmp_path / "cuda", "cuda", *words)
    run(superb, base, tmp_path / "cpu", "cpu", *words)
    there, here = (load_results(tmp_path / device) for device in ("cuda", "cpu"))
    assert len(there) == len(here)
    for cell, other in zip(there, here):
        assert (cell.cell, cell.score.device) == (other.cell, "cuda")
        for file in cell.folder.glob("head*.safetensors"):
            weights, others = load_file(file), load_file(other.folder / file.name)
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, others[name], rtol=0, atol=2e-3, msg=name)
        if task != "asv":  # an EER of 15 trials hangs on the last digit of each
            assert cell.score.score == pytest.approx(other.score.score, abs=1e-3)


@pytest.mark.parametrize("task", ["sid", "ic", "pr", "asr"])
def test_a_step_does_not_wait_for_the_gpu(
    task: str, superb: Path, tmp_path: Path, gpu: Gpu  # noqa: F811
) -> None:  # fmt: skip
    """Twice the steps, as many evaluations: as many waits."""
    if REAL and task in ("pr", "asr"):
        pytest.skip("PyTorch's own CTC copies lengths and waits for its stream")
    shortened(task, superb)
    base, waits = str(tiny.hf_folder(tmp_path, "hubert")), []
    for steps in (1, 3, 6):  # the first one extracts the features
        gpu.waits.clear()
        words = _set(f"train.steps={steps}", "train.eval_every=99", "train.seeds=1")
        words += _set("head.depth=1") if task == "asr" else []
        run(superb, base, tmp_path / "r", "cuda", *words)
        waits.append(sorted(gpu.waits))
    assert waits[1] == waits[2] != []


@pytest.fixture
def kept(tmp_path: Path, tones: Path) -> tuple[Path, list[Clip]]:
    files = [(str(path), None, None) for path in sorted(tones.glob("*.wav"))[:9]]
    return tiny.hf_folder(tmp_path, "hubert"), load_clips(files, tmp_path / "clips.tsv")


@pytest.mark.parametrize("kind", ["mean", "float16", "int8"])
@pytest.mark.parametrize("room", [True, False])
def test_features_come_to_a_gpu_as_they_are_kept(
    kept: tuple[Path, list[Clip]],
    tmp_path: Path,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    room: bool,
) -> None:
    """Made there, they are what a CPU makes; read by it, too, whether all fit or not."""
    folder, clips = kept
    monkeypatch.setattr(on_gpu, "SHARE", 0.1 if room else 0.0)
    stores = []
    for device in ("cpu", "cuda"):
        upstream = load(str(folder)).to(device)
        stores.append(store := Store(tmp_path / device))
        extract(upstream, clips, [kind], store, batch_seconds=1.0)
    entry = upstream.fingerprint()
    here, there = (store.open(entry, kind, clips) for store in stores)
    assert here.error == pytest.approx(there.error, rel=1e-3)
    order = [[3, 0, 8], [5], [1, 2]]
    found = list(in_order(there, order, "cuda"))
    assert [indices for indices, *_ in found] == order
    for (indices, x, lens), (_, y, known) in zip(found, in_order(here, order)):
        assert (x.is_cuda, lens.is_cuda) == (True, False) and lens.tolist() == known.tolist()
        assert x.is_contiguous() and x.shape == y.shape
        assert torch.equal(x.cpu(), there.batch(indices)[0])
        near = 1e-5 if kind == "mean" else 0.05 if kind == "int8" else 5e-3
        torch.testing.assert_close(x.cpu(), y, rtol=near, atol=near)


def test_while_a_gpu_computes_a_batch_the_last_one_is_written(
    kept: tuple[Path, list[Clip]],
    tmp_path: Path,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, clips = kept
    upstream, said = load(str(folder)).to("cuda"), []
    forward, add = Source.hidden, Writer.add
    monkeypatch.setattr(Source, "hidden", lambda *a: said.append("computed") or forward(*a))
    monkeypatch.setattr(Writer, "add", lambda *a: said.append("written") or add(*a))
    extract(upstream, clips[:3], ["mean"], Store(tmp_path), batch_seconds=0.1)
    assert said == ["computed", "computed", "written", "computed", "written", "written"]


class Long(Upstream):
    """Says that its utterances are longer than they are."""

    num_layers, dim, stride = 1, 2, 400

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, wavs: Tensor, lens: Tensor) -> Hidden:
        x = wavs[:, : wavs.shape[1] // 800 * 800].unflatten(1, (-1, 400))[None, ..., :2]
        return Hidden(x * self.scale, lens)


def test_lens_are_looked_at_when_the_batch_is_here(
    kept: tuple[Path, list[Clip]], tmp_path: Path, gpu: Gpu
) -> None:
    with pytest.raises(UserError, match=r"gives lens .*, which are not from 1 to"):
        extract(Long().to("cuda"), kept[1], ["mean"], Store(tmp_path))


def test_fine_tuning_and_merging_on_a_gpu(recipes: Path, tmp_path: Path, gpu: Gpu) -> None:
    words = ["--suite", str(recipes), "--downstream", "label", "--workers", "1", "--seeds", "1"]
    words += ["--features", "cache", "--results", str(tmp_path / "r")]
    assert benchmark.main(["--upstream", "merged", *words]) == 0
    assert {cell.score.device for cell in load_results(tmp_path / "r")} == {"cuda"}
