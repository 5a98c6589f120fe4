"""What we write: read back by transformers and by us, whole or not at all."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import transformers

from tests.optional import required
from upstream.audio import pad
from upstream.checkpoints import read as checkpoint
from upstream.checkpoints import tensor_files as files
from upstream.checkpoints.write import to_fairseq, to_folder, to_s3prl
from upstream.common.errors import UserError
from upstream.encoder.encoder import FAMILIES, load


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_save_is_read_by_transformers_and_by_us(variant: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path, variant).half()
    encoder.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert {tensor.dtype for tensor in again.model.state_dict().values()} == {torch.float32}
    assert again.fingerprint() == load(tmp_path / "saved").fingerprint()
    assert again.normalize == encoder.normalize
    model = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert type(model).__name__ == FAMILIES[encoder.family].model
    wave = 100 * tiny.noise(4000)[0]  # loud: transformers normalises with another epsilon
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "saved")
    asked = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.inference_mode():
        theirs, ours = model(asked).last_hidden_state, again(*pad([wave])).layers[-1]
    assert (theirs - ours).abs().max() <= 1e-4
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_a_failed_save_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.hf_folder(tmp_path)
    before = load(folder).fingerprint()
    (folder / "README.md").write_text("a card")

    def full(part: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space"):
            tiny.encoder(tmp_path, seed=1).save(folder)
    assert load(folder).fingerprint() == before
    other = tiny.encoder(tmp_path, seed=1)
    other.save(folder)
    assert load(folder).fingerprint() == other.fingerprint() != before
    assert (folder / "README.md").read_text() == "a card"
    assert not list(folder.glob(".part-*"))


def test_s3prl_cannot_hold_every_encoder(tmp_path: Path) -> None:
    encoder = load(tiny.hf_folder(tmp_path, "hubert", conv_dim=[32] * 7))
    with pytest.raises(UserError, match="no projection"):
        to_s3prl(encoder)


@pytest.mark.parametrize("variant", ["hubert", "hubert-large", "wav2vec2", "data2vec"])
def test_fairseqs_form_goes_through_s3prls_own_converter(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter asks fairseq for nothing but the content of the file and a class's name."""
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fairseq.data.dictionary"].Dictionary = object  # type: ignore[attr-defined]
    encoder = tiny.encoder(tmp_path, variant)
    source, output = tmp_path / "fairseq.pt", tmp_path / "converted.pt"
    files.save_torch(to_fairseq(encoder), source)
    package = variant.removesuffix("-large")
    convert = required(f"s3prl.upstream.{package}.convert")
    state = torch.load(source)
    monkeypatch.setattr(convert, "load_fairseq_ckpt", lambda _: (state, state["cfg"]))
    convert.load_and_convert_fairseq_ckpt(str(source), str(output))
    convert.load_converted_model(str(output))  # strict
    assert load(output).fingerprint() == load(source).fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize("variant", ["hubert", "data2vec", "wavlm-large"])
def test_transformers_finds_every_tensor(variant: str, tmp_path: Path) -> None:
    """Neither missing nor left over, with and without an embedding of masked frames."""
    weights = checkpoint.read(tiny.hf_folder(tmp_path, variant))
    bare = {name: t for name, t in weights.state.items() if name != "masked_spec_embed"}
    for state in (weights.state, bare):
        to_folder(weights._replace(state=state), tmp_path / "out")
        _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info


def test_half_precision_sources_are_saved_as_float32(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    weights = checkpoint.read(folder)
    half = weights._replace(
        config={**weights.config, "torch_dtype": "float16"},
        state={name: tensor.half() for name, tensor in weights.state.items()},
    )
    to_folder(half, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("float32", False)
    again = checkpoint.read(tmp_path / "out").state
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in half.state.items())


def test_our_safetensors_are_the_librarys(tmp_path: Path) -> None:
    """Every dtype, scalars and empty tensors; odd sizes keep the alignment of wider types."""
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(3, dtype=torch.uint8),
        "yes": torch.tensor([True, False, True]),
        "half": torch.rand(5).half(),
        "brain": torch.rand(3).bfloat16(),
        "long": torch.arange(2),
        "double": torch.rand(2, 2).double(),
        "strided": torch.rand(4, 3).T,
        "ä": torch.rand(1),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    files.save_tensors(tensors, ours, {"format": "pt"})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, theirs, metadata={"format": "pt"})
    for read in (safetensors.torch.load_file(ours), safetensors.torch.load_file(theirs)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
    files.save_tensors(dict(reversed(tensors.items())), tmp_path / "again", {"format": "pt"})
    assert (tmp_path / "again").read_bytes() == ours.read_bytes()
    with pytest.raises(UserError, match=r"c is torch\.complex64"):
        files.save_tensors({"c": torch.zeros(1, dtype=torch.complex64)}, ours)
