"""Any upstream of s3prl as an Upstream: `s3prl:fbank`, `s3prl:tera:ckpt=states-1000000.ckpt`.

`import s3prl.hub` fails on torchaudio >= 2.9, the single upstreams' modules import well: a name is
looked up in their sources and only the module that defines it is imported.

s3prl unpickles a checkpoint with whatever code it names, and evaluates some of its strings. So it
never sees a user's file: families that this project reads come from its own reader, others as a
copy of what the weights-only reader found, if no string in it could do anything when evaluated.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.common.packages import install_command, repair_command

if TYPE_CHECKING:
    from torch import nn

# s3prl's packages whose checkpoints are read here, and the family that they are.
READ_HERE = {name: name for name in ("hubert", "wavlm", "wav2vec2")}
READ_HERE |= {"data2vec": "data2vec-audio", "unispeech_sat": "hubert"}
# What an expression needs to call anything, or to grow without bound.
ACTIVE = re.compile(r"[(\[{*%]|<<")


def load(name: str, *, ckpt: Path | None = None, trust: bool = False) -> Any:  # an Upstream
    """The s3prl upstream `name`, with its own checkpoint or with the one given.

    `trust`: hand the file itself to s3prl, which runs whatever code is in it. Raises UserError for
    a name that is unknown or does not run, and a checkpoint that is dangerous or not that model's.
    """
    package, spec = package_of(name), f"s3prl:{name}:ckpt={ckpt}"
    if ckpt is not None:
        disk.require_file(ckpt)
    from upstream.checkpoints import tensor_files as files
    from upstream.encoder import encoder as encoders
    from upstream.s3prl_expert import wrapped

    if ckpt is None or trust:
        return wrapped(package, name, ckpt)
    if package in READ_HERE:  # the same model by our own reader and forward
        try:
            return encoders.load(ckpt, padding="s3prl", family=READ_HERE[package])
        except UserError as error:
            way = f"a file that you trust goes to s3prl's own code with {spec}:trust=true"
            raise UserError(f"{error} ({way})") from error
    content, _ = files.load(ckpt)
    _require_inert(content, spec)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "checkpoint.pt")
        files.save_torch(content, copy)
        upstream = wrapped(package, name, copy)
    _require_loaded(upstream.expert, content, spec)
    return upstream


def package_of(name: str) -> str:
    """The package of s3prl that defines a name of its hub. Raises UserError."""
    packages = _packages()
    if name not in packages:
        raise UserError(f"s3prl has no upstream {name!r}{near_miss(name, packages)}")
    return packages[name]


@cache
def _packages() -> dict[str, str]:
    """Every name of s3prl's hub and its package, found without importing any."""
    spec = importlib.util.find_spec("s3prl")
    if spec is None or spec.origin is None:
        raise UserError(
            f"an upstream s3prl:NAME needs s3prl, which is not installed: "
            f"{install_command('s3prl')} (or pip install espnet-s3prl)"
        )
    packages: dict[str, str] = {}
    for path in sorted(Path(spec.origin).parent.glob("upstream/*/hubconf.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                packages[node.name] = path.parent.name  # as there, the last of one name counts
    if not packages:
        raise UserError(
            f"s3prl is broken, none of its upstreams is there: {repair_command('s3prl')}"
        )
    return packages


def _require_inert(content: Any, spec: str) -> None:
    """Raises UserError for a string that does something when s3prl evaluates it: it does so with
    sizes (`conv_feature_layers` and others), and with a filter bank's name as a module's attribute.
    """
    from upstream.checkpoints.read import literal

    for _, leaf in _leaves(content):
        text = leaf.decode("latin-1") if isinstance(leaf, bytes) else leaf
        if not isinstance(text, str) or not ACTIVE.search(text):
            continue
        try:
            if not (_parses(text) or _parses(f"module.{text}")):
                continue
            literal(text)
        except Exception as error:  # each kind of nonsense has its own
            raise UserError(
                f"{spec}: s3prl would evaluate {text[:80]!r} from it, which is more than numbers; "
                f"add :trust=true if you trust the file with your account's rights"
            ) from error


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that is no container in what the weights-only reader returns, and the key it is under."""
    from torch import Tensor

    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(key)
            yield from _leaves(item, str(key))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _leaves(item, name)
    elif not isinstance(value, Tensor) and hasattr(value, "__dict__"):  # Namespace, Inert
        yield from _leaves(vars(value), name)
    else:
        yield name, value


def _parses(text: str) -> bool:
    """Whether eval() would get beyond the syntax; what cannot be told counts as yes."""
    try:
        ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return False
    except (MemoryError, RecursionError):
        pass
    return True


def _require_loaded(expert: nn.Module, content: Mapping[str, Any], spec: str) -> None:
    """Every parameter of the expert is in the file: some load with strict=False, without a word."""
    from torch import Tensor

    shapes: dict[str, set[Any]] = {}
    for name, leaf in _leaves(content):
        if isinstance(leaf, Tensor):
            shapes.setdefault(name, set()).add(leaf.shape)
    for name, parameter in expert.named_parameters():
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        if not any(parameter.shape in shapes.get(suffix, ()) for suffix in suffixes):
            raise UserError(f"{spec}: is of another model: no {name} in it; :trust=true ignores it")
