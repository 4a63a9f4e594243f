"""docs/api.md holds what docs/api.py writes from the docstrings of today, and that is readable Markdown."""

import importlib
import inspect
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
api = runpy.run_path(str(ROOT / "docs/api.py"))


def sample(layout: int, scale: "float | None" = None, *, mode: str = "all") -> "tuple[int, int]":
    """Adds ``k * 2`` to p*N, for S <T>.

    More of
    it.

        x = sample(1)

        sample(x)

    Args:
        layout: who sees
            whom.
        scale, mode: as in ``other``.

    Returns:
        The sum, [B,L],
        and more.

    Raises:
        ValueError: always.

    Other words.
    """


def test_page_is_current():
    assert (ROOT / "docs/api.md").read_text() == api["page"](), "docs/api.md is stale: run `python docs/api.py`"


def test_docstring_becomes_markdown():
    assert api["markdown"](sample.__doc__) == (
        "Adds `k * 2` to p\\*N, for S \\<T>.\n\nMore of it.\n\n```python\nx = sample(1)\n\nsample(x)\n```\n\n"
        "Args:\n\n- `layout`: who sees whom.\n- `scale, mode`: as in `other`.\n\n"
        "Returns:\n\n- The sum, [B,L], and more.\n\nRaises:\n\n- `ValueError`: always.\n\nOther words."
    )


def test_signature(monkeypatch):
    short = "sample(layout: int, scale: float | None = None, *, mode: str = 'all') -> tuple[int, int]"
    assert api["signature"]("sample", sample) == f"```python\n{short}\n```"
    monkeypatch.setitem(api["signature"].__globals__, "WIDTH", 40)
    long = "sample(\n    layout: int,\n    scale: float | None = None,\n    *,\n    mode: str = 'all',\n) -> tuple[int, int]"
    assert api["signature"]("sample", sample) == f"```python\n{long}\n```"


@pytest.mark.parametrize("name", api["MODULES"])
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    page = (ROOT / "docs/api.md").read_text()
    for public in module.__all__:
        thing = getattr(module, public)
        assert f"\n### {public}\n" in page
        if callable(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"
