"""linear_divergence against the dense form: values, gradients, memory, what isn't finite, torch.compile."""

import math

import pytest
import torch

from quietstar_kernels import linear_divergence
from quietstar_kernels.linear_divergence import _linear_divergence, _linear_divergence_backward
from quietstar_kernels.testing import assert_op_close_as_plain, plain_divergence
from tests.kernels.drawn import normal, seeded
from tests.kernels.test_allocations import LargestOutput

BETAS = [0.0, 0.5, 1.0, 0.1]
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 4.0, "scale": -0.5, "teacher_scale": 2.0, "temperature": 1.5}]
OPTIONS += [{"teacher_softcap": 3.0}]
SHAPES = [(67, 17, 11, 129), (1, 3, 5, 20), (0, 3, 3, 20), (5, 1, 1, 1)]


def make(shape, dtype=torch.float32, bias=True):
    """The student's tensors, which get gradients, and the teacher's."""
    R, D, E, V = shape
    generator = seeded(0)
    student = {
        "hidden": normal(generator, R, D),
        "weight": normal(generator, V, D),
        "bias": normal(generator, V) if bias else None,
    }
    teacher = {"hidden": normal(generator, R, E), "weight": normal(generator, V, E), "bias": normal(generator, V)}
    student, teacher = ({k: x if x is None else x.to(dtype) for k, x in of.items()} for of in (student, teacher))
    return student, {f"teacher_{name}": x for name, x in teacher.items()}, normal(generator, R)


def judge(student, teacher, grad, **options):
    """The bound of every op: twice the error of plain PyTorch in the same dtype."""

    def over(op):
        def run(**tensors):
            return op(**tensors, **{name: x.to(tensors["hidden"].dtype) for name, x in teacher.items()}, **options)

        return run

    # A gradient's terms may cancel: grad times probabilities times weights.
    terms = {name: float(grad.abs().max() * x.abs().max()) if len(grad) else 0.0 for name, x in teacher.items()}
    magnitudes = {"hidden": terms["teacher_weight"], "weight": terms["teacher_hidden"]}
    assert_op_close_as_plain(over(linear_divergence), over(plain_divergence), student, (grad,), str(options), magnitudes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_error_rule(beta, options, dtype):
    judge(*make(SHAPES[0], dtype, bias=beta != 0.1), beta=beta, **options)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_few_rows(shape):
    """One row, none, and one id."""
    judge(*make(shape), beta=0.5, softcap=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", BETAS[:3])
def test_many_chunks(monkeypatch, beta, dtype):
    """Of five rows each, and the last of two."""
    monkeypatch.setattr("quietstar_kernels.cpu._head.MOST", 2**12)
    judge(*make((102, 5, 4, 700), dtype), beta=beta, softcap=5.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_strides_and_a_teacher_of_another_dtype(dtype):
    student, teacher, grad = make(SHAPES[0])
    student = {name: torch.cat([x] * 2, -1)[..., : x.shape[-1]] for name, x in student.items()}
    student["hidden"] = student["hidden"].T.contiguous().T
    assert not student["weight"].is_contiguous()
    teacher = {name: x.to(dtype) for name, x in teacher.items()}
    judge(student, {name: x.float() for name, x in teacher.items()}, grad, beta=0.5)
    same = linear_divergence(**student, **{name: x.float() for name, x in teacher.items()}, beta=0.5)
    torch.testing.assert_close(linear_divergence(**student, **teacher, beta=0.5), same)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_gradients_in_fp64(beta, options):
    student, teacher, _ = make((4, 3, 5, 15), torch.float64)
    leaves = [x.requires_grad_() for x in student.values()]
    teacher["teacher_hidden"].requires_grad_()  # a constant all the same

    def results(hidden, weight, bias):
        return linear_divergence(hidden, weight, bias=bias, beta=beta, **teacher, **options)

    assert results(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(results, leaves)
    (results(*leaves).sum()).backward()
    assert teacher["teacher_hidden"].grad is None
    assert not linear_divergence(**{name: x.detach() for name, x in student.items()}, **teacher).requires_grad
    alone = leaves[1].detach().requires_grad_()  # without gradients of the others
    results(leaves[0].detach(), alone, leaves[2].detach()).sum().backward()
    assert torch.equal(alone.grad, leaves[1].grad)


@pytest.mark.parametrize("beta", BETAS[:3])
def test_no_tensor_of_all_logits(beta):
    R, V = 4096, 8192
    student, teacher, grad = make((R, 4, 3, V))
    tensors = (*student.values(), *teacher.values())
    options = (1.0, 5.0, 1.0, None, beta)
    with LargestOutput() as forward:
        _linear_divergence(*tensors, *options)
    with LargestOutput() as backward:
        _linear_divergence_backward(grad, *tensors, *options, [True] * 3)
    assert V <= forward.numel <= R * V // 8 and V <= backward.numel <= R * V // 8


@pytest.mark.parametrize("name, row, value, rows", [
    ("hidden", 1, math.nan, [1]), ("teacher_hidden", 2, math.inf, [2]), ("weight", 30, math.nan, [0, 1, 2, 3]),
    ("teacher_bias", 30, math.inf, [0, 1, 2, 3]), ("bias", 30, math.nan, [0, 1, 2, 3]),
])  # fmt: skip
@pytest.mark.parametrize("beta", BETAS[:3])
def test_logits_that_are_not_finite(beta, name, row, value, rows):
    student, teacher, _ = make((4, 8, 6, 50))
    clean = linear_divergence(**student, **teacher, beta=beta)
    (student | teacher)[name][row] = value
    found = linear_divergence(**student, **teacher, beta=beta)
    assert found.isnan().nonzero().flatten().tolist() == rows
    others = [i for i in range(4) if i not in rows]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("beta", BETAS[:3])
def test_ids_without_probability(beta):
    """One that neither can say changes nothing. One that the teacher alone can't makes the reverse KL infinite."""
    student, teacher, _ = make((4, 8, 6, 50))
    without = {name: x[:-1] if "hidden" not in name else x for name, x in (student | teacher).items()}
    student["bias"][-1] = teacher["teacher_bias"][-1] = -math.inf
    for x in student.values():
        x.requires_grad_()
    found = linear_divergence(**student, **teacher, beta=beta)
    torch.testing.assert_close(found, linear_divergence(**without, beta=beta))
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in student.values())
    teacher["teacher_bias"][0] = -math.inf
    infinite = linear_divergence(**student, **teacher, beta=beta).isposinf()
    assert infinite.all() if beta == 1 else not infinite.any()


def test_autocast_and_compile():
    torch.compiler.reset()
    student, teacher, _ = make((5, 3, 4, 20))
    leaves = [x.requires_grad_() for x in student.values()]

    def loss(hidden, weight, bias):
        return linear_divergence(hidden, weight, bias=bias, beta=0.5, softcap=5.0, **teacher).sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    with torch.autocast("cpu", torch.bfloat16):  # tensors of one dtype stay
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(map(torch.equal, got, want))
    with pytest.raises(NotImplementedError, match="linear_divergence has no second derivative: quietstar_kernels.testing"):
        torch.autograd.grad(torch.autograd.grad(loss(*leaves), leaves, create_graph=True)[0].sum(), leaves)


@pytest.mark.parametrize("change, message", [
    ({"teacher_hidden": torch.zeros(4, 6)}, "teacher_hidden must have shape [R,D']=[5,?], got [4,6]"),
    ({"teacher_weight": torch.zeros(21, 6)}, "teacher_weight must have shape [V,D']=[20,6], got [21,6]"),
    ({"teacher_bias": torch.zeros(20).half()}, "teacher_bias must have dtype float32 like teacher_hidden, got float16"),
    ({"teacher_hidden": torch.zeros(5, 6, device="meta")}, "teacher_hidden must be on cpu like hidden, got meta"),
    ({"beta": 1.5}, "beta must be a number from 0 to 1, got 1.5"),
    ({"teacher_softcap": 0}, "teacher_softcap must be a positive finite number, got 0"),
    ({"teacher_scale": 1e39}, "teacher_scale must be at most 3.40e+38, the largest of float32, got 1e+39"),
])  # fmt: skip
def test_bad_input(change, message):
    student, teacher, _ = make((5, 3, 6, 20))
    with pytest.raises(ValueError) as error:
        linear_divergence(**(student | teacher | change))
    assert str(error.value) == f"linear_divergence: {message}"
