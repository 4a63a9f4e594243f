"""docs/api.md holds what docs/api.py writes from the docstrings of today, and that is readable Markdown."""

import importlib
import inspect
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from quietstar import QuietStar
from tests.test_docs import blocks, slug
from tests.test_layers import MODULES, uses

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


def test_defaults_that_are_functions_have_names():
    def function(check=sample, log=lambda text: None):
        pass

    assert "function(check=sample, log=...)" in api["signature"]("function", function)


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
        assert f"\n### {api['heading'](module, public)}\n" in page
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


def imported(source):
    """(module, name) of what a piece of code takes from our packages."""
    for _, module, name in uses(source, ""):
        if module.split(".")[0] in ("quietstar", "quietstar_kernels") and name and f"{module}.{name}" not in MODULES:
            yield module, name


def test_what_the_docs_and_examples_import_is_on_the_page():
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    sources = {path: "\n".join(code for _, code in blocks(path, "python")) for path in pages if path.name != "api.md"}
    sources |= {path: path.read_text() for path in ROOT.glob("examples/**/*.py")}
    named = {(module, name, path.name) for path, source in sources.items() for module, name in imported(source)}
    assert len(named) > 50
    assert not {
        (module, name, path)
        for module, name, path in named
        if module not in api["MODULES"] or name not in importlib.import_module(module).__all__
    }


def test_every_link_of_the_contents_has_one_heading():
    page = (ROOT / "docs/api.md").read_text()
    anchors = Counter(slug(heading) for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE))
    links = re.findall(r"\(#([^)]+)\)", page)
    assert len(links) > 200
    assert {anchors[link] for link in links if link != "quietstar"} == {1}


def test_a_method_of_a_base_that_the_page_leaves_out_is_shown_with_the_class():
    methods = api["public_methods"](QuietStar)
    assert {"forward", "from_pretrained", "save_pretrained"} <= methods.keys()
    assert "state_dict" not in methods  # PyTorch's
