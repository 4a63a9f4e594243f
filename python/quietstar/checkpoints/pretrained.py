"""Language models, tokenizers and configs that transformers loads: the one place that calls it, with safe options.

Where possible, a damaged file is found before transformers reads it, since that may raise anything.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from quietstar.checkpoints.contents import find, has_safetensors, locate_tensors
from quietstar.checkpoints.places import checkpoint_of, is_gguf
from quietstar.files.reading import check_regular, read_json, reason_of
from quietstar.hf.ends import aligned
from quietstar.hf.lm_head import note_tie
from quietstar.hf.modules import unmark_gguf

T = TypeVar("T")


@dataclass
class ConfigFile:
    """What config.json must be, whatever the architecture."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: int | None = None
    num_hidden_layers: int | None = None

    def __post_init__(self) -> None:
        if min(self.vocab_size or 0, self.num_hidden_layers or 0) < 0:
            raise ValueError("vocab_size and num_hidden_layers must be 0 or more")


@dataclass
class TokenizerConfig:
    """What tokenizer_config.json must be, whatever the tokenizer."""

    tokenizer_class: str | None = None
    model_max_length: float | None = None


JSON_FILES = {
    "config.json": ConfigFile,
    "generation_config.json": dict[str, Any],
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": dict[str, Any],
    "added_tokens.json": dict[str, int],
    "adapter_config.json": dict[str, Any],
}
MOST = 2**30  # bytes of a tokenizer's file, which is read whole


def loading(path: str | os.PathLike, what: str, function: Callable[[], T]) -> T:
    """What ``function`` returns. Raises ValueError, in one sentence, for the many ways in which transformers fails to load."""
    try:
        return function()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_gguf(path) and isinstance(error, ImportError):
            raise ValueError(f"{path}: loading it needs a package that is not installed: pip install gguf") from error
        kind = "file" if is_gguf(path) else "folder or hub name"
        raise ValueError(f"{path}: cannot load a {what} from this {kind}: {reason_of(error)}") from error


def load_config(path: str | os.PathLike) -> Any:
    """The config of a language model; names are those of ``checkpoint_of``. Raises ValueError if it can't be loaded."""
    return _load_described("config", AutoConfig, checkpoint_of(path))


def load_tokenizer(path: str | os.PathLike) -> Any:
    """A tokenizer. Raises ValueError if it can't be loaded."""
    return _load_described("tokenizer", AutoTokenizer, checkpoint_of(path))


def _load_described(what: str, kind: Any, path: str) -> Any:
    _check_files(path)
    where, file = _source(path)
    return loading(path, what, lambda: kind.from_pretrained(where, trust_remote_code=False, **file))


def load_model(path: str | os.PathLike, allow_bin: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A causal language model, all of whose weights are there.

    Args:
        allow_bin: take weights from pickle files where there are no safetensors; no code in them is run.
        kwargs: for ``AutoModelForCausalLM.from_pretrained``; dtype defaults to the saved one.
    """
    model, info = load_with_report(path, allow_bin, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path}: its weights lack {', '.join(missing[:3])} of a {type(model).__name__}")
    return model


def load_with_report(path: str | os.PathLike, allow_bin: bool = False, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As ``load_model``, with transformers' report of names that were missing or unexpected, which may be any."""
    path = checkpoint_of(path)
    if find(path, "adapter_config.json"):
        raise ValueError(f"{path}: it holds adapters, which need their base: merge them into it, or train new ones")
    config = load_config(path)
    if is_gguf(path) or not allow_bin or has_safetensors(path):
        tensors = _count_tensors(path) if is_gguf(path) else len(locate_tensors(path))
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        if layers > tensors:  # before as many are made
            raise ValueError(f"{path}: its config says {layers} layers, its weights are {tensors} tensors")
    options = {"dtype": "auto", "use_safetensors": None if allow_bin else True, "trust_remote_code": False, **kwargs}
    where, file = _source(path)
    if file:
        # The config takes seconds to read.
        options |= {**file, "config": config, "quantization_config": GgufConfig(dequantize=True)}
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = loading(path, "model", lambda: load(where, output_loading_info=True, **options))
    if file:
        unmark_gguf(model)
        model.name_or_path = model.config.name_or_path = path
    return model, report


def save_model(model: Any, tokenizer: Any, folder: str | os.PathLike, **options: Any) -> None:
    """Write a language model with its tokenizer, if there is one. ``generate`` of what is loaded stops at the same ends.

    Args:
        options: for the model's ``save_pretrained``.
    """
    note_tie(model)
    model.save_pretrained(folder, **options)
    if model.can_generate() and (config := aligned(tokenizer, model)) is not None:
        config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    with _edited(folder, "config.json") as description:
        for part in (description, description.get("text_config") or {}):
            _add_older_names(part)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write a tokenizer, if there is one, under names that transformers 4 knows too."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    with _edited(folder, "tokenizer_config.json") as config:
        if config.get("tokenizer_class") == "TokenizersBackend":
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")


def _add_older_names(config: dict[str, Any]) -> None:
    """Rotary embeddings under the names that transformers 4 and mlx-lm read; a Llama without them has a base of 10,000 there.

    A config whose kinds of layer have their own stays as it is: transformers 5 would take the names for all kinds.
    """
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope


@contextmanager
def _edited(folder: str | os.PathLike, name: str) -> Iterator[dict[str, Any]]:
    path = Path(folder) / name
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # mistral-common writes none
    yield values
    if values:
        path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _source(path: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes: a folder or hub name and, for a GGUF file, which file of it."""
    if not is_gguf(path):
        return path, {}
    folder, file = os.path.split(path)
    return folder or os.curdir, {"gguf_file": file}


def _count_tensors(path: str) -> int:
    """How many tensors the header of a GGUF file names."""
    folder, file = os.path.split(path)
    with open(find(folder or os.curdir, file) or path, "rb") as opened:
        header = opened.read(16)
    return struct.unpack("<Q", header[8:])[0] if len(header) == 16 else 0


def _check_files(path: str | os.PathLike) -> None:
    if not os.path.isdir(path):
        return
    ggufs = sorted(Path(path).glob("*.gguf"))
    if ggufs and not (Path(path) / "config.json").exists():
        raise ValueError(f"{path}: it holds a model as a GGUF file: name the file, {ggufs[0]}")
    for file in Path(path).iterdir():
        if file.name in JSON_FILES:
            read_json(file, JSON_FILES[file.name])
        elif file.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"):
            size = check_regular(file)
            if file.suffix != ".safetensors" and size > MOST:
                raise ValueError(f"{file}: {size:,} bytes are too many for a tokenizer's file, {MOST:,} are the most")
