"""What files beside a model say of its audio and its family, and what is said where none does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers

from upstream import resolve
from upstream.checkpoints.write import to_s3prl
from upstream.common.errors import UserError
from upstream.common.notice import notice
from upstream.encoder.encoder import load

VOCAB = {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}
WIDTH = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    notice.cache_clear()


def notices(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "benchmark.py: " in line]


def ctc(folder: Path, variant: str, normalize: bool, rate: int = 16_000) -> Path:
    """The end of a CTC fine-tuning: model and processor as transformers saves them."""
    family, settings = tiny.config(variant)
    build = {"hubert": transformers.HubertForCTC, "wav2vec2": transformers.Wav2Vec2ForCTC}[family]
    build(build.config_class(**settings, vocab_size=len(VOCAB))).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, sampling_rate=rate)
    processor = transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["hubert", "hubert-large", "wav2vec2", "wav2vec2-large"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_processor_says_how_audio_is_prepared(
    variant: str, normalize: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ctc(tmp_path / "ctc", variant, normalize)
    assert not (folder / "preprocessor_config.json").exists(), "transformers 5 nests it"
    assert transformers.AutoFeatureExtractor.from_pretrained(folder).do_normalize is normalize
    assert load(folder).normalize is normalize
    assert not notices(capsys)
    assert load(folder, normalize=not normalize).normalize is not normalize


def test_the_files_in_transformers_own_order(tmp_path: Path) -> None:
    folder = ctc(tmp_path / "ctc", "hubert", True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert transformers.AutoFeatureExtractor.from_pretrained(folder).do_normalize is True
    assert load(folder).normalize is True
    # as before its version 5: the processor's file says nothing of audio
    (folder / "processor_config.json").write_text('{"processor_class": "Wav2Vec2Processor"}')
    assert load(folder).normalize is False
    nested = {"processor": {"audio_processor": {"do_normalize": True}}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load(folder).normalize is True
    images = {"image_processor": {"do_normalize": True, "sampling_rate": 1}}
    (folder / "processor_config.json").write_text(json.dumps(images))
    assert load(folder).normalize is False, "that is of pictures"
    (folder / "processor_config.json").write_text('{"feature_extractor": {"do_normalize": "no"}}')
    with pytest.raises(UserError, match=r"processor_config.json: do_normalize must be true or fal"):
        load(folder)


@pytest.mark.parametrize("variant", ["hubert", "hubert-large"])
def test_a_guess_is_said_once_with_its_option(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.hf_folder(tmp_path, variant)
    asked = load(folder).fingerprint()
    (folder / "preprocessor_config.json").unlink()
    guess, other = ("true", "false") if variant.endswith("large") else ("false", "true")
    assert load(folder).fingerprint() == load(folder).fingerprint() == asked
    (line,) = notices(capsys)
    assert f"whether its audio is normalised; took normalize={guess}, as its CNN" in line
    assert f"{folder}:normalize={other}" in line
    assert resolve.load(f"{folder}:normalize={guess}").fingerprint() == asked
    assert not notices(capsys)


RATES = [
    ("processor_config.json", {"feature_extractor": {"sampling_rate": 8000}}),
    ("preprocessor_config.json", {"sampling_rate": 8000, "do_normalize": False}),
    ("preprocessor_config.json", {"sampling_rate": "8 kHz"}),
    ("config.json", {"sampling_rate": 44_100}),
]


@pytest.mark.parametrize(("file", "says"), RATES)
def test_another_sampling_rate_is_refused(file: str, says: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    settings = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**settings, **says}))
    with pytest.raises(UserError, match=rf"{file}: the sampling rate .* hear 16000; wrap it"):
        load(folder)


def test_fairseqs_sampling_rate(tmp_path: Path) -> None:
    content = to_s3prl(tiny.encoder(tmp_path))
    content["task_cfg"]["sample_rate"] = 8000
    torch.save(content, tmp_path / "slow.pt")
    with pytest.raises(UserError, match="sampling rate of this model is 8000"):
        load(tmp_path / "slow.pt")


@pytest.mark.parametrize(
    ("prefix", "head", "family"),
    [
        ("wav2vec2.", "", "wav2vec2"),  # or a HuBERT that somebody keeps under that name
        ("hubert.", "lm_head.weight", "hubert"),
        ("my_hubert.model.", "", "hubert"),
        ("wav2vec2.", "quantizer.codevectors", "wav2vec2"),
        ("model.", "", None),
        ("wavlm.", "", None),  # it has no tensor that every WavLM has
        ("hubert.", "quantizer.codevectors", None),
        ("teacher_hubert_student_wav2vec2.", "", None),
    ],
)
def test_a_prefix_is_no_family(
    prefix: str, head: str, family: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load(tiny.hf_folder(tmp_path, "hubert", **WIDTH))
    path = tmp_path / "mine.safetensors"
    state = {f"{prefix}{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    safetensors.torch.save_file({**state, **({head: torch.ones(2)} if head else {})}, path)
    assert load(path, family="hubert", normalize=False).fingerprint() == encoder.fingerprint()
    assert not notices(capsys)
    if family is None:
        with pytest.raises(UserError, match=r"mine.safetensors:family=hubert or .*family=wav2vec2"):
            load(path)
        return
    assert load(path).family == family
    other = {"hubert": "wav2vec2", "wav2vec2": "hubert"}[family]
    said = notices(capsys)
    assert len(said) == 2, "the family, and whether waves are normalised"
    assert f"{path}:family={other} if that is wrong" in said[0]


def test_tensors_tell_whatever_the_attribute_is_called(tmp_path: Path) -> None:
    for variant in ("wavlm", "data2vec"):
        encoder = load(tiny.hf_folder(tmp_path, variant, **WIDTH))
        state = {f"hubert.{name}": t for name, t in encoder.model.state_dict().items()}
        path = tmp_path / f"{variant}.safetensors"
        safetensors.torch.save_file(state, path)
        assert load(path).fingerprint() == encoder.fingerprint()


def test_the_option_wins_over_a_config(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path, "hubert")
    assert load(folder, family="wav2vec2").family == "wav2vec2"
    settings = json.loads((folder / "config.json").read_text())
    del settings["model_type"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not say which model it is"):
        load(folder)
    assert load(folder, family="hubert").family == "hubert"
