"""From a name to an upstream: every form, and one clear line for each mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import upstream
from upstream import resolve
from upstream.base import Upstream
from upstream.checkpoints.write import to_s3prl
from upstream.common import PROJECT
from upstream.common.errors import UserError
from upstream.encoder.encoder import Encoder
from upstream.resolve import UPSTREAMS, parse, split_specs

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
    assert "unknown key 'padding'" in complaint("fbank", padding="exact")
    assert "unknown key 'licence'" in complaint("hubert_base:licence=mine")
    assert "unknown key 'source'" in complaint(f"{folder}:source=x")


def test_wrong_names_and_paths(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path)
    assert "did you mean hubert_base?" in complaint("hubrt_base")
    assert f"did you mean {folder}?" in complaint(f"{folder}x")
    assert f"did you mean {folder}?" in complaint(f"{folder}x/deeper/model.pt")
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


def test_published_base_models_are_as_superb_scored_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """s3prl does not normalise waveforms for them, though transformers' files ask for it."""
    folder = tiny.hf_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(folder))

    def normalizes(spec: str) -> bool:
        encoder = upstream.load(spec)
        assert isinstance(encoder, Encoder)
        return encoder.normalize

    bases = ("hubert_base", "wav2vec2_base_960", "wavlm_base", "wavlm_base_plus")
    assert not any(normalizes(name) for name in bases)
    assert normalizes("hubert_base:normalize=true")
    assert normalizes("hubert_large_ll60k") and normalizes("data2vec_base")
    assert normalizes("hf:facebook/hubert-base-ls960")


def test_one_upstream_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny.hf_folder(tmp_path).relative_to(tmp_path)
    same = [f"{folder}", f"{folder}/", f"./{folder}", f"hf:{folder}", f"hf:./x/../{folder}/"]
    (tmp_path / "x").mkdir()
    assert {resolve.canonical(spec) for spec in same} == {str(folder)}
    options = ":padding=s3prl,normalize=true"
    assert resolve.canonical(f"hf:{folder}/{options}") == f"{folder}{options}"
    (tmp_path / "fbank").mkdir()
    assert resolve.canonical("fbank") == "fbank"
    assert resolve.canonical("./fbank") == resolve.canonical("hf:fbank/") == "./fbank"
    for other in ("hf:facebook/x", "s3prl:hubert", "mine.py:Mine", "hubert_base:padding=s3prl"):
        assert resolve.canonical(other) == other


def test_a_wrong_name_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys, merging, upstream\n"
        "from upstream.resolve import UPSTREAMS, require\n"
        "for spec in ('hubrt_base', 'hubert_base:pading=s3prl', 'nowhere/model.pt', 's3prl:hubrt',"
        " 'hubert_base:normalize=maybe', 'nowhere.py:Mine', 'nowhere.yaml', 'a\\0b', 'a\\udcff'):\n"
        "    try: upstream.load(spec)\n"
        "    except ValueError as error: assert str(error).isprintable(), error\n"
        "    else: sys.exit(spec)\n"
        "for name in UPSTREAMS: require(name)\n"
        "require('hf:facebook/x')\n"
        "heavy = {'torch', 'numpy', 's3prl', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pipes_are_no_files(tmp_path: Path) -> None:
    """Opening one for reading would wait for ever."""
    folder = tiny.hf_folder(tmp_path)
    for name in ("x.pt", "x.safetensors", "mine.py"):
        os.mkfifo(tmp_path / name)
    for spec in ("x.pt", "x.safetensors", "mine.py:Mine"):
        assert "is a pipe" in complaint(str(tmp_path / spec))
    for name in ("heard.txt", "config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        complaint(str(folder))


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
    assert "must be float" in complaint(f"{mine}:Mine:scale=two")
    assert f"{mine}:11: ZeroDivisionError" in complaint(f"{mine}:Mine:scale=0")
    mine.write_text("x = 1\ny = (\n")
    assert f"{mine}:2: '(' was never closed" == complaint(f"{mine}:Mine")
    mine.write_text("x = 1\nimport nowhere_to_be_found\n")
    assert f"{mine}:2: ModuleNotFoundError" in complaint(f"{mine}:Mine")
    assert "did you mean" in complaint(f"{mine.with_name('min.py')}:Mine")


def test_the_demo_encoder_is_looked_for_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "DATA", Path("/nowhere"))
    assert "/nowhere/recipes/demo/hubert_demo" in complaint("hubert_demo")
