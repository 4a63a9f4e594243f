"""Write docs/api.md from the docstrings of all public names.

python docs/api.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = ("quietstar", "quietstar_kernels", "quietstar_kernels.testing")
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
INTRODUCTION = """\
# API

All public names of both packages. [docs/api.py](api.py) generates this page from their docstrings. The letters in shapes are
explained in the [dimension key](#package-quietstar_kernels)."""
WIDTH = 100  # of a signature; a longer one gets one line per parameter


class Bare(str):
    """An annotation that is shown without quotes in a signature."""

    __repr__ = str.__str__


def page() -> str:
    modules = [importlib.import_module(name) for name in MODULES]
    contents = [line for module in modules for line in table_of_contents(module)]
    blocks = [block for module in modules for block in module_blocks(module)]
    return "\n\n".join([INTRODUCTION, "\n".join(contents), *blocks]) + "\n"


def table_of_contents(module: ModuleType) -> Iterator[str]:
    yield f"- {link(f'Package {module.__name__}')}"
    for name in module.__all__:
        thing = getattr(module, name)
        methods = [link(f"{name}.{method}", method) for method in public_methods(thing)] if inspect.isclass(thing) else []
        yield f"  - {': '.join([link(name), ', '.join(methods)] if methods else [link(name)])}"


def link(heading: str, text: str = "") -> str:
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{text or heading}](#{anchor})"


def module_blocks(module: ModuleType) -> Iterator[str]:
    yield f"## Package {module.__name__}"
    yield markdown(module.__doc__)
    for name in module.__all__:
        thing = getattr(module, name)
        yield f"### {name}"
        if inspect.isclass(thing):
            yield from class_blocks(thing)
        elif callable(thing):
            yield from (signature(name, thing), markdown(thing.__doc__))
        else:
            yield f"`{thing!r}`"


def class_blocks(cls: type) -> Iterator[str]:
    if not dataclasses.is_dataclass(cls):
        yield signature(cls.__name__, cls)
    yield markdown(cls.__doc__)
    options = [field for field in dataclasses.fields(cls) if field.metadata] if dataclasses.is_dataclass(cls) else []
    if options:
        fields = [f"- `{field.name}: {field.type} = {field.default!r}`: {prose(field.metadata['help'])}" for field in options]
        yield "\n".join(["Fields:", "", *fields])
    properties = {name: member for name, member in vars(cls).items() if isinstance(member, property)}
    described = [f"- `{name}`: {prose(member.__doc__)}" for name, member in properties.items() if member.__doc__]
    sizes = ", ".join(f"`{name}`" for name, member in properties.items() if not member.__doc__)
    if properties:
        yield "\n".join(["Properties:", "", *([f"- {sizes}"] if sizes else []), *described])
    for name, method in public_methods(cls).items():
        yield f"#### {cls.__name__}.{name}"
        yield signature(f"{cls.__name__}.{name}", method)
        yield markdown(method.__doc__)


def public_methods(cls: type) -> dict[str, Any]:
    """The methods that the class itself defines and documents. Class methods are bound to the class."""
    members = {name: getattr(cls, name) for name in vars(cls) if not name.startswith("_")}
    return {name: member for name, member in members.items() if inspect.isroutine(member) and member.__doc__}


def signature(name: str, function: Any) -> str:
    found = inspect.signature(function)
    kept = [p.replace(annotation=bare(p.annotation)) for p in found.parameters.values() if p.name != "self"]
    parameters = [str(p) for p in kept]
    kinds = [p.kind for p in kept]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = f" -> {found.return_annotation}" if found.return_annotation not in (found.empty, "None") else ""
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {p}," for p in parameters), f"){returns}"])
    return f"```python\n{line}\n```"


def bare(annotation: Any) -> Any:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def markdown(docstring: str) -> str:
    """A Google-style docstring: sections become lists, indented blocks stay code."""
    blocks = re.split(r"\n\n+(?!    )", inspect.cleandoc(docstring))
    return "\n\n".join(map(markdown_block, blocks))


def markdown_block(block: str) -> str:
    title, _, body = block.partition("\n")
    if title.rstrip(":") in SECTIONS and title.endswith(":"):
        return f"{title}\n\n{section(title, textwrap.dedent(body))}"
    if title.startswith("="):
        return f"```text\n{block}\n```"
    text, code, rest = block.partition("\n\n    ")
    return prose(text) + (f"\n\n```python\n{textwrap.dedent('    ' + rest)}\n```" if code else "")


def section(title: str, body: str) -> str:
    """Items of the form `name: text`, where an indented line continues the item; or a single text."""
    items = [" ".join(item.split()) for item in re.split(r"\n(?! )", body)]
    if title == "Returns:":
        return "- " + prose(" ".join(items))
    named = [re.fullmatch(r"([\w, ]+?): (.*)", item) for item in items]
    return "\n".join(f"- `{m[1]}`: {prose(m[2])}" if m else f"- {prose(item)}" for m, item in zip(named, items, strict=True))


def prose(text: str) -> str:
    """One paragraph, with everything escaped that Markdown would take for emphasis or a tag."""
    pieces = re.split(r"``(.*?)``", " ".join(text.split()))
    escaped = [re.sub(r"(?<! )\*|\*(?! )|<(?=\w)", r"\\\g<0>", piece) for piece in pieces[::2]]
    code = [f"`{piece}`" for piece in pieces[1::2]]
    return "".join(piece for pair in zip(escaped, [*code, ""], strict=True) for piece in pair)


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
