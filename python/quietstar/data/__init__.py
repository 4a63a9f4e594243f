"""Texts and thoughts to train on, as the examples that ``run.batches`` makes batches of."""

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    if name in ("Data", "DataConfig", "json_lines", "load_data"):
        raise ImportError(f"quietstar.data.{name} is now quietstar.data.texts.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
