"""Write docs/api.md from the docstrings of all public names.

python docs/api.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

PARTS = {
    "": ("quietstar",),
    "Training": (
        "quietstar.config",
        "quietstar.train",
        "quietstar.trainer",
        "quietstar.shared_prompt",
        "quietstar.hf.completions",
        "quietstar.objective",
        "quietstar.run.batches",
        "quietstar.run.signals",
        "quietstar.data.texts",
        "quietstar.data.held_out",
        "quietstar.data.thoughts",
        "quietstar.memory.step",
        "quietstar.memory.processes",
    ),
    "Evaluation": (
        "quietstar.evaluation.losses",
        "quietstar.evaluation.gain",
        "quietstar.evaluation.controls",
        "quietstar.evaluation.control_thoughts",
        "quietstar.evaluation.difficulty",
        "quietstar.evaluation.anchor_choices",
        "quietstar.evaluation.intervals",
        "quietstar.evaluation.scoring",
        "quietstar.evaluation.questions.asking",
        "quietstar.evaluation.questions.reading",
    ),
    "Recipes": (
        "quietstar.recipes.tasks",
        "quietstar.recipes.star",
        "quietstar.recipes.vstar",
        "quietstar.recipes.vstar_verifier",
        "quietstar.recipes.solve",
        "quietstar.recipes.solve_values",
        "quietstar.recipes.solve_search",
        "quietstar.recipes.internalize",
        "quietstar.recipes.internalize_kd",
        "quietstar.recipes.score",
        "quietstar.recipes.score_baselines",
        "quietstar.recipes.fast",
        "quietstar.recipes.common.models",
        "quietstar.recipes.common.sampling",
        "quietstar.recipes.common.sft",
        "quietstar.recipes.common.evaluation",
        "quietstar.recipes.common.selectors",
    ),
    "Files": ("quietstar.files.reading", "quietstar.files.writing", "quietstar.files.pictures"),
    "Kernels": ("quietstar_kernels", "quietstar_kernels.testing"),
}
PACKAGES = ("quietstar", "quietstar_kernels", "quietstar_kernels.testing")  # their names are headings as they are
MODULES = [module for part in PARTS.values() for module in part]
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
INTRODUCTION = """\
# API

All public names of both packages, and of the modules that the docs and examples import. [docs/api.py](api.py) generates this
page from their docstrings. The letters in shapes are explained in the [dimension key](#package-quietstar_kernels)."""
WIDTH = 100  # of a signature; a longer one gets one line per parameter


class Bare(str):
    """An annotation that is shown without quotes in a signature."""

    __repr__ = str.__str__


def page() -> str:
    contents = [line for part, names in PARTS.items() for line in table_of_contents(part, names)]
    blocks = [block for name in MODULES for block in module_blocks(importlib.import_module(name))]
    return "\n\n".join([INTRODUCTION, "\n".join(contents), *blocks]) + "\n"


def table_of_contents(part: str, modules: Iterable[str]) -> Iterator[str]:
    """A line per name of a package, and per module of the others."""
    if part:
        yield f"- {part}"
    indent = "  " if part else ""
    for module in map(importlib.import_module, modules):
        names = {name: link(heading(module, name), name) for name in module.__all__}
        if module.__name__ not in PACKAGES:
            yield f"{indent}- {link(title(module), module.__name__)}: {', '.join(names.values())}"
            continue
        yield f"{indent}- {link(title(module))}"
        for name, to_name in names.items():
            thing = getattr(module, name)
            methods = [link(f"{name}.{method}", method) for method in public_methods(thing)] if inspect.isclass(thing) else []
            yield f"{indent}  - {': '.join([to_name, ', '.join(methods)] if methods else [to_name])}"


def title(module: ModuleType) -> str:
    return f"{'Package' if module.__name__ in PACKAGES else 'Module'} {module.__name__}"


def heading(module: ModuleType, name: str) -> str:
    """Unique on the page."""
    return name if module.__name__ in PACKAGES else f"{module.__name__.rpartition('.')[2]}.{name}"


def link(heading: str, text: str = "") -> str:
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{text or heading}](#{anchor})"


def module_blocks(module: ModuleType) -> Iterator[str]:
    yield f"## {title(module)}"
    yield markdown(module.__doc__)
    for name in module.__all__:
        thing, full = getattr(module, name), heading(module, name)
        yield f"### {full}"
        elsewhere = first_home(module, thing)
        if elsewhere:
            yield f"The same as {link(heading(elsewhere, name), f'{elsewhere.__name__}.{name}')}."
        elif inspect.isclass(thing):
            yield from class_blocks(thing, full)
        elif inspect.isroutine(thing):
            yield from (signature(full, thing), markdown(thing.__doc__))
        else:
            yield f"`{thing!r}`"


def first_home(module: ModuleType, thing: Any) -> ModuleType | None:
    """The module earlier on the page that has the same class or function, if any."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return None
    earlier = map(importlib.import_module, MODULES[: MODULES.index(module.__name__)])
    return next((other for other in earlier if any(getattr(other, name) is thing for name in other.__all__)), None)


def class_blocks(cls: type, name: str) -> Iterator[str]:
    if not dataclasses.is_dataclass(cls) and not issubclass(cls, (tuple, dict, Exception)):
        yield signature(name, cls)
    yield markdown(cls.__doc__)
    options = [field for field in dataclasses.fields(cls) if "help" in field.metadata] if dataclasses.is_dataclass(cls) else []
    if options:
        fields = [f"- `{field.name}: {field.type} = {field.default!r}`: {prose(field.metadata['help'])}" for field in options]
        yield "\n".join(["Fields:", "", *fields])
    properties = {key: member for key, member in vars(cls).items() if isinstance(member, (property, cached_property))}
    described = [f"- `{key}`: {prose(member.__doc__)}" for key, member in properties.items() if member.__doc__]
    sizes = ", ".join(f"`{key}`" for key, member in properties.items() if not member.__doc__)
    if properties:
        yield "\n".join(["Properties:", "", *([f"- {sizes}"] if sizes else []), *described])
    for key, method in public_methods(cls).items():
        yield f"#### {name}.{key}"
        yield signature(f"{name}.{key}", method)
        yield markdown(method.__doc__)


@cache
def on_page(cls: type) -> bool:
    return any(getattr(module, name) is cls for module in map(importlib.import_module, MODULES) for name in module.__all__)


def public_methods(cls: type) -> dict[str, Any]:
    """The methods that the class documents, with those of bases of ours that the page leaves out. Class methods are bound."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("quietstar") and (base is cls or not on_page(base))]
    members = {name: getattr(cls, name) for base in ours for name in vars(base) if not name.startswith("_")}
    methods = {name: x for name, x in members.items() if inspect.isroutine(x) and not isinstance(x, cached_property)}
    return {name: method for name, method in methods.items() if method.__doc__}


def signature(name: str, function: Any) -> str:
    found = inspect.signature(function)
    kept = [p.replace(annotation=bare(p.annotation), default=named(p.default)) for p in found.parameters.values()]
    kept = [p for p in kept if p.name != "self"]
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


def named(default: Any) -> Any:
    """A function by its name, and without its address."""
    if not inspect.isfunction(default):
        return default
    return Bare("..." if default.__name__ == "<lambda>" else default.__name__)


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
