"""Who may import whom, and that what they import is there; read from the sources, so that it holds in code no test runs."""

import ast
import re
import symtable
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

import quietstar
import quietstar_kernels

ROOT = Path(__file__).parents[1]
UNDER_KERNELS = {*sys.stdlib_module_names, "torch", "triton", "quietstar_kernels"}

# Each floor may import those before it. A folder of `python/quietstar` is one room, as is a module beside them.
FLOORS = (
    {"files", "objective", "config", "testing"},
    {"checks", "hf"},
    {"group_rl", "texts"},
    {"memory", "checkpoints", "thinking"},
    {"model"},
    {"explanation", "run", "data", "evaluation"},
    {"training", "trainer"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "python" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FOLDERS = [d for d in ROOT.iterdir() if d.is_dir() and d.name != "build" and not d.name.startswith(".")]
MODULES = {module_name(path): path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))}
IMPORTERS = {module: path for module, path in MODULES.items() if not module.startswith("tests")}  # tests may import anything
LAYERS = sorted({module.partition(".")[0] for module in IMPORTERS})


@cache
def nodes_of(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def base(node: ast.expr) -> str:
    """The name that an attribute, or an attribute of one, begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def uses(source: str, importer: str, is_package: bool = False) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) of every import, and of every attribute read from an imported module of ours."""
    nodes = nodes_of(source)
    bound = {}  # local name -> full name
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
                local = alias.asname or alias.name.split(".")[0]
                bound[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom):
            package = importer if is_package else importer.rpartition(".")[0]
            module = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield node.lineno, module, alias.name
                bound[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and base(node) in bound:
            head, dot, rest = ast.unparse(node.value).partition(".")
            module = bound[head] + dot + rest
            if module in MODULES:
                yield node.lineno, module, node.attr


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def is_allowed(importer: str, module: str, name: str | None) -> bool:
    layer, target = importer.split(".")[0], module.split(".")[0]
    inner = f"{module}.{name}"
    if importer.startswith("quietstar.group_rl.") and target == "quietstar":  # neither a config nor a thought
        return room(module) in ("hf", "group_rl")
    if layer == target == "quietstar" and floor(inner if inner in MODULES else module) > floor(importer):
        return False
    if target == "tests":
        return layer in ("benchmarks", "tests")
    if target == "benchmarks":  # whose report writes every committed table
        return layer in ("benchmarks", "docs", "examples", "experiments", "tests")
    if target == "quietstar_recipes" and layer in ("quietstar_kernels", "quietstar"):
        return False
    if layer == "quietstar_kernels":
        return target in UNDER_KERNELS
    if layer.startswith("quietstar") and target.startswith("quietstar") and layer != target:
        return not any(part.startswith("_") for part in inner.split("."))
    return True


def violations(source: str, importer: str, is_package: bool = False) -> list[str]:
    return [
        f"{importer}, line {line}: must not use {module}{'.' + name if name else ''}"
        for line, module, name in uses(source, importer, is_package)
        if not is_allowed(importer, module, name)
    ]


@cache
def names_of(module: str) -> set[str]:
    """What a module of ours defines or imports."""
    path = MODULES[module]
    path = path.with_suffix(".pyi") if path.with_suffix(".pyi").exists() else path
    symbols = symtable.symtable(path.read_text(), str(path), "exec").get_symbols()
    return {x.get_name() for x in symbols if x.is_assigned() or x.is_imported()}


def missing(source: str, importer: str, is_package: bool = False) -> list[str]:
    """Modules of ours, and names in them, that a source uses and that aren't there."""
    found = []
    for line, module, name in uses(source, importer, is_package):
        module = re.sub(r"^hub\.", "quietstar_kernels.", module)  # published, its files are among the kernels'
        known = module in MODULES and (name is None or f"{module}.{name}" in MODULES or name in names_of(module))
        if not known and module.partition(".")[0] in LAYERS and not (name or "").startswith("__"):
            found.append(f"{importer}, line {line}: there is no {module}{'.' + name if name else ''}")
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str) -> None:
    found = []
    for module, path in IMPORTERS.items():
        if module.partition(".")[0] == layer:
            source, is_package = path.read_text(), path.name == "__init__.py"
            found += violations(source, module, is_package) + missing(source, module, is_package)
    assert not found, "\n".join(found)


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The nodes in a circle, or between two: those that remain when no node without imports or importers is left."""
    graph = {node: targets & graph.keys() for node, targets in graph.items()}
    while ends := {node for node, targets in graph.items() if not targets} | (graph.keys() - set().union(*graph.values())):
        graph = {node: targets - ends for node, targets in graph.items() if node not in ends}
    return set(graph)


def test_no_circle() -> None:
    """Neither between modules, for types alone and inside functions too, nor between the rooms of `quietstar`."""
    modules: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for module, path in IMPORTERS.items():
        inner = [(f"{target}.{name}", target) for _, target, name in uses(path.read_text(), module, path.name == "__init__.py")]
        targets = {submodule if submodule in MODULES else target for submodule, target in inner} & MODULES.keys() - {module}
        modules[module] = targets
        if module.split(".")[0] == "quietstar":
            inside = {room(target) for target in targets if target.split(".")[0] == "quietstar"}
            rooms.setdefault(room(module), set()).update(inside - {room(module)})
    assert not circles(modules)
    assert not circles(rooms)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == {"b", "c"}


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES if module.split(".")[0] == "quietstar"} == set().union(*FLOORS)


def test_nobody_calls_a_private_method_of_the_wrapper() -> None:
    found = [
        f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}"
        for folder in ("python", "benchmarks", "examples", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        for node in nodes_of(path.read_text())
        if isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr)
        and ast.unparse(node.value) in ("qs", "thinker", "one")
    ]
    assert not found, "\n".join(found)


def test_every_public_name_is_there() -> None:
    assert quietstar.__version__ == quietstar_kernels.__version__
    assert len(quietstar.__all__) > 50 and all(getattr(quietstar, name).__name__ == name for name in quietstar.__all__)
    others = [m for m, p in MODULES.items() if m.startswith("quietstar.") and re.search("^__all__", p.read_text(), re.M)]
    assert not others


@pytest.mark.parametrize(
    "importer, source",
    [
        ("quietstar_kernels.cpu.ops", "import transformers.cache_utils"),
        ("quietstar_kernels.layout", "def f():\n    from quietstar import QuietStar"),
        ("quietstar.model", "from quietstar_kernels import _dispatch"),
        ("quietstar.model", "from quietstar_kernels._dispatch import choose"),
        ("quietstar.model", "import quietstar_kernels as qk\nqk._dispatch"),
        ("quietstar.thinking.forward", "def f():\n    from quietstar.training import train"),
        ("quietstar.group_rl.completions", "from quietstar.config import ThoughtConfig"),
        ("quietstar.thinking.rollout", "from quietstar import QuietStar"),
        ("quietstar.run.batches", "from quietstar_recipes import star"),
        ("examples.english", "from tests.conftest import torch"),
    ],
)
def test_violation_is_caught(importer: str, source: str) -> None:
    assert len(violations(source, importer)) == 1


def test_what_is_missing_is_found() -> None:
    imports = ["from quietstar.gone import x", "from quietstar import gone", "from quietstar.hf.decoder import gone"]
    for source in [*imports, "import quietstar_kernels as qk\ndef f():\n    return qk.layout.gone"]:
        assert len(missing(source, "docs.page")) == 1
