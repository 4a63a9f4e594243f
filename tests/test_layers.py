"""Who may import whom, and how large a file may be, read from the sources, so that it holds in code no test runs."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNDER_KERNELS = {*sys.stdlib_module_names, "torch", "triton", "quietstar_kernels"}


# Each floor may import those before it. A folder of `python/quietstar` is one room, as is a module beside them.
FLOORS = (
    {"_moved", "arguments", "files", "output", "objective", "config"},
    {"checks", "hf"},
    {"packed", "rollout", "memory", "checkpoints"},
    {"anchors", "base_model", "chunks", "generate", "explain"},
    {"model"},
    {"__init__"},
    {"run", "data", "evaluation"},
    {"train", "trainer", "shared_prompt", "recipes"},
    {"cli"},
    {"__main__"},
)
LONGEST = {"": 480, "python/quietstar/model.py": 420, "python/quietstar/train.py": 300}  # lines


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
    bound = {}  # local name -> full name
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


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def goes_up(importer: str, module: str, name: str | None) -> bool:
    """Whether a module of `quietstar` imports one from a floor above its own."""
    if importer.split(".")[0] != "quietstar" or module.split(".")[0] != "quietstar":
        return False
    inner = f"{module}.{name}"
    return floor(inner if inner in MODULES else module) > floor(importer)


def is_allowed(importer: str, module: str, name: str | None) -> bool:
    layer, target = importer.split(".")[0], module.split(".")[0]
    if goes_up(importer, module, name):
        return False
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


def imports() -> dict[str, set[str]]:
    """The modules of ours that each module imports, for types alone and inside functions too."""
    found = {}
    for module, path in MODULES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        inner = [(target, f"{target}.{name}") for _, target, name in uses(path.read_text(), package)]
        targets = {submodule if submodule in MODULES else target for target, submodule in inner}
        found[module] = {target for target in targets if target in MODULES and target != module}
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The nodes in a circle, or between two: those that remain when no node without imports or importers is left."""
    graph = {node: targets & graph.keys() for node, targets in graph.items()}
    while ends := {node for node, targets in graph.items() if not targets} | (graph.keys() - set().union(*graph.values())):
        graph = {node: targets - ends for node, targets in graph.items() if node not in ends}
    return set(graph)


def test_no_circle() -> None:
    assert not circles({module: targets for module, targets in imports().items() if module.split(".")[0] != "tests"})


def test_no_circle_between_rooms() -> None:
    graph: dict[str, set[str]] = {}
    for module, targets in imports().items():
        if module.split(".")[0] == "quietstar":
            inside = {room(target) for target in targets if target.split(".")[0] == "quietstar"}
            graph.setdefault(room(module), set()).update(inside - {room(module)})
    assert not circles(graph)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == {"b", "c"}


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in MODULES if module.split(".")[0] == "quietstar"}
    assert rooms == set().union(*FLOORS)
    modules = {path.name for path in (ROOT / "python" / "quietstar").glob("*.py")}
    assert len(modules) <= 17 and len(rooms) <= 28


def test_nobody_calls_a_private_method_of_the_wrapper() -> None:
    folders = ("python", "benchmarks", "examples", "experiments")
    found = [
        f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr)
        and ast.unparse(node.value) in ("qs", "thinker", "one")
    ]
    assert not found, "\n".join(found)


def test_no_file_is_long() -> None:
    folders = ("python", "quietstar_kernels", "benchmarks", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST.get(path, LONGEST[""])}


@pytest.mark.parametrize(
    "importer, source",
    [
        ("quietstar_kernels.cpu.ops", "import transformers.cache_utils"),
        ("quietstar_kernels.layout", "def f():\n    from quietstar import QuietStar"),
        ("quietstar.model", "from quietstar_kernels import _checks"),
        ("quietstar.model", "from quietstar_kernels._checks import check"),
        ("quietstar.model", "import quietstar_kernels as qk\nqk._checks"),
        ("quietstar.recipes.star", "from ..model import QuietStar"),
        ("quietstar.packed", "def f():\n    from quietstar.train import train"),
        ("quietstar.rollout", "from quietstar import QuietStar"),
        ("quietstar.run.batches", "from quietstar.recipes import star"),
        ("quietstar.recipes.star", "import quietstar\nquietstar.no_such_name"),
        ("examples.english", "from tests.conftest import torch"),
    ],
)
def test_violation_is_caught(importer: str, source: str) -> None:
    assert len(violations(source, importer, importer.rpartition(".")[0])) == 1


def counts(package: str) -> str:
    """Rooms of a package, pairs of rooms with an import, and modules in circles."""
    graph = {
        module: {target for target in targets if target.split(".")[0] == package}
        for module, targets in imports().items()
        if module.split(".")[0] == package
    }
    pairs = {(room(module), room(target)) for module, targets in graph.items() for target in targets}
    pairs = {(one, other) for one, other in pairs if one != other}
    rooms = {room(module) for module in graph}
    return f"{package}: {len(rooms)} rooms, {len(pairs)} pairs with an import, {len(circles(graph))} modules in circles"


if __name__ == "__main__":
    print("\n".join(map(counts, ("quietstar_kernels", "quietstar", "benchmarks"))))
