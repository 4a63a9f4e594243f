"""Who may import whom, read from the syntax trees, so that the layers hold even in code no test runs."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNDER_KERNELS = {*sys.stdlib_module_names, "torch", "triton", "quietstar_kernels"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "python" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FOLDERS = [d for d in ROOT.iterdir() if d.is_dir() and d.name != "build" and not d.name.startswith(".")]
FILES = [ROOT / "setup.py"] + [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
MODULES = {module_name(path): path for path in FILES}


@cache
def exported(module: str) -> frozenset[str]:
    """The module's `__all__`; empty where it has none, since nothing is public there."""
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def is_public_module(module: str) -> bool:
    return module in MODULES and not any(part.startswith("_") for part in module.split("."))


def is_public(module: str, name: str | None) -> bool:
    """Whether `from module import name`, or `import module` where name is None, uses public names alone."""
    if not is_public_module(module):
        return False
    return name is None or name in exported(module) or is_public_module(f"{module}.{name}")


def uses(source: str, package: str) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) of every import, and of every attribute read from an imported module of ours."""
    nodes = list(ast.walk(ast.parse(source)))
    bound = {}  # local name -> what it stands for
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
                local = alias.asname or alias.name.split(".")[0]
                bound[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield node.lineno, module, alias.name
                bound[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute):
            head, dot, rest = ast.unparse(node.value).partition(".")
            module = bound.get(head, "") + dot + rest
            if module in MODULES:
                yield node.lineno, module, node.attr


def is_recipe(module: str) -> bool:
    return module.split(".")[:2] == ["quietstar", "recipes"]


def is_allowed(importer: str, module: str, name: str | None) -> bool:
    layer, target = importer.split(".")[0], module.split(".")[0]
    if target in ("benchmarks", "tests"):
        return layer in ("benchmarks", "tests")
    if layer == "quietstar_kernels":
        return target in UNDER_KERNELS
    if layer == "quietstar" and target == "quietstar_kernels":
        return is_public(module, name)
    if is_recipe(importer) and target == "quietstar" and not is_recipe(module):
        return is_public(module, name)
    return True


def violations(source: str, importer: str, package: str) -> list[str]:
    return [
        f"{importer}, line {line}: must not use {module}{'.' + name if name else ''}"
        for line, module, name in uses(source, package)
        if not is_allowed(importer, module, name)
    ]


def test_layers() -> None:
    found = []
    for module, path in MODULES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found += violations(path.read_text(), module, package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "importer, source",
    [
        ("quietstar_kernels.cpu.ops", "import transformers.cache_utils"),
        ("quietstar_kernels.layout", "def f():\n    from quietstar import QuietStar"),
        ("quietstar.model", "from quietstar_kernels import _checks"),
        ("quietstar.model", "from quietstar_kernels._checks import check"),
        ("quietstar.model", "import quietstar_kernels as qk\nqk._checks"),
        ("quietstar.recipes.star", "from ..model import QuietStar"),
        ("quietstar.recipes.star", "import quietstar\nquietstar.no_such_name"),
        ("examples.english", "from tests.conftest import torch"),
    ],
)
def test_violation_is_caught(importer: str, source: str) -> None:
    assert len(violations(source, importer, importer.rpartition(".")[0])) == 1
