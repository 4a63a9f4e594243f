"""Published checkpoints: an ordinary Mistral checkpoint whose weights hold the thought parts too, under their published names.

A checkpoint is loaded completely or not at all. The published code is ezelikman/quiet-star; its numbers are the defaults here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from quietstar.checkpoints.contents import Contents, check_finite, check_vocabulary, find, locate_tensors, read_tensors
from quietstar.checkpoints.pretrained import load_config, load_tokenizer, load_with_report, save_model
from quietstar.config import ThoughtConfig
from quietstar.files.reading import read_json
from quietstar.files.writing import replaced
from quietstar.hf.modules import embeddings

# Published name to the wrapper's; every other name belongs to the base model.
_HEAD = {f"talk_head.0.{name}": f"mixing_head.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")}
_EMBEDDINGS = ("start_embedding", "end_embedding")
NAMES = (*_HEAD, *_EMBEDDINGS)
EMBEDDING_SCALE = 100.0  # from the stored to the effective vector, a constant of the published code
START, END = "<|startthought|>", "<|endthought|>"
LOOKAHEAD = 4  # n_ahead_talk of the published training, where the checkpoint does not say
# What the published code must find in config.json to build the one kind of head that it trained.
_HEAD_KIND = {
    "merged_talk_heads": True,
    "merged_lm_and_talk_heads": False,
    "merged_lm_and_think_heads": True,
    "use_concat_talk_head": True,
    "use_shallow_think": True,
    "use_shallow_talk": False,
    "use_complex_think_head": False,
    "use_complex_talk_head": True,
    "use_weighted_talk_head": True,
}


@dataclass
class Published:
    """What config.json of a published checkpoint says about thoughts, if it does."""

    n_ahead_talk: int = LOOKAHEAD
    max_thoughts: int | None = None
    n_passes: int = 2


def is_published(path: str | os.PathLike) -> bool:
    """Whether a folder or hub name holds a model's weights and among them a published mixing head."""
    return any(name in NAMES for name in locate_tensors(path))


def load(path: str | os.PathLike, **kwargs: Any) -> Contents:
    """What a published checkpoint holds, under the wrapper's own names."""
    located = locate_tensors(path)
    absent = [name for name in NAMES if name not in located]
    if absent:
        raise ValueError(f"{path}: not a whole published checkpoint: missing {', '.join(absent)}")
    stored = read_tensors(path, located, NAMES)
    check_finite(path, "its weights", stored)
    for name in _EMBEDDINGS:
        if stored[name].ndim != 2:
            raise ValueError(f"{path}: {name} must have shape [2,D], got {list(stored[name].shape)}")
    check_vocabulary(path, located, load_config(path).get_text_config().vocab_size)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of unexpected tensors would list the thought parts
    try:
        model, info = load_with_report(path, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    _check_names(f"{path}: the weights do", model, info["missing_keys"], set(info["unexpected_keys"]) - set(NAMES))
    tokenizer = load_tokenizer(path) if find(path, "tokenizer_config.json") else None
    published = read_json(str(find(path, "config.json")), Published)
    tensors = _own_names(stored, EMBEDDING_SCALE, EMBEDDING_SCALE)
    return Contents(model, _thought_config(published, tokenizer), tokenizer, tensors)


def _thought_config(published: Published, tokenizer: PreTrainedTokenizerBase | None) -> ThoughtConfig:
    """The published n_ahead counts start, end and the text token too, and max_thoughts is n_ahead + n_ahead_talk + 1."""
    lookahead = published.n_ahead_talk
    ahead = (12 + lookahead + 1 if published.max_thoughts is None else published.max_thoughts) - lookahead - 1
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    return ThoughtConfig(
        thoughts=published.n_passes,
        thought_tokens=max(1, ahead - 3),
        lookahead=lookahead,
        start_token_id=vocabulary.get(START),
        end_token_id=vocabulary.get(END),
        embedding_scale=EMBEDDING_SCALE,
    )


def save(contents: Contents, directory: str | os.PathLike, max_shard_size: int | str) -> None:
    """See ``QuietStar.save_official``."""
    config, model = contents.config, contents.model
    if model.config.model_type != "mistral":
        raise ValueError(f"save_official: the published code knows Mistral models alone, this is a {model.config.model_type}")
    if config.mixing != "logits":
        raise ValueError(f"save_official: the published code mixes logits, this model was trained to mix {config.mixing}")
    if contents.base is not None:
        raise ValueError("save_official: the published code knows no adapters; qs.merge_adapters() folds them into the weights")
    if any(name.startswith("gate.") for name in contents.tensors):
        raise ValueError("save_official: the published code knows no gate; qs.use_config with another anchors drops it")
    ahead = config.thought_tokens + 3
    published = {
        **_HEAD_KIND,
        "max_thoughts": ahead + config.lookahead + 1,
        "n_ahead": ahead,
        "n_ahead_talk": config.lookahead,
        "n_passes": config.thoughts,
        # Names of the transformers version that the published code is a part of.
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    with replaced(directory) as beside:
        save_model(model, contents.tokenizer, beside, state_dict=state_dict(contents), max_shard_size=max_shard_size)
        file = Path(beside) / "config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text(encoding="utf-8")), **published}, indent=2, sort_keys=True) + "\n",
            encoding="utf-8",
        )


@torch.no_grad()
def state_dict(contents: Contents) -> dict[str, Tensor]:
    """Every tensor under its published name. Row 1 of the embeddings, which the published code doesn't use, is 0."""
    own = contents.tensors
    state = dict(contents.model.state_dict()) | {published: own[ours].detach() for published, ours in _HEAD.items()}
    for name in _EMBEDDINGS:
        stored = own[name] * (contents.config.embedding_scale / EMBEDDING_SCALE)
        state[name] = torch.stack([stored, torch.zeros_like(stored)])
    return state


def load_state_dict(contents: Contents, state: Mapping[str, Tensor], embedding_scale: float) -> None:
    """See ``QuietStar.load_official_state_dict``."""
    own, model = contents.tensors, contents.model
    targets = dict(model.state_dict()) | {name: own[name] for name in (*_HEAD.values(), *_EMBEDDINGS)}
    D = own["start_embedding"].shape[0]
    for name in _EMBEDDINGS:
        if name in state and (state[name].ndim != 2 or state[name].shape[1] != D):
            raise ValueError(f"official checkpoint: {name} must have shape [2,D]=[2, {D}], got {list(state[name].shape)}")
    source = _own_names(state, embedding_scale, contents.config.embedding_scale)
    published = {ours: name for name, ours in _HEAD.items()}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = {published.get(name, name) for name in set(targets) - set(source) - tied}
    _check_names("official checkpoint does", model, missing, set(source) - set(targets))

    embedding = list(embeddings(model).weight.shape)
    for name, tensor in source.items():
        want, got = list(targets[name].shape), list(tensor.shape)
        if want != got and want == embedding and want[1:] == got[1:]:
            raise ValueError(f"official checkpoint: {name} has a vocabulary of {got[0]} tokens, the model one of {want[0]}")
        if want != got:
            raise ValueError(f"official checkpoint: {published.get(name, name)} must have shape {want}, got {got}")
    with torch.no_grad():
        for name, tensor in source.items():
            targets[name].copy_(tensor)


def _own_names(state: Mapping[str, Tensor], scale: float, own_scale: float) -> dict[str, Tensor]:
    """Published tensors under the wrapper's names: fp32 thought parts, row 0 of the embeddings in the wrapper's scale."""
    own = {name: x for name, x in state.items() if name not in NAMES}
    own |= {ours: state[name].float() for name, ours in _HEAD.items() if name in state}
    return own | {name: state[name][0].float() * (scale / own_scale) for name in _EMBEDDINGS if name in state}


def _check_names(what: str, model: PreTrainedModel, missing: set[str], unknown: set[str]) -> None:
    parts = [f"{word} {', '.join(sorted(names)[:5])}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
    if parts:
        raise ValueError(f"{what} not fit {type(model).__name__}: {'; '.join(parts)}")
