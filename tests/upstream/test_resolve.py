"""From a name to an upstream: every form, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import upstream
from upstream import resolve
from upstream.base import UPSTREAMS, Upstream
from upstream.checkpoints.write import to_s3prl
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder
from upstream.resolve import parse, split_specs

MINE = """
import torch
from upstream.base import Hidden, Upstream


class Mine(Upstream):
    num_layers, dim, stride = 1, 1, 160

    def __init__(self, scale: float = 1.0, mode: str = "a", on=False):
        super().__init__()
        self.scale, self.on = 1 / scale, on

    def forward(self, wavs, lens):
        return Hidden(wavs[None, :, ::160, None] * self.scale, (lens + 159) // 160)


class Other:
    pass


class Unfinished(Upstream):
    num_layers, dim = 1, 1
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def complaint(spec: str, **options: object) -> str:
    with pytest.raises(UserError) as error:
        upstream.load(spec, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("fbank", "fbank", {}),
        ("hubert_base:padding=s3prl", "hubert_base", {"padding": "s3prl"}),
        ("hf:facebook/x:normalize=true,padding=s3prl", "hf:facebook/x", None),
        ("s3prl:hubert:ckpt=/a:b/c.pt", "s3prl:hubert", {"ckpt": "/a:b/c.pt"}),
        ("/data/a:b,c/m.pt", "/data/a:b,c/m.pt", {}),
        ("dir/mine.py:Mine:scale=2", "dir/mine.py:Mine", {"scale": "2"}),
    ],
)
def test_parse(spec: str, name: str, options: dict[str, str] | None) -> None:
    both = {"normalize": "true", "padding": "s3prl"}
    assert parse(spec) == (name, both if options is None else options)


def test_split_specs() -> None:
    assert split_specs("a,b:alpha=0.5:padding=s3prl,c") == ["a", "b:alpha=0.5:padding=s3prl", "c"]
    assert split_specs("a:x=1,y=2, b") == ["a:x=1,y=2", "b"]
    assert parse("a:x=1,y=2") == ("a", {"x": "1", "y": "2"})
    for text in ("a,,b", "", "a,"):
        with pytest.raises(UserError, match="empty name"):
            split_specs(text)


@pytest.mark.parametrize("spec", [":padding=exact", "fbank:cmvn=true:cmvn=false"])
def test_malformed_specs(spec: str) -> None:
    with pytest.raises(UserError):
        parse(spec)


def test_every_form_gives_the_same_encoder(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    encoder = upstream.load(str(folder))
    assert isinstance(encoder, Encoder)
    torch.save(to_s3prl(encoder), tmp_path / "converted.pt")
    forms = [f"hf:{folder}", str(tmp_path / "converted.pt"), str(folder / "model.safetensors")]
    assert {upstream.load(form).fingerprint() for form in forms} == {encoder.fingerprint()}


def test_options_are_typed_and_python_wins_over_text(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    encoder = upstream.load(f"{folder}:normalize=TRUE:padding=s3prl", padding="exact")
    assert isinstance(encoder, Encoder)
    assert (encoder.normalize, encoder.padding) == (True, "exact")
    assert not upstream.load(f"{folder}:normalize=none").normalize  # as the checkpoint asks
    assert "exact, s3prl" in complaint(f"{folder}:padding=exakt")
    assert "true or false" in complaint("fbank:cmvn=1")
    assert "did you mean cmvn" in complaint("fbank:cmv=true")
    assert "has no option 'padding'" in complaint("fbank", padding="exact")


def test_wrong_names_and_paths(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    assert "did you mean hubert_base?" in complaint("hubrt_base")
    assert f"did you mean {folder}?" in complaint(f"{folder}x")
    assert f"did you mean {folder}?" in complaint(f"{folder}x/deeper/model.pt")
    assert "did you mean hubert?" in complaint("s3prl:hubertt")
    assert "no checkpoint" in complaint("s3prl:hubert:ckpt=/nowhere.pt")
    assert "config.json" in complaint(str(tmp_path))


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for spec in ("hubert_base", "hf:somebody/something"):
        assert "cannot be reached" in complaint(spec)
        assert "hf:FOLDER" in complaint(spec)


def test_the_hub_is_asked_for_safe_weights_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, asked = tiny.hf_folder(tmp_path), []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = upstream.load("wavlm_base")
    assert (encoder.source, encoder.licence) == ("microsoft/wavlm-base", "CC-BY-SA-3.0")
    assert asked == [("microsoft/wavlm-base", ["*.json", "model*.safetensors"])]


def test_a_recipe_goes_to_the_merged_loader(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("alpha: 0.25\n")
    calls = []

    def merged(recipe: Path | None = None, alpha: float = 0.25) -> Upstream:
        calls.append((recipe, alpha))
        return upstream.load("fbank")

    monkeypatch.setitem(UPSTREAMS._entries, "merged", merged)
    upstream.load(f"{recipe}:alpha=0.5")
    upstream.load("merged")
    assert calls == [(recipe, 0.5), (None, 0.25)]
    assert "did you mean" in complaint(str(tmp_path / "mien.yaml"))


def test_a_users_class(mine: Path) -> None:
    plain = upstream.load(f"{mine}:Mine")
    scaled = upstream.load(f"{mine}:Mine:scale=2,on=true")
    wavs, lens = torch.ones(1, 320), torch.tensor([320])
    assert plain(wavs, lens).layers.flatten().tolist() == [1, 1]
    assert scaled(wavs, lens).layers.flatten().tolist() == [0.5, 0.5]
    assert scaled.on is True
    assert plain.source == str(mine)


def test_a_users_edits_and_options_change_the_fingerprint(mine: Path) -> None:
    plain = upstream.load(f"{mine}:Mine").fingerprint()
    assert upstream.load(f"{mine}:Mine").fingerprint() == plain
    assert upstream.load(f"{mine}:Mine:scale=2").fingerprint() != plain
    mine.write_text(MINE.replace("* self.scale", "* self.scale + 1"))
    assert upstream.load(f"{mine}:Mine").fingerprint() != plain


def test_a_users_mistakes(mine: Path) -> None:
    assert "did you mean Mine?" in complaint(f"{mine}:Mime")
    assert "not a subclass" in complaint(f"{mine}:Other")
    assert "self.stride" in complaint(f"{mine}:Unfinished")
    assert "name the class" in complaint(str(mine))
    assert "did you mean scale?" in complaint(f"{mine}:Mine:scle=2")
    assert "not a number" in complaint(f"{mine}:Mine:scale=two")
    assert f"{mine}:11: ZeroDivisionError" in complaint(f"{mine}:Mine:scale=0")
    mine.write_text("x = 1\ny = (\n")
    assert f"{mine}:2: '(' was never closed" == complaint(f"{mine}:Mine")
    mine.write_text("x = 1\nimport nowhere_to_be_found\n")
    assert f"{mine}:2: ModuleNotFoundError" in complaint(f"{mine}:Mine")
    assert "did you mean" in complaint(f"{mine.with_name('min.py')}:Mine")


def test_the_demo_encoder_is_looked_for_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "PROJECT", Path("/nowhere"))
    assert "/nowhere/recipes/demo/hubert_demo" in complaint("hubert_demo")
