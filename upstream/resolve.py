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

torch is imported once a name is known to be right: a wrong one is told at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upstream.common import DATA, schema, shipped, user_code
from upstream.common.errors import UserError
from upstream.common.packages import require_package
from upstream.common.registry import Registry
from upstream.encoder.config import Padding, Precision

if TYPE_CHECKING:
    from upstream.base import Upstream

Loader = Callable[..., "Upstream"]
UPSTREAMS: Registry[Loader] = Registry("upstream")

RECIPES = (".yaml", ".yml")
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", *RECIPES)
OPTION = re.compile(r"[:,](?=[A-Za-z_]\w*=)")  # a colon or comma is part of a path otherwise


class Published(NamedTuple):
    """A model of the Hugging Face hub."""

    repository: str
    normalize: bool | None = None  # waveforms; None: as its files ask for
    about: str = ""


# `normalize` is as SUPERB scored them (s3prl): the files of some Base models ask for it as well.
PUBLISHED = {
    "hubert_base": Published("facebook/hubert-base-ls960", False, "HuBERT Base, 960 h"),
    "hubert_large_ll60k": Published("facebook/hubert-large-ll60k", True, "HuBERT Large, 60k h"),
    "wav2vec2_base_960": Published("facebook/wav2vec2-base", False, "wav2vec 2.0 Base, 960 h"),
    "wav2vec2_large_ll60k": Published(
        "facebook/wav2vec2-large-lv60", True, "wav2vec 2.0 Large, 60k h"
    ),
    "wavlm_base": Published("microsoft/wavlm-base", False, "WavLM Base, 960 h"),
    "wavlm_base_plus": Published("microsoft/wavlm-base-plus", False, "WavLM Base+, 94k h"),
    "wavlm_large": Published("microsoft/wavlm-large", True, "WavLM Large, 94k h"),
    "data2vec_base": Published("facebook/data2vec-audio-base", True, "data2vec Base, 960 h"),
    "data2vec_large": Published("facebook/data2vec-audio-large", True, "data2vec Large, 60k h"),
}
LICENCES = {"facebook": "Apache-2.0", "microsoft": "CC-BY-SA-3.0"}  # of the models above


def load(spec: str, **options: Any) -> Upstream:
    """The upstream that `spec` names, in eval mode; keyword options win over its own. UserError."""
    loader, arguments = call(spec, **options)
    return loader(**arguments).eval()


def call(spec: str, **options: Any) -> tuple[Loader, dict[str, Any]]:
    """The loader that `spec` names and its arguments, typed as it wants them. UserError."""
    name, texts = parse(spec)
    loader, fixed = _loader(name)
    return loader, fixed | schema.bind(loader, {**texts, **options}, name, fixed, _typed)


def require(spec: str) -> None:
    """Raise what `load` would for a name that does not exist, at once: loads and runs nothing."""
    name, _ = parse(spec)
    if name not in UPSTREAMS:
        _loader(name)


def ready(spec: str, **options: Any) -> None:
    """Raise what `load` would for a name or an option, before hours of work; loads no weights.

    A model of the hub is fetched, as `load` would.
    """
    _, arguments = call(spec, **options)
    source = arguments.get("source")
    if isinstance(source, Published):
        _download(source.repository)


def canonical(spec: str) -> str:
    """One spelling for each: `hf:folder/` is `folder`; a folder named like a row keeps its `./`."""
    name, _ = parse(spec)
    place = str(shipped(Path(name.removeprefix("hf:"))))
    if name in UPSTREAMS or not Path(place).exists():
        return spec.strip()
    path = os.path.normpath(place)
    prefix = "./" if path in UPSTREAMS else ""
    return prefix + path + spec.strip()[len(name) :]


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """`"hubert_base:padding=s3prl"` -> `("hubert_base", {"padding": "s3prl"})`."""
    name, *parts = OPTION.split(spec.strip())
    options: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key in options:
            raise UserError(f"{spec}: {key} is given twice")
        options[key] = value
    if not name or not spec.isprintable():
        raise UserError(f"{spec!r}: not an upstream; write NAME, or NAME:OPTION=VALUE, as text")
    return name, options


def beside(spec: str, folder: Path) -> str:
    """A recipe of a merge that lies in `folder` as a path to it; any other name as it is."""
    name, _ = parse(spec)
    here = name.endswith(RECIPES) and (folder / name).is_file()
    return canonical(str(folder / spec.strip())) if here else spec


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
    """A name without options -> its loader, and the arguments that the name itself fixes."""
    if user := user_code.NAME.fullmatch(name):
        path = _existing(Path(user[1]))
        from upstream.user_class import loader_of

        return loader_of(path, user[2]), {}
    if name in UPSTREAMS:
        loader = UPSTREAMS[name]
        return (loader.func, loader.keywords) if isinstance(loader, partial) else (loader, {})
    if name.startswith("hf:"):
        return _encoder, {"source": Published(name[3:]), "family": None}
    if name.startswith("s3prl:"):
        from upstream import s3prl

        s3prl.package_of(name[6:])  # raises for an unknown one
        return s3prl.load, {"name": name[6:]}
    path = Path(name)
    if path.suffix not in FILES and "/" not in name and not path.exists():
        return UPSTREAMS[name], {}  # raises, with the near match
    if path.suffix == ".py":
        raise UserError(f"{name}: name the class as well: {name}:MyUpstream")
    # before the loader, which needs torch
    fixed = {"recipe" if path.suffix in RECIPES else "source": _existing(path)}
    return UPSTREAMS["merged"] if "recipe" in fixed else _encoder, fixed


def _typed(value: Any, hint: Any, where: str) -> Any:
    return schema.parse(value, hint, where) if isinstance(value, str) else value


def _existing(path: Path) -> Path:
    """`path`, or a UserError with the nearest name that is there."""
    if path.exists():
        return path
    parent = next(folder for folder in path.parents if folder.exists())
    missing = path.relative_to(parent).parts[0]
    names = os.listdir(parent) if parent.is_dir() else []
    close = difflib.get_close_matches(missing, names, n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else ""
    raise UserError(f"{path}: {missing} is not in {parent.resolve()}{hint}")


def _encoder(
    source: Path | Published,
    *,
    normalize: bool | None = None,
    padding: Padding = "exact",
    precision: Precision = "float32",
    family: str | None = None,
) -> Any:  # an Upstream: hints are read, and must not need torch
    """An encoder from a checkpoint here, or from the hub (downloaded once, then cached)."""
    from upstream.encoder import encoder as encoders

    options: Any = {"padding": padding, "precision": precision, "family": family}
    if isinstance(source, Path):
        return encoders.load(source, normalize=normalize, **options)
    repository, published, about = source
    normalize = published if normalize is None else normalize
    name = f"hf:{repository}"
    encoder = encoders.load(_download(repository), normalize=normalize, name=name, **options)
    encoder.source = repository
    if about:
        encoder.licence = LICENCES[repository.split("/")[0]]
    return encoder


def _download(repo: str) -> Path:
    if Path(repo).exists():
        return Path(repo)
    hub, errors = map(require_package, ("huggingface_hub", "huggingface_hub.errors"))
    try:
        folder = Path(hub.snapshot_download(repo, allow_patterns=["*.json", "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            hub.snapshot_download(repo, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise UserError(f"hf:{repo}: neither a folder here nor a model on the hub") from error
    except Exception as error:  # no network, proxy, time-out, disk: each client has its own
        raise UserError(
            f"hf:{repo}: the Hugging Face hub cannot be reached ({type(error).__name__}) and the "
            f"model is not in its cache; give a local copy instead: --upstream hf:FOLDER"
        ) from error


def _demo(
    *,
    normalize: bool | None = None,
    padding: Padding = "exact",
    precision: Precision = "float32",
) -> Any:
    """The small HuBERT that ships with this project, or that of $HUBERT_DEMO (--from-scratch)."""
    folder = Path(os.environ.get("HUBERT_DEMO", DATA / "recipes" / "demo" / "hubert_demo"))
    if not folder.exists():
        raise UserError(f"hubert_demo: {folder} is not there; take it from a fresh clone")
    return _encoder(folder, normalize=normalize, padding=padding, precision=precision)


for _name, _published in PUBLISHED.items():
    UPSTREAMS.add(_name, partial(_encoder, source=_published, family=None), _published.about)
UPSTREAMS.add("hubert_demo", _demo, "a small HuBERT that ships with this project")
UPSTREAMS.add("fbank", "upstream.fbank:Fbank", "80 log mel energies and deltas, CMVN")
UPSTREAMS.add("fbank_no_cmvn", "upstream.fbank:no_cmvn", "the same without CMVN, for SID and ER")
