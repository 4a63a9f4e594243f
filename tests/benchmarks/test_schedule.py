"""The simulated schedule takes the kernels' order, and counts what a cache misses."""

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks import schedule  # noqa: E402
from quietstar_kernels.triton._device import taking_turns  # noqa: E402
from quietstar_kernels.triton.configs import INTERPRETED  # noqa: E402


@triton.jit
def order(out, pairs, together):
    pair, turn = taking_turns(pairs, together)
    triton.language.store(out + triton.language.program_id(0) * 2, pair)
    triton.language.store(out + triton.language.program_id(0) * 2 + 1, turn)


@pytest.mark.parametrize("together", [1, 3, 4, 7])
def test_the_order_of_the_kernels(together):
    out = torch.zeros(7 * 5, 2, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
    order[(7 * 5,)](out, 7, together)
    assert list(map(tuple, out.tolist())) == list(schedule.in_turn(7, 5, together))
    assert sorted(schedule.in_turn(7, 5, together)) == [(pair, turn) for pair in range(7) for turn in range(5)]


def test_what_is_missed():
    assert schedule.misses(iter([n, 0]) for n in range(1, 4)) == 4 * schedule.BLOCK
    many = schedule.CACHE // schedule.BLOCK + 1
    assert schedule.misses(iter([*range(many), 0]) for _ in range(1)) == (many + 1) * schedule.BLOCK
    for kernel, least, before, after in schedule.compared(schedule.Shape(16, 8, 4, 256)):
        assert before > least == after if kernel == "dK, dV" else before == least == after
