"""What belongs together reaches Triton's functions as one record."""

import importlib
import inspect
import pkgutil

import pytest

triton = pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface  # noqa: E402

import quietstar_kernels.triton  # noqa: E402

MOST = 30


def test_no_function_takes_more_parameters():
    folder = quietstar_kernels.triton
    modules = [importlib.import_module(x.name) for x in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}.")]
    found = {x.fn for module in modules for x in vars(module).values() if isinstance(x, KernelInterface)}
    assert len(found) > 40
    assert not [x.__qualname__ for x in found if len(inspect.signature(x).parameters) > MOST]
