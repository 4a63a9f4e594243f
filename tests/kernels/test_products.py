"""Which library multiplies on a CPU; products of any strides; that small ones and other dtypes stay where they are."""

import pytest
import torch

from quietstar_kernels.cpu import products
from quietstar_kernels.testing import assert_close_as_plain

SIZES = (70, 130, 50)


@pytest.fixture
def chosen(monkeypatch):
    """``chosen(named, **capabilities of the processor)`` is the library."""

    def choose(named=None, **found):
        monkeypatch.delenv("QUIETSTAR_CPU_MATMUL", raising=False)
        if named is not None:
            monkeypatch.setenv("QUIETSTAR_CPU_MATMUL", named)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        products.library.cache_clear()
        return products.library()

    yield choose
    products.library.cache_clear()


def test_the_processor_chooses_unless_a_variable_does(chosen):
    assert chosen(cpu_name="AMD EPYC 9755", avx512_f=True, avx_vnni=True) == "onednn"
    assert chosen(cpu_name="AMD EPYC 9654", avx512_f=True) == "both"
    for found in ({"cpu_name": "AMD EPYC", "avx512_f": False}, {"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, {}):
        assert chosen(**found) == chosen("auto", **found) == "pytorch"
        assert chosen("onednn", **found) == "onednn"
        assert products.cpu_products() == "large fp32 products on CPUs: oneDNN (QUIETSTAR_CPU_MATMUL=onednn)"
    assert chosen("pytorch", cpu_name="AMD EPYC 9755", avx512_f=True) == "pytorch"


def test_what_no_library_is_called_is_refused(chosen, monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, pytorch, onednn, both, got 'mkl'"):
        chosen("mkl")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert chosen(cpu_name="AMD EPYC 9755", avx512_f=True) == "pytorch"
    for named in ("onednn", "both"):
        with pytest.raises(ValueError, match=f"is {named}, and this PyTorch has no oneDNN"):
            chosen(named)


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(products, "library", lambda: "onednn")
    monkeypatch.setattr(products, "LEAST", 2 * SIZES[0] * SIZES[1] * SIZES[2])


def factors(dtype=torch.float32):
    """a [m,k] and b [k,n], contiguous, transposed and cut out of larger ones."""
    m, k, n = SIZES
    wide = torch.randn(2 * m, k + 3), torch.randn(k, 2 * n)
    ways = (
        (torch.randn(m, k), torch.randn(k, n)),
        (torch.randn(k, m).T, torch.randn(n, k).T),
        (wide[0][::2, 3:], wide[1][:, ::2]),
    )
    return [(a.to(dtype), b.to(dtype)) for a, b in ways]


def test_error_rule_and_repeatable_whatever_the_strides(onednn):
    for a, b in factors():
        truth, to = a.double() @ b.double(), torch.randn(SIZES[0], SIZES[2])
        got = products.multiply(a, b)
        assert_close_as_plain(got, a @ b, truth)
        assert torch.equal(got, products.multiply(a, b))
        was = to.clone()
        products.add_product(to, a, b)
        assert_close_as_plain(to, was.addmm(a, b), was.double() + truth)


def test_factors_that_onednn_would_have_to_pack(onednn, monkeypatch):
    right, given = products.onednn_linear, []
    monkeypatch.setattr(products, "library", lambda: "both")
    monkeypatch.setattr(products, "onednn_linear", lambda a, b: given.append(a.shape) or right(a, b))
    for a, b in factors():
        products.multiply(a, b)
        products.add_product(torch.zeros(SIZES[0], SIZES[2]), a, b)
    assert len(given) == 4, "a transposed one stays PyTorch's"


def test_onednn_gets_dense_matrices_alone(monkeypatch):
    right, given = torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *x: given.extend(x[:2]) or right(*x))
    for a, b in factors():
        products.onednn_linear(a, b.T)
    assert len(given) == 6 and all(x.is_contiguous() or x.T.is_contiguous() for x in given)


def test_smaller_products_and_other_dtypes_are_pytorchs(onednn, monkeypatch):
    monkeypatch.setattr(products, "onednn_linear", None)
    for a, b in (*factors(torch.float64), *((a[1:], b) for a, b in factors()), (torch.ones(0, 3), torch.ones(3, 2))):
        out = a.new_empty(len(a), b.shape[1])
        assert products.multiply(a, b, out) is out and torch.equal(out, torch.mm(a, b))
