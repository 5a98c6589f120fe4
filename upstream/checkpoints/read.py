"""Checkpoints of every origin -> one canonical form under transformers' names.

Nothing here runs code from a file: pickles are read with torch's weights-only reader.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from upstream.base import SAMPLE_RATE
from upstream.checkpoints.containers import Container, open_container, read_json
from upstream.checkpoints.foreign import DEQUANTIZE
from upstream.checkpoints.tensor_files import guarded
from upstream.checkpoints.tensor_names import (
    HEADS,
    KERNEL,
    MASK,
    PRETRAINING,
    State,
    layer_normed,
    prefix_of,
    unwrapped,
)
from upstream.common.errors import UserError


class Checkpoint(NamedTuple):
    """An encoder's weights under transformers' names, and what is needed to run them.

    The tensors of one that was read are mapped files in their stored dtype: read when used.
    """

    family: str  # transformers' model_type
    config: dict[str, Any]  # transformers' config
    state: Mapping[str, Tensor]
    normalize: bool  # whether waveforms must have zero mean and unit variance
    source: str
    guesses: Mapping[str, str] = {}  # option -> why it was taken as it is, where no file says it


# What a file without transformers' config.json may say of its architecture: in the name of its
# model or of the upstream it was trained as. Then what only one family's tensors are called.
WORDS = {
    "wavlm": r"\bwavlm",
    "data2vec-audio": r"\bdata2vec",
    "unispeech-sat": r"\bunispeech[-_]?sat",
    "unispeech": r"\bunispeech(?![-_]?sat)",
    "hubert": r"dictionaries_symbols|\bhubert",
    "wav2vec2": r"\bwav2vec|\bxls",
}
STRUCTURE = {"wavlm": "gru_rel_pos_const", "data2vec-audio": r"pos_conv_embed\.layers\."}
TARGETS = {"hubert": "label_embs_concat", "wav2vec2": r"(quantizer|project_q)\."}  # of pre-training
CNN, LAYER = "feature_extractor.conv_layers.{}.conv.weight", "encoder.layers.{}."
STACK = "encoder.pos_conv_embed.layers.{}.conv.weight"  # data2vec's positional convolutions
HF = (".bin", ".safetensors")  # files of transformers, which describes them in config.json
STRIDES = (5, 2, 2, 2, 2, 2, 2)
PUBLISHED = (768, 1024, 1280, 1920)  # widths of Base, Large, XL and XLS-R 2B


def read(path: str | Path, family: str | None = None) -> Checkpoint:
    """Read an HF folder, or a file of any form that `container.open_container` knows.

    `family` has the last word between those whose tensors are alike. Raises UserError for a file
    that is no checkpoint, is damaged, is of another architecture or of another sampling rate, or
    would need code to be run.
    """
    path = Path(path)
    container = open_container(path)
    state = _needed(container.state)
    _require_encoder(state, str(path))
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or (path.suffix in HF and (folder / "config.json").is_file()):
        return _with_config(folder, container, state, family)
    family, guesses = _family(path, container, family)
    _require_rate(container.settings.get("sample_rate"), path)
    with guarded(path, "its settings cannot be read; save the encoder as an HF folder instead"):
        config = _config(family, state, container.settings, str(path))
        # fairseq's releases normalise exactly the models whose CNN has layer norms
        normalize = bool(container.settings.get("normalize", layer_normed(state)))
    if "normalize" not in container.settings:
        guesses |= _normalize_guess(normalize)
    return Checkpoint(family, config, state, normalize, str(path), guesses)


def _needed(state: State) -> State:
    """The encoder's own tensors; an embedding of masked frames only where it is one."""
    kept = {n: t for n, t in state.items() if not (PRETRAINING.match(n) or HEADS.match(n))}
    mask = kept.get(MASK)
    if mask is not None and not (mask.is_floating_point() and mask.isfinite().all()):
        del kept[MASK]
    return kept


def _family(path: Path, container: Container, asked: str | None) -> tuple[str, dict[str, str]]:
    """The family of a file without config.json, and how it was guessed if it was.

    What tensors must be there tells first, then what the file says of itself, then the targets of
    its pre-training. A prefix of its tensors' names (`hubert.`) is no more than what somebody
    called an attribute. Raises UserError if nothing tells.
    """
    if asked is not None:
        return asked, {}
    names = " ".join(container.slots)
    facts = [name for name, mark in STRUCTURE.items() if re.search(mark, names)]
    if not facts:
        facts = [] if "label_embs_concat" in names else _families(container.clue)
    if not facts:
        facts = [name for name, mark in TARGETS.items() if re.search(mark, names)]
    if len(facts) == 1:
        return facts[0], {}
    bare = [unwrapped(name) for name in container.tensors]
    prefix = prefix_of(bare, str(path)) or ""
    outside = " ".join(name for name in bare if not name.startswith(prefix))
    hints = _families(prefix.replace("_", "-"))
    hints += [name for name, mark in TARGETS.items() if re.search(mark, outside)]
    alike = {name for name in hints if name not in STRUCTURE}
    if not facts and len(alike) == 1:
        name = alike.pop()
        return name, {"family": f"{name}, as names of its tensors begin with {prefix!r:.60}"}
    raise UserError(
        f"{path}: does not say which model it is (HuBERT and wav2vec 2.0 have the same tensors); "
        f"write {path}:family=hubert or {path}:family=wav2vec2"
    )


def _families(text: str) -> list[str]:
    """The families that a text names."""
    return [name for name, mark in WORDS.items() if re.search(mark, text)]


def _normalize_guess(normalize: bool) -> dict[str, str]:
    norm = "layer norms" if normalize else "a group norm"
    return {"normalize": f"{str(normalize).lower()}, as its CNN has {norm}"}


def _require_rate(rate: Any, place: Path) -> None:
    """Raises UserError for a model of another sampling rate than all audio here has."""
    if rate is not None and rate != SAMPLE_RATE:
        raise UserError(
            f"{place}: the sampling rate of this model is {rate!r:.20} Hz, and upstreams here hear "
            f"{SAMPLE_RATE}; wrap it in a class of your own that resamples (see CONTRIBUTING), or "
            f"write {SAMPLE_RATE} there if that is what it was trained on"
        )


def _require_encoder(state: State, source: str) -> None:
    if CNN.format(0) in state:
        return
    names = ", ".join(name[:60] for name in list(state)[:3])
    fault = f"not a HuBERT, WavLM, wav2vec 2.0 or data2vec encoder; it holds {names} ..."
    if "feature_projection.projection.weight" in state and f"{KERNEL}1" in state:
        fault = "an encoder of filter banks (DeCoAR 2.0): merge it as a file, and "
        fault += f"run it as s3prl:decoar2_local:ckpt={source}"
    raise UserError(f"{source}: {fault}")


def _with_config(
    folder: Path, container: Container, state: State, family: str | None
) -> Checkpoint:
    """A checkpoint whose config.json lies beside it."""
    place = folder / "config.json"
    config = read_json(place)
    if config.get("quantization_config"):
        fault = "says quantization_config: its weights are codes, not numbers"
        raise UserError(f"{place}: {fault}; {DEQUANTIZE}; if they are numbers, delete that entry")
    guesses: dict[str, str] = {}
    if config.get("model_type") in [*STRUCTURE]:  # no other family has these tensors
        family = str(config["model_type"])
    elif "model_type" in config:
        family = family or str(config["model_type"])
    else:
        family, guesses = _family(folder, container, family)
    _require_sizes(config, state, family, str(folder))
    _require_rate(config.get("sampling_rate"), place)
    asked = None
    for name, settings in _audio_settings(folder):
        _require_rate(settings.get("sampling_rate"), folder / name)
        value = settings.get("do_normalize")
        if value is not None and value not in (True, False):
            raise UserError(
                f"{folder / name}: do_normalize must be true or false, not {value!r:.40}"
            )
        asked = value if asked is None else asked
    normalize = layer_normed(state) if asked is None else bool(asked)
    if asked is None:
        guesses |= _normalize_guess(normalize)
    return Checkpoint(family, config, state, normalize, str(folder), guesses)


# Files that say how audio is prepared, in the order in which transformers believes them: since its
# version 5 a processor keeps its feature extractor in its own file.
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
OTHER_SENSES = re.compile("image|video|vision|text|token|decoder", re.IGNORECASE)


def _audio_settings(folder: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(file, settings) of feature extractors beside a model, nested ones included."""
    for name in PROCESSORS:
        if not (folder / name).is_file():
            continue
        waiting = [read_json(folder / name)]
        for _ in range(50):  # parts of a processor; a file that has more is none
            if not waiting:
                break
            settings = waiting.pop(0)
            yield name, settings
            waiting += [
                value
                for key, value in settings.items()
                if isinstance(value, dict) and not OTHER_SENSES.search(key)
            ]


def _require_sizes(config: dict[str, Any], state: State, family: str, source: str) -> None:
    """Raises UserError, before anybody builds such a model, for sizes that no tensor has."""
    sizes = {size for tensor in state.values() for size in tensor.shape}
    counts, kernel = ["num_hidden_layers"], "num_conv_pos_embeddings"
    if family == "data2vec-audio":  # its positional convolutions: so many, of this kernel
        counts, kernel = [*counts, kernel], "conv_pos_kernel_size"
    for key in ("hidden_size", "intermediate_size", "conv_dim", "conv_kernel", kernel):
        asked = config.get(key)
        for size in asked if isinstance(asked, list) else [asked]:
            if isinstance(size, int) and size not in sizes:
                raise UserError(f"{source}: no tensor has the {key} of config.json ({size!r:.20})")
    for key in counts:
        if isinstance(config.get(key), int) and config[key] > len(state):
            raise UserError(f"{source}: {key} in config.json is more than its weights hold")


def compare(expected: Mapping[str, Tensor], weights: Checkpoint) -> None:
    """Raises UserError with the first differences of `weights` from the shapes `expected`."""
    due, shapes = (
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (expected, weights.state)
    )
    both = [name for name in due if name in shapes and shapes[name] != due[name]]
    faults = {
        "missing": [name for name in due if name not in shapes],
        "unexpected": [name for name in shapes if name not in due],
        "of another shape": [f"{name} is {shapes[name]} instead of {due[name]}" for name in both],
    }
    listed = [
        f"{len(names)} tensors {kind} ({'; '.join(names[:2])}{' ...' if len(names) > 2 else ''})"
        for kind, names in faults.items()
        if names
    ]
    if listed:
        raise UserError(f"{weights.source}: is not this {weights.family}: {', '.join(listed)}")


def _config(
    family: str, state: Mapping[str, Tensor], settings: dict[str, Any], source: str
) -> dict[str, Any]:
    """transformers' config: sizes from the tensors, the rest from fairseq's settings.

    Without settings (an s3prl run, bare weights), the conventions of all published models hold, if
    it has one's width: heads of 64, pre-norm exactly for CNNs with layer norms (data2vec: never).
    """
    try:
        sizes = _sizes(family, state)
    except KeyError as error:
        raise UserError(f"{source}: not a {family} encoder: no tensor {error.args[0]}") from error
    width, depth = sizes["hidden_size"], len(sizes["conv_dim"])
    if not settings and width not in PUBLISHED:
        raise UserError(f"{source}: holds no architecture; save the encoder as an HF folder")
    if (activation := settings.get("activation_fn", "gelu")) != "gelu":
        raise UserError(f"{source}: activation {activation!r:.40} is not supported (gelu)")
    strides = list(STRIDES[:depth])
    if layers := settings.get("conv_feature_layers"):
        strides = [stride for _, _, stride in _conv_layers(layers, source)]
    if len(strides) != depth:
        raise UserError(f"{source}: {depth} convolutions, settings of {len(strides)}")
    heads = int(settings.get("encoder_attention_heads", max(1, width // 64)))
    config: dict[str, Any] = {"conv_stride": strides, "num_attention_heads": heads}
    if family != "data2vec-audio":
        layered = layer_normed(state)
        if depth == 1 and "extractor_mode" in settings:  # its tensors do not tell
            layered = settings["extractor_mode"] == "layer_norm"
        config["feat_extract_norm"] = "layer" if layered else "group"
        config["do_stable_layer_norm"] = bool(settings.get("layer_norm_first", layered))
    if family == "wavlm":
        config["max_bucket_distance"] = int(settings.get("max_distance", 800))
    dropouts = {new: settings[old] for old, new in DROPOUTS.items() if old in settings}
    return {**config, **sizes, **dropouts}


DROPOUTS = {
    "dropout": "hidden_dropout", "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout", "dropout_input": "feat_proj_dropout",
}  # fmt: skip


def _sizes(family: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The part of the config that shapes tell. Raises KeyError for a tensor that is missing."""
    convs = [state[CNN.format(i)] for i in range(_count(state, CNN))]
    width = len(state["feature_projection.projection.bias"])
    sizes: dict[str, Any] = {
        "conv_dim": [conv.shape[0] for conv in convs],
        "conv_kernel": [conv.shape[2] for conv in convs],
        "conv_bias": CNN.format(0).replace("weight", "bias") in state,
        "hidden_size": width,
        "intermediate_size": len(state[f"{LAYER.format(0)}feed_forward.intermediate_dense.bias"]),
        "num_hidden_layers": _count(state, LAYER + "final_layer_norm.weight"),
    }
    kernel = state[STACK.format(0) if family == "data2vec-audio" else f"{KERNEL}1"]
    sizes["num_conv_pos_embeddings"] = kernel.shape[2]
    sizes["num_conv_pos_embedding_groups"] = width // kernel.shape[1]
    if family == "data2vec-audio":
        sizes["num_conv_pos_embeddings"] = _count(state, STACK)
        sizes["conv_pos_kernel_size"] = kernel.shape[2]
    if family == "wavlm":
        table = state[f"{LAYER.format(0)}attention.rel_attn_embed.weight"]
        sizes["num_buckets"], sizes["num_attention_heads"] = table.shape
    return sizes


def _count(state: Mapping[str, Tensor], template: str) -> int:
    """How many consecutive tensors `template` has, from 0."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    numbers = {int(match[1]) for name in state if (match := pattern.match(name))}
    return next(number for number in range(len(numbers) + 1) if number not in numbers)


def _conv_layers(text: Any, source: str) -> list[tuple[int, int, int]]:
    """fairseq's `[(512,10,5)] + [(512,3,2)] * 4`, read without evaluating it."""
    try:
        return [(int(c), int(k), int(s)) for c, k, s in literal(str(text)[:1000])]
    except Exception as error:  # each kind of nonsense has its own
        raise UserError(f"{source}: cannot read conv_feature_layers {str(text)[:80]!r}") from error


def literal(text: str) -> Any:
    """A Python literal, or a short sum and multiple of lists. Raises many kinds of Exception."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            rows, times = value(node.left), int(ast.literal_eval(node.right))
            if len(rows) * times > 100:
                raise ValueError("that is no CNN")
            return rows * times
        return ast.literal_eval(node)

    return value(ast.parse(text, mode="eval").body)
