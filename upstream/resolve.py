"""From a name to an Upstream.

| form | what |
|---|---|
| `hubert_base`, `fbank`, `merged` | a row of the registry |
| `hf:<repo or folder>` | an encoder in transformers' format |
| `s3prl:<name>` | an upstream of s3prl |
| `model.pt`, a folder | a checkpoint of s3prl, fairseq, WavLM or transformers |
| `mine.py:Mine` | your own subclass of Upstream |
| `merged.yaml` | a recipe of a merged upstream |

Each may be followed by options: `hubert_base:padding=s3prl:normalize=false`.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from upstream.base import UPSTREAMS, Loader, Padding, Precision, Upstream
from upstream.common import PROJECT
from upstream.common.errors import UserError, near_miss

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
RECIPES = (".yaml", ".yml")
OPTION = re.compile(r"[:,](?=[A-Za-z_]\w*=)")  # a colon or comma is part of a path otherwise

# name: (repository on the Hugging Face hub, licence, what it is)
HUB = {
    "hubert_base": ("facebook/hubert-base-ls960", "Apache-2.0", "HuBERT Base, LibriSpeech 960 h"),
    "hubert_large_ll60k": ("facebook/hubert-large-ll60k", "Apache-2.0", "HuBERT Large, 60k h"),
    "wav2vec2_base_960": ("facebook/wav2vec2-base", "Apache-2.0", "wav2vec 2.0 Base, 960 h"),
    "wav2vec2_large_ll60k": (
        "facebook/wav2vec2-large-lv60",
        "Apache-2.0",
        "wav2vec 2.0 Large, 60k h",
    ),
    "wavlm_base": ("microsoft/wavlm-base", "CC-BY-SA-3.0", "WavLM Base, 960 h"),
    "wavlm_base_plus": ("microsoft/wavlm-base-plus", "CC-BY-SA-3.0", "WavLM Base+, 94k h"),
    "wavlm_large": ("microsoft/wavlm-large", "CC-BY-SA-3.0", "WavLM Large, 94k h"),
    "data2vec_base": ("facebook/data2vec-audio-base", "Apache-2.0", "data2vec Base, 960 h"),
    "data2vec_large": ("facebook/data2vec-audio-large", "Apache-2.0", "data2vec Large, 60k h"),
}


def load(spec: str, **options: Any) -> Upstream:
    """The upstream that `spec` names, in eval mode; keyword options win over those in `spec`.

    Raises UserError, in one line with the near match, for whatever is wrong in `spec`.
    """
    loader, arguments = call(spec, **options)
    return loader(**arguments).eval()


def call(spec: str, **options: Any) -> tuple[Loader, dict[str, Any]]:
    """The loader that `spec` names and its arguments, typed as it wants them. UserError."""
    name, texts = parse(spec)
    loader, given = _loader(name)
    return loader, {**given, **_typed(name, loader, given, texts, options)}


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """`"hubert_base:padding=s3prl"` -> `("hubert_base", {"padding": "s3prl"})`."""
    name, *parts = OPTION.split(spec.strip())
    options: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key in options:
            raise UserError(f"{spec}: {key} is given twice")
        options[key] = value
    if not name:
        raise UserError(f"{spec!r}: an upstream's name comes before its options")
    return name, options


def split_specs(text: str) -> list[str]:
    """`"a,b:alpha=0.5,padding=s3prl,c"` -> `["a", "b:alpha=0.5,padding=s3prl", "c"]`."""
    specs: list[str] = []
    for piece in text.split(","):
        if re.match(r"\s*[A-Za-z_]\w*=", piece) and specs:
            specs[-1] += f",{piece.strip()}"
        elif piece.strip():
            specs.append(piece.strip())
        else:
            raise UserError(f"{text!r}: an empty name between commas")
    return specs


def _loader(name: str) -> tuple[Loader, dict[str, Any]]:
    """A name without options -> its loader and the argument that the name itself is."""
    if name in UPSTREAMS:
        return UPSTREAMS[name], {}
    if name.startswith("hf:"):
        return _hub, {"repo": name[3:]}
    if name.startswith("s3prl:"):
        from upstream import s3prl

        return s3prl.load, {"name": name[6:]}
    if user := re.fullmatch(r"(.+\.py):(\w+)", name):
        return _user_class(Path(user[1]), user[2]), {}
    path = Path(name)
    if path.suffix in RECIPES:
        return UPSTREAMS["merged"], {"recipe": _existing(path)}
    if path.suffix in CHECKPOINTS or "/" in name or path.exists():
        if path.suffix == ".py":
            raise UserError(f"{name}: name the class as well: {name}:MyUpstream")
        from upstream.encoder import encoder as encoders

        return encoders.load, {"path": _existing(path)}
    return UPSTREAMS[name], {}  # raises, with the near match


def _typed(
    name: str, loader: Loader, given: dict[str, Any], texts: dict[str, str], typed: dict[str, Any]
) -> dict[str, Any]:
    """The options for `loader`: its signature says which there are and of what type."""
    made = inspect.unwrap(loader)
    try:
        init = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
        hints, parameters = get_type_hints(init), inspect.signature(made).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"{name}: its options' types cannot be read ({error})") from error
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {key: value for key, value in parameters.items() if value.kind not in loose}
    options: dict[str, Any] = {}
    for key in texts | typed:
        if key not in known or key in given:
            hint = near_miss(key, known.keys() - given) or "; it has none"
            raise UserError(f"{name} has no option {key!r}{hint}")
        default = known[key].default
        guess = str if default in (None, inspect.Parameter.empty) else type(default)
        hint = hints.get(key, guess)
        options[key] = typed[key] if key in typed else _convert(f"{name}:{key}", texts[key], hint)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options | given:
            raise UserError(f"{name} needs {key}: write {name}:{key}=...")
    return options


def _convert(place: str, text: str, hint: Any) -> Any:
    """`text` as the type `hint`: bool, int, float, str, Path, Literal, or one of these or None."""
    kinds = get_args(hint) if get_origin(hint) is not Literal else ()
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in [kind for kind in kinds if kind is not type(None)] or [hint]:
        if get_origin(kind) is Literal:
            if text in get_args(kind):
                return text
            raise UserError(f"{place}={text}: not one of {', '.join(get_args(kind))}")
        if kind is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            raise UserError(f"{place}={text}: true or false")
        if kind in (int, float, str, Path):
            try:
                return kind(text)
            except ValueError as error:
                raise UserError(f"{place}={text}: not a number ({kind.__name__})") from error
    raise UserError(f"{place}: cannot be given on the command line; load it from Python")


def _existing(path: Path) -> Path:
    """`path`, or a UserError with the nearest name that is there."""
    if path.exists():
        return path
    parent = next(folder for folder in path.parents if folder.exists())
    missing = path.relative_to(parent).parts[0]
    close = difflib.get_close_matches(missing, [item.name for item in parent.iterdir()], n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else ""
    raise UserError(f"{path}: {missing} is not in {parent.resolve()}{hint}")


def _hub(
    repo: str,
    *,
    normalize: bool | None = None,
    padding: Padding = "exact",
    precision: Precision = "float32",
) -> Upstream:
    """An encoder of the Hugging Face hub (downloaded once, then cached), or a local folder."""
    from upstream.encoder import encoder as encoders

    folder = Path(repo)
    if not folder.exists():
        folder = _download(repo)
    how: dict[str, Any] = {"normalize": normalize, "padding": padding, "precision": precision}
    encoder = encoders.load(folder, **how)
    encoder.source = repo
    return encoder


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=["*.json", "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=["pytorch_model*.bin"]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(f"hf:{repo}: neither a folder here nor a model on the hub") from error
    except Exception as error:  # no network, proxy, time-out, disk: each client has its own
        raise UserError(
            f"hf:{repo}: the Hugging Face hub cannot be reached ({type(error).__name__}) and the "
            f"model is not in its cache; give a local copy instead: --upstream hf:FOLDER"
        ) from error
    return folder


def _registered(repo: str, licence: str) -> Loader:
    def loader(
        *,
        normalize: bool | None = None,
        padding: Padding = "exact",
        precision: Precision = "float32",
    ) -> Upstream:
        encoder = _hub(repo, normalize=normalize, padding=padding, precision=precision)
        encoder.licence = licence
        return encoder

    return loader


def _demo(
    *,
    normalize: bool | None = None,
    padding: Padding = "exact",
    precision: Precision = "float32",
) -> Upstream:
    """The small HuBERT that ships with this project; $HUBERT_DEMO may name another folder.

    `benchmark.py --from-scratch` sets it to the encoder that it pre-trains anew.
    """
    folder = Path(os.environ.get("HUBERT_DEMO", PROJECT / "recipes" / "demo" / "hubert_demo"))
    if not folder.exists():
        raise UserError(f"hubert_demo: {folder} is not there; take it from a fresh clone")
    from upstream.encoder import encoder as encoders

    return encoders.load(folder, normalize=normalize, padding=padding, precision=precision)


for _name, (_repo, _licence, _about) in HUB.items():
    UPSTREAMS.add(_name, _registered(_repo, _licence), _about)
UPSTREAMS.add("hubert_demo", _demo, "a small HuBERT that ships with this project")
UPSTREAMS.add("fbank", "upstream.fbank:Fbank", "80 log mel energies and deltas, CMVN")
UPSTREAMS.add("fbank_no_cmvn", "upstream.fbank:no_cmvn", "the same without CMVN, for SID and ER")


def _user_class(path: Path, name: str) -> Loader:
    """The class `name` of the user's file, a subclass of Upstream. Runs the file."""
    _existing(path)
    module_name = f"user_{path.stem}"
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # inspect.getsource, for the fingerprint, looks here
    _in_user_code(path, lambda: found.loader.exec_module(module))  # type: ignore[union-attr]
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Upstream) and value is not Upstream
    }
    if name not in classes:
        if hasattr(module, name):
            raise UserError(f"{path}:{name} is not a subclass of upstream.base.Upstream")
        raise UserError(f"{path} has no upstream {name}{near_miss(name, classes)}")
    made = classes[name]

    def construct(**options: Any) -> Upstream:
        built: Upstream = _in_user_code(path, lambda: made(**options))
        for field in ("num_layers", "dim", "stride"):
            if not isinstance(getattr(built, field, None), int):
                raise UserError(f"{path}:{name} must set self.{field} to a whole number")
        built.source, built.options = built.source or str(path), options
        return built

    construct.__wrapped__ = made  # type: ignore[attr-defined]  # its signature names the options
    return construct


def _in_user_code(path: Path, act: Callable[[], Any]) -> Any:
    """Run a piece of the user's file; what goes wrong there is one line with its place."""
    try:
        return act()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
        place = f"{path}:{own[-1]}" if own else str(path)
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error
