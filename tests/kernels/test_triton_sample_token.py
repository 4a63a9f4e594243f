"""sample_token in Triton: its random numbers, every tile, programs of several tiles, compiles."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from quietstar_kernels import sample_token  # noqa: E402
from quietstar_kernels.testing import sample_inputs  # noqa: E402
from quietstar_kernels.triton import configs  # noqa: E402
from quietstar_kernels.triton import sample_token as op  # noqa: E402
from quietstar_kernels.triton.configs import INTERPRETED  # noqa: E402
from quietstar_kernels.triton.sample_token import exponential, resolve  # noqa: E402
from tests.kernels.drawn import seeded, spread  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def draw(backend, rows=40, width=8, vocabulary=700, bias=True, dtype=torch.float32, **options):
    inputs = sample_inputs(torch.Generator().manual_seed(0), rows, width, vocabulary, bias, dtype, DEVICE)
    return sample_token(**inputs, seed=3, backend=backend, **options)


def assert_same(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5)


@triton.jit
def exponentials(words, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, exponential(tl.load(words + i).to(tl.uint32, bitcast=True)))


def test_exponential():
    """To 5 ulps everywhere: where v is tiny, which decides a large vocabulary, where it is near 1, and between."""
    generator = torch.Generator().manual_seed(0)
    spread = (2 ** (32 * torch.rand(2**15, dtype=torch.float64, generator=generator))).long().clamp(max=2**32 - 1)
    even = torch.randint(0, 2**32, (2**16 - 2**10,), generator=generator)
    words = torch.cat([torch.arange(2**9), 2**31 - 2**8 + torch.arange(2**9), spread, 2**32 - 1 - spread, even])
    out = torch.empty(2**17, device=DEVICE)
    exponentials[1,](words.to(torch.int32).to(DEVICE), out, 2**17)
    truth = -torch.log1p(-(words.double() + 0.5) / 2**32)
    assert ((out.cpu() / truth - 1).abs() < 5 * 2**-23).all()


@triton.jit
def resolved(weights, rest, out, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, 16)
    drawn, weight = resolve(tl.load(weights + row[:, None] * 16 + column[None, :]), tl.load(rest + row))
    tl.store(out + row, drawn.to(tl.float32))
    tl.store(out + ROWS + row, weight)


def test_a_draw_that_rounding_carries_past_the_end():
    weights = torch.zeros(4, 16)
    weights[0, 3], weights[1, 15], weights[2, [4, 9]] = 0.3, 1.0, torch.tensor([0.25, 0.5])
    rest = torch.tensor([0.3, 1.1, 0.75, 0.0])
    out = torch.empty(2, 4, device=DEVICE)
    resolved[1,](weights.to(DEVICE), rest.to(DEVICE), out, 4)
    assert torch.equal(out.cpu(), torch.tensor([[3, 15, 9, 0], [0.3, 1.0, 0.5, 0.0]]))
    # The second word of these counters is within 64 of 2^32: in fp32 it is 1.
    counters = torch.tensor([[54989, 559, 0, 0], [55109, 655, 0, 0]], device=DEVICE).int()
    ids, _ = sample_token(*(torch.ones(n, 1, device=DEVICE) for n in (2, 100)), counters, seed=0, backend="triton")
    assert ids.tolist() == [99, 99]


def shipped():
    marks = {"sm_90": ()}  # make test has those of one target
    cases = sorted(case for case in configs.SAMPLE_TOKEN if case[0] != "interpreter")
    return [pytest.param(*case, marks=marks.get(case[0], pytest.mark.kernels)) for case in cases]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes its own tiles only")
@pytest.mark.parametrize("target, size, rows", shipped())
def test_shipped_tiles(monkeypatch, target, size, rows):
    for module in (configs, op):
        monkeypatch.setattr(module, "target", lambda: target)
    dtype, rows = torch.float16 if size == 2 else torch.float32, min(rows, 70)
    for options in ({}, {"temperature": 0.0, "softcap": 3.0, "banned": (5,)}):
        case = {"rows": rows, "width": 70, "vocabulary": 300, "dtype": dtype, **options}
        assert_same(draw("triton", **case), draw("reference", **case))


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.kernels)])
def test_programs_of_several_tiles(monkeypatch, temperature):
    """Ten tiles of rows, which are one group of neighbours and a part of one; each program has four of eight tiles of ids."""
    tiles = configs.Config({"BLOCK_R": 16, "BLOCK_V": 128, "BLOCK_D": 16})
    monkeypatch.setattr(op, "pick", lambda *_: tiles)
    monkeypatch.setattr(op, "PROGRAMS", 20)
    case = {"rows": 150, "vocabulary": 1000, "temperature": temperature, "banned": range(128, 512)}
    assert_same(draw("triton", **case), draw("reference", **case))


def test_choice_among_many_parts(monkeypatch):
    """Six parts, two per step; of equal logits, that of the first part wins."""
    monkeypatch.setattr(op, "pick", lambda *_: configs.Config({"BLOCK_R": 16, "BLOCK_V": 128, "BLOCK_D": 16}))
    monkeypatch.setattr(op, "SAMPLE_TOKEN_CHOICE", configs.Config({"BLOCK_R": 8, "BLOCK_P": 2}))
    assert_same(draw("triton"), draw("reference"))
    ids, _ = draw("triton", rows=3, bias=False, scale=0.0, temperature=0.0)
    assert ids.tolist() == [0, 0, 0]


@pytest.mark.parametrize("by_pointer", [True, False])
@pytest.mark.parametrize("name, dim", [("hidden", 0), ("weight", 0), ("counters", 0), ("counters", 1)])
def test_rows_that_are_far_from_each_other(monkeypatch, name, dim, by_pointer):
    if by_pointer:
        monkeypatch.setattr(op, "target", lambda: "sm_80")
    inputs = sample_inputs(seeded(0), 5, 16, 100, dtype=torch.float16, device=DEVICE)
    far = inputs | {name: spread(inputs[name], dim)}
    got, want = (sample_token(**x, seed=1, backend="triton") for x in (far, inputs))
    assert all(map(torch.equal, got, want))
