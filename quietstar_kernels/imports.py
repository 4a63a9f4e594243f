"""Changes to other modules, once they are imported."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call ``change`` with a module: now if it has been imported, and each time that it is."""
    _waiting.setdefault(name, []).append(change)
    if name in sys.modules:
        change(sys.modules[name])


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name not in _waiting:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec: Any = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            spec.loader = copy.copy(spec.loader)  # that of a zip file serves other modules too
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for change in _waiting[name]:
                    change(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
