"""What the CUDA back end reports about its library: whether it exists, loads, and was built for a GPU."""

import pytest
import torch

from quietstar_kernels import _dispatch, _first_use, cuda_library, triton
from quietstar_kernels.cuda import _library

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Library:
    """A fake library of CUDA 13.0; error: what CUDA reports about the driver."""

    def __init__(self, architectures, error=None):
        self.quietstar_built_for = lambda: f"13.0 {architectures}".encode()
        self.quietstar_cuda_error = lambda: error


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Replaces the library that is loaded by another one, or by an exception."""

    def put(library):
        def loaded():
            if isinstance(library, Exception):
                raise library
            return library

        file = tmp_path / "_C.abi3.so"
        file.touch()
        monkeypatch.setattr(_library, "FILE", file)
        monkeypatch.setattr(_library, "_load", loaded)

    def forget():
        for function in (_library.built_for, _library.missing, _library._why_not_gpu, triton._why_not_gpu):
            function.cache_clear()

    forget()
    yield put
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """Makes PyTorch report one GPU with a compute capability."""

    def report(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(_first_use, "TYPES", ())  # no op can be tried on it

    return report


def test_without_a_library(load, monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "FILE", tmp_path / "nothing.so")
    for device in (CPU, GPU):
        assert _library.why_not(device) == _library.PURE
    assert cuda_library() == f"no CUDA library: {_library.PURE}"


def test_a_library_that_does_not_load(load):
    load(OSError("undefined symbol: torch_library_impl"))
    assert _library.why_not(GPU) == "its library does not load: undefined symbol: torch_library_impl"
    assert cuda_library() == "no CUDA library: its library does not load: undefined symbol: torch_library_impl"


def test_without_a_gpu(load, monkeypatch):
    load(Library("sm_80 compute_80"))
    assert _library.why_not(CPU) == "no CUDA device: these tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _library.why_not(GPU) == "there is no cuda:0 here"
    assert cuda_library() == f"CUDA library {_library.FILE}, built with CUDA 13.0 for sm_80, compute_80"


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_80 compute_80", (9, 0), True),
        ("compute_80", (13, 7), True),
        ("compute_90", (8, 9), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a compute_90a", (10, 0), False),
        ("sm_100f", (10, 3), True),
        ("sm_100f compute_100f", (12, 0), False),
        ("sm_120", (12, 1), True),
        ("sm_90a sm_100", (8, 0), False),
    ],
)
def test_which_gpu_a_build_runs_on(built, capability, runs, load, gpu):
    load(Library(built))
    gpu(capability)
    reason = _library.why_not(GPU)
    said = f"cuda:0 has compute capability {capability[0]}.{capability[1]}, it was built for {built.replace(' ', ', ')}"
    assert reason == (None if runs else said)


def test_an_older_driver(load, gpu):
    load(Library("sm_90a", b"CUDA driver version is insufficient for CUDA runtime version"))
    gpu((9, 0))
    assert _library.why_not(GPU) == (
        "it was built with CUDA 13.0, and CUDA says: CUDA driver version is insufficient for CUDA runtime version"
    )


def test_not_on_amd(load, gpu, monkeypatch):
    load(Library("sm_90a"))
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _library.why_not(GPU) == "it is for NVIDIA GPUs"


@pytest.mark.parametrize("op", ["thought_attention", "linear_logprob"])
def test_ops_without_a_kernel(op, load, gpu):
    load(Library("sm_90a"))
    gpu((9, 0))
    assert _dispatch.why_not(op, "cuda", GPU) == f"it has no kernel for {op}"
    assert _dispatch.choose(op, "auto", GPU, torch.bfloat16) == "triton"


def test_auto_takes_triton_and_where_there_is_none_cuda(load, gpu, monkeypatch):
    load(Library("sm_90a"))
    gpu((9, 0))
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)
    served = {"K": 128, "E": 128}
    assert _dispatch.choose("thought_decode", "auto", GPU, torch.bfloat16, **served) == "triton"
    assert _dispatch.choose("thought_decode", "cuda", GPU, torch.bfloat16, **served) == "cuda"
    with pytest.raises(ValueError, match="^thought_decode: backend 'cuda' is not available: .*not in float32"):
        _dispatch.choose("thought_decode", "cuda", GPU, torch.float32, **served)
    monkeypatch.setattr(triton, "_why_not", lambda device, dtype: "Triton is not installed")
    assert _dispatch.choose("thought_decode", "auto", GPU, torch.bfloat16, **served) == "cuda"
    assert _dispatch.choose("sample_token", "auto", GPU, torch.bfloat16) == "cuda"
