"""What we write: read back by transformers and by us, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import transformers

from upstream.audio import pad
from upstream.encoders import load
from upstream.errors import UserError
from upstream.export import to_s3prl


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_save_is_read_by_transformers_and_by_us(variant: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(tmp_path, variant).half()
    encoder.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert {tensor.dtype for tensor in again.model.state_dict().values()} == {torch.float32}
    assert again.fingerprint() == load(tmp_path / "saved").fingerprint()
    assert again.normalize == encoder.normalize
    model = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert type(model) is type(encoder.model)
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

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="disk full"):
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
