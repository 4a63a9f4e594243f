"""Checks of the wrapper's arguments, made once where they come in; those of a batch are in ``texts``."""

from __future__ import annotations

from transformers import PretrainedConfig

from quietstar.config import ThoughtConfig
from quietstar_kernels.checks import instance, number, seed_bits


def check_config(config: ThoughtConfig, vocabulary: int) -> ThoughtConfig:
    instance("config", config, ThoughtConfig)
    for name in ("start_token_id", "end_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"config: {name} must be from 0 to V-1={vocabulary - 1}, got {token}")
    return config


def check_seed(seed: int | None) -> int | None:
    return None if seed is None else seed_bits("seed", seed)


def check_think(name: str, think: str | float, *more: str) -> str | float:
    """ "always", "never", one of ``more``, or a number of nats."""
    words = ("always", "never", *more)
    if isinstance(think, str) and think in words:
        return think
    return number(name, think, f"{', '.join(map(repr, words))} or nats of entropy, 0 or more", least=0)


def pad_id(config: PretrainedConfig) -> int:
    """The config's pad id, else its end-of-text id, else 0; for places that no loss reads."""
    for token in (config.pad_token_id, config.eos_token_id):
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None and token >= 0:
            return token
    return 0
