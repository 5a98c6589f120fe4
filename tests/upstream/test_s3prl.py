"""s3prl runs nothing that a checkpoint says: pickles and strings with a canary in them."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import upstream
from tests.optional import required
from upstream.audio import pad
from upstream.checkpoints.write import to_s3prl
from upstream.common.errors import UserError
from upstream.s3prl import _packages, _require_inert

mockingjay = required("s3prl.upstream.mockingjay.model")

TRANSFORMER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02, "layer_norm_eps": 1.0e-12, "share_layer": False,
    "max_input_length": 0, "pre_layer_norm": False,
}  # fmt: skip
AUDIO = {"kaldi": {"feat_type": "fbank", "fbank": {"num_mel_bins": 8, "use_log_fbank": True}},
         "delta": {"order": 2, "win_length": 5}, "cmvn": {"use_cmvn": True}}  # fmt: skip


class Harmful:
    """Leaves a mark if anybody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def complaint(name: str, path: Path) -> str:
    with pytest.raises(UserError) as error:
        upstream.load(f"s3prl:{name}:ckpt={path}")
    assert "\n" not in str(error.value)
    return str(error.value)


def store(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def tera() -> dict[str, Any]:
    """A small checkpoint of s3prl's TERA family, as its own training writes it."""
    settings = {"transformer": TRANSFORMER, "audio": AUDIO, "task": {"sequence_length": 1500}}
    model = mockingjay.TransformerModel(mockingjay.TransformerConfig(TRANSFORMER), 24)
    return {"Config": settings, "Transformer": model.state_dict(), "Global_step": 3,
            "Settings": {"Paras": argparse.Namespace(lr=0.1)}}  # fmt: skip


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean hubert\?"):
        upstream.load("s3prl:hubertt")
    assert "no such file" in complaint("hubert", Path("/nowhere.pt"))
    os.mkfifo(tmp_path / "x.pt")
    assert "is a pipe" in complaint("tera_local", tmp_path / "x.pt")


LOCAL = sorted(n for n in _packages() if n.endswith(("_local", "_custom", "_url")))


@pytest.mark.parametrize("name", LOCAL)
def test_no_pickle_is_followed(name: str, tera: dict[str, Any], tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    for i, content in enumerate((tera, to_s3prl(tiny.encoder(tmp_path)))):
        path = store({**content, "epoch": Harmful(mark)}, tmp_path / f"{i}.ckpt")
        assert "would have to run code" in complaint(name, path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    ("name", "variant"),
    [("hubert_local", "hubert"), ("wavlm_local", "wavlm"), ("data2vec_local", "data2vec"),
     ("unispeech_sat_local", "hubert"), ("multires_hubert_local", "hubert"),
     ("lighthubert_local", "hubert"), ("distiller_local", "hubert")],
)  # fmt: skip
def test_no_string_is_evaluated(name: str, variant: str, tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    text = f"[__import__('pathlib').Path('{mark}').touch()]"
    content = to_s3prl(tiny.encoder(tmp_path, variant))
    settings = content["cfg"] if variant == "wavlm" else content["model_cfg"]
    settings["conv_feature_layers"] = text
    if variant == "hubert":  # wherever a family looks for its own
        content |= {"cfg": {"model": settings}, "model": content["model_weight"]}
        content["Config"] = {"distiller": {"extractor_conv_feature_layers": text}}
    assert "__import__" in complaint(name, store(content, tmp_path / "c.pt"))
    assert not mark.exists()


def test_the_name_of_a_filter_bank_is_not_evaluated(tera: dict[str, Any], tmp_path: Path) -> None:
    mark, content = tmp_path / "harm", copy.deepcopy(tera)
    content["Config"]["audio"]["kaldi"]["feat_type"] = (
        f"fbank if __import__('pathlib').Path('{mark}').touch() else fbank"
    )
    assert "would evaluate" in complaint("tera_local", store(content, tmp_path / "c.ckpt"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    ["x()", " f(1)", "a[0]", "{*a}", "[f() for f in x]", "2**2**99", "'a'*9**9", "1<<9**9",
     "fbank, f()", "__import__('os').system('true')", "\t[x()]", "(lambda: 1)()", "'%9999d'%1"],
)  # fmt: skip
def test_strings_that_do_something(text: str) -> None:
    hidden = argparse.Namespace(a=({"b": text},), storage=1, shape=2)
    for content in ({"a": [text]}, {text: 1}, {("a", text): 1}, {"a": text.encode()}, hidden):
        with pytest.raises(UserError, match="trust=true"):
            _require_inert(content, "s3prl:x")


@pytest.mark.parametrize(
    "text",
    ["fbank", "[(512,10,5)] + [(512,3,2)] * 4", "(1, 2)", "./out/${now:%Y}", "<s>", "(", "a (b)c",
     "s3prl/data-train_clean.100", "None", "100%", "{'dtype': 'fp16'}"],
)  # fmt: skip
def test_strings_that_do_nothing(text: str) -> None:
    _require_inert({"a": [text, 1, None, torch.ones(1)]}, "s3prl:x")


def test_a_harmless_checkpoint_runs(tera: dict[str, Any], tmp_path: Path) -> None:
    path = store(tera, tmp_path / "states.ckpt")
    model = upstream.load(f"s3prl:tera_local:ckpt={path}")
    trusted = upstream.load(f"s3prl:tera_local:ckpt={path}:trust=true")
    assert (model.num_layers, model.dim, model.stride) == (3, 24, 160)
    assert model.fingerprint() == trusted.fingerprint()
    batch = pad(tiny.noise(8000))
    with torch.inference_mode():
        assert torch.equal(model(*batch).layers, trusted(*batch).layers)


@pytest.mark.parametrize("name", ["decoar_local", "decoar2_local", "decoar_layers_custom"])
def test_weights_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    """s3prl loads these with strict=False, and would run with random weights."""
    path = store({"model": {"something.else": torch.ones(3)}}, tmp_path / "foreign.pt")
    assert "is of another model: no " in complaint(name, path)
