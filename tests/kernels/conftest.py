"""One suite for all back ends: a test that takes ``backend`` runs once for each, with its tensors on ``device``."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))
import emulated
import quick

from quietstar_kernels import _dispatch, _first_use, self_test
from quietstar_kernels.cpu import _library as cpu_library
from quietstar_kernels.cpu import products
from quietstar_kernels.cuda import _library

BACKENDS = ["reference", "cpu", "cpu in PyTorch", "cpu with oneDNN", "triton", "cuda"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", help="such as 2/16: the third of 16 shares of the tests, for as many processes side by side")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_of_the_matrix(item):
            item.add_marker(pytest.mark.kernels)
    if shard := config.getoption("--shard", None):
        mine, shares = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % shares != mine])
        items[:] = items[mine::shares]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the tests of an op with every back end that serves the op."""
    if "backend" not in metafunc.fixturenames:
        return
    op = op_of(metafunc.module)
    metafunc.parametrize("backend", [name for name in BACKENDS if serves(name, op)], indirect=True)


def op_of(module: ModuleType) -> str:
    if hasattr(module, "OP"):
        return module.OP
    return module.__name__.rpartition(".")[2].removeprefix("test_").removesuffix("_leaks").removesuffix("_ways")


def is_of_the_matrix(item: pytest.Item) -> bool:
    """Whether it is a case that takes long, by its back end or its test, and not one of those in ``quick``."""
    call = getattr(item, "callspec", None)
    backend = call and call.params.get("backend")
    if backend is None:
        return False
    slow = backend not in ("reference", "cpu")
    of_op = (quick.CASES if slow else quick.LONG_TESTS).get(op_of(item.module), {})
    cases = of_op.get(item.originalname.removeprefix("test_"), [] if slow else None)
    return cases is not None and call.id.removeprefix(backend).removeprefix("-") not in cases


def serves(backend: str, op: str) -> bool:
    if op in _dispatch.OF_A_LAYER:
        return backend in ("reference", "triton")
    if backend == "cpu with oneDNN":
        return op in ("linear_logprob", "sample_token") and torch.backends.mkldnn.is_available()
    folder = {"cpu in PyTorch": "cpu.plain"}.get(backend, backend)
    return backend in ("reference", "cpu") or importlib.util.find_spec(f"quietstar_kernels.{folder}.{op}") is not None


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that the op is called with. "cpu" is compiled, if there is a library; "cpu in PyTorch" runs without it.

    "cpu with oneDNN" sends it all products, however small, and "cpu" none.
    """
    monkeypatch.setattr(products, "library", lambda: "onednn" if request.param == "cpu with oneDNN" else "pytorch")
    if request.param == "cpu with oneDNN":
        monkeypatch.setattr(products, "LEAST", 0)
        return "cpu"
    if request.param == "cpu in PyTorch":
        monkeypatch.setattr(cpu_library, "missing", lambda: "a test leaves it out")
        return "cpu"
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test's tensors: the GPU if there is one, unless the back end is that of the CPU."""
    on_cpu = request.getfixturevalue("backend") == "cpu" if "backend" in request.fixturenames else True
    return torch.device("cpu" if on_cpu or not torch.cuda.is_available() else "cuda")


@pytest.fixture
def interpreted(backend: str, device: torch.device) -> bool:
    """True if the CPU runs kernels for GPUs, thousands of times slower: by Triton's interpreter, which is wrong in bf16, or the
    emulation of CUDA."""
    return backend in ("triton", "cuda") and device.type == "cpu"


@pytest.fixture
def compiled() -> bool:
    """True if Triton's kernels are compiled, which takes seconds for each new width, option, dtype and alignment. Tests then
    draw more inputs of fewer kinds, with widths that are multiples of 16, so that strides are too."""
    return torch.cuda.is_available()


@pytest.fixture
def few(interpreted: bool, compiled: bool) -> Callable[[Sequence[int], int], Sequence[int]]:
    """The first ``count`` seeds if the CPU runs kernels for GPUs, four times as many if they are compiled, else all."""
    return lambda seeds, count: seeds[:count] if interpreted else seeds[: 4 * count] if compiled else seeds


@pytest.fixture
def narrow(compiled: bool) -> tuple[int, int]:
    """K and E of small inputs."""
    return (16, 32) if compiled else (8, 4)


@pytest.fixture(scope="session")
def emulated_kernels():
    if reason := emulated.missing():
        pytest.skip(f"the CUDA kernels can't be built for the CPU: {reason}")
    return emulated.load(emulated.build())


@pytest.fixture
def cuda(request: pytest.FixtureRequest):
    """The device on which the test runs the back end "cuda": a GPU, or if there is none the CPU, by the emulation."""
    if not torch.cuda.is_available():
        with emulated.serving(request.getfixturevalue("emulated_kernels")):
            yield torch.device("cpu")
    elif reason := _library.why_not(torch.device("cuda", 0)):
        pytest.skip(reason)
    else:
        yield torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def emulation(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        request.getfixturevalue("cuda")


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """``torch.empty`` gives NaN (the largest integer, for integers): what a kernel forgets to write is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tries(monkeypatch):
    """The CPU is a GPU of an unknown kind with the back ends "cpu" and "reference"; holds (op, back end) of each try."""
    tried = []
    right = _first_use._try
    monkeypatch.setattr(_first_use, "TYPES", ("cpu",))
    monkeypatch.setattr(self_test, "TEXT", 24)
    monkeypatch.setattr(_first_use, "_kind", lambda device: "Test GPU")
    monkeypatch.setattr(_first_use, "_try", lambda *arguments: tried.append(arguments[:2]) or right(*arguments))
    monkeypatch.setitem(_dispatch.FASTEST_FIRST, "cpu", ("cpu", "reference"))
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)
    monkeypatch.setattr(_first_use, "_found", {})
    return tried
