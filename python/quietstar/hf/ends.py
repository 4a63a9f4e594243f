"""Where a text ends. Training, generation, evaluation and saved models ask here, so that what one writes another waits for."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from quietstar.hf.modules import unwrapped


def end_ids(tokenizer: PreTrainedTokenizerBase | None, model: Any = None) -> list[int]:
    """Ids of the tokens that end a text: the tokenizer's end of text, which training writes, comes first.

    Others are those of the model's generation config, those of its config that the tokenizer calls special (a default such as
    2 may be a letter), and what ends an answer in the tokenizer's chat template.
    """
    found: list[int | None] = [] if tokenizer is None else [tokenizer.eos_token_id]
    if model is not None:
        found += _as_list(getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None))
    if tokenizer is not None:
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        own = [] if model is None else _as_list(getattr(model.config.get_text_config(), "eos_token_id", None))
        found += [token for token in [*own, _end_of_turn(tokenizer)] if token in special]
    return list(dict.fromkeys(token for token in found if token is not None))


def _as_list(token: Any) -> list[int]:
    return [] if token is None else list(token) if isinstance(token, (list, tuple)) else [token]


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token after an answer in the chat template."""
    if not tokenizer.chat_template:
        return None
    answer = "An answer."
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        _, found, rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    except Exception:  # a template is code, and may raise anything
        return None
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids else None


def stopping_at_ends(options: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, model: Any) -> dict[str, Any]:
    """Options of ``generate`` that stop at all ends, unless they say where to stop."""
    if tokenizer is None or "eos_token_id" in options:
        return options
    own, ends = unwrapped(model).generation_config, end_ids(tokenizer, model)
    config = options.get("generation_config")
    if config is None:
        return options | {"eos_token_id": ends or None}
    if config.eos_token_id not in (None, own.eos_token_id):
        return options
    return options | {"generation_config": _with_ends(config, ends)}


def aligned(tokenizer: PreTrainedTokenizerBase | None, model: Any) -> GenerationConfig | None:
    """The model's generation config with all ends, to save: other programs wait for no others."""
    config = getattr(unwrapped(model), "generation_config", None)
    return None if config is None else _with_ends(config, end_ids(tokenizer, model))


def _with_ends(config: GenerationConfig, ends: list[int]) -> GenerationConfig:
    config = copy.deepcopy(config)
    if set(ends) != set(_as_list(config.eos_token_id)):
        config.eos_token_id = ends
    return config
