"""The exact results of the attention benchmarks are those of the reference, and the baselines compute them."""

from dataclasses import fields, replace

import pytest
import torch

from benchmarks.baselines import attention
from benchmarks.baselines.exact import exact_rows
from benchmarks.bench_thought_attention import AttentionCase
from benchmarks.bench_thought_decode import DecodeCase
from benchmarks.harness.case import Wrong
from quietstar_kernels.testing import plain_attention

TINY = AttentionCase(B=2, L=11, N=2, S=4, H=4, G=2, K=8)
STEP = DecodeCase(B=2, L=11, N=2, S=4, H=4, G=2, K=8, step=2)
BASELINES = {baseline.name: baseline for baseline in attention.BASELINES}
ON_CPU = ["flash prefix + own block (PyTorch)", "SDPA, dense mask"]


def test_rows_see_what_the_layout_says():
    row, key = torch.arange(TINY.rows), torch.arange(TINY.M)
    assert torch.equal(TINY.sees(row[:, None], key), TINY.layout.dense_mask()[0])
    of_step = TINY.layout.dense_mask()[0, TINY.L :][STEP.step :: TINY.S]
    assert torch.equal(STEP.sees(torch.arange(STEP.rows)[:, None], key), of_step)


def test_work_counts_what_the_layout_shows():
    thoughts = TINY.layout.dense_mask()[:, TINY.L :].sum()
    assert TINY.work().flops == 4 * TINY.K * TINY.H * thoughts
    assert replace(TINY, what="forward+backward").work().flops == 3.5 * TINY.work().flops
    of_step = TINY.layout.dense_mask()[:, TINY.L :][:, STEP.step :: TINY.S].sum()
    assert STEP.work().flops == 4 * STEP.K * STEP.H * of_step
    read = STEP.B * STEP.G * STEP.K * (STEP.L + STEP.L * STEP.N * (STEP.step + 1))  # keys, and as many values
    assert STEP.work().bytes == 4 * (2 * read + 2 * STEP.B * STEP.H * STEP.rows * STEP.K)


def test_the_exact_rows_are_those_of_plain_attention():
    q, k, v, grad_out = (x.detach().double().requires_grad_() for x in TINY.inputs(seed=3).values())
    rows = torch.tensor([0, 4, TINY.L, TINY.L + 17, TINY.M - 1])
    grad_out = torch.zeros_like(grad_out).index_copy(2, rows, grad_out.detach()[:, :, rows])
    out = plain_attention(q, k, v, TINY.layout)[0]
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out)
    sees = TINY.sees(rows[:, None], torch.arange(TINY.M))
    exact = exact_rows(sees, rows, q.detach(), k.detach(), v.detach(), grad_out)
    for got, truth in zip(exact, (out[:, :, rows], dq[:, :, rows], dk, dv), strict=True):
        torch.testing.assert_close(got, truth.detach())


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", [{}, {"G": 4}, {"G": 1, "N": 1}, {"S": 1, "L": 1}, {"B": 1, "L": 40, "K": 24}])
def test_baselines_of_attention_are_right(name, what, sizes):
    case = replace(TINY, what=what, **sizes)
    case.check(BASELINES[name].prepare(case))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("sizes", [{}, {"G": 4}, {"G": 1, "N": 1}, {"S": 1, "L": 1, "step": 0}, {"step": 0}, {"step": 3}])
def test_baselines_of_decoding_are_right(name, sizes):
    case = replace(STEP, **sizes)
    case.check(BASELINES[name].prepare(case))


@pytest.mark.long
def test_flex_attention_is_right():
    case = replace(TINY, B=1)
    case.check(BASELINES["FlexAttention, compiled"].prepare(case))


@pytest.mark.parametrize("case", [TINY, STEP])
def test_a_mask_off_by_one_is_refused(case):
    class Off(type(case)):
        def sees(self, row, key):
            return super().sees(row, key) & (key != row.clamp(max=self.L - 1) // 2)

    off = Off(**{field.name: getattr(case, field.name) for field in fields(case)})
    with pytest.raises(Wrong, match="out differs by"):
        case.check(attention.dense(off))


def test_gpu_baselines_say_why_they_do_not_run_here():
    for case in (TINY, STEP):
        assert BASELINES["FlexAttention, FLASH"].why_not(case) == "this kernel is for GPUs"
    assert "no backward" in BASELINES["FlexAttention, compiled"].why_not(replace(TINY, what="forward+backward"))
    on_gpu = replace(TINY, device=torch.device("cuda"), dtype=torch.float32)
    assert "fp16 and bf16" in BASELINES["flash prefix + own block (PyTorch)"].why_not(on_gpu)
