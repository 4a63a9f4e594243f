"""thought_decode: error rule over random layouts, comparison with attention step by step, no reads of unwritten rows."""

from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, _dispatch, thought_decode
from quietstar_kernels.branches import LENGTH
from quietstar_kernels.testing import (
    LAYOUT_KINDS,
    assert_close_as_plain,
    assert_op_close_as_plain,
    attention_inputs,
    decode_inputs,
    plain_attention,
    plain_decode,
    random_layout,
)
from quietstar_kernels.thought_decode import _forward
from tests.kernels.drawn import pick, seeded, spread

KINDS = (*LAYOUT_KINDS, "packed")
GROUP = 50  # random layouts in one test
DTYPES = [torch.float32] * 6 + [torch.float16, torch.bfloat16]
WIDTHS = [(8, 8), (16, 16), (3, 5), (17, 1), (1, 16)]
CUDA_WIDTHS = [(64, 64), (64, 64), (128, 128), (256, 256)]
HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4}


def serves(backend, device, dtype, K=64, E=64):
    return _dispatch.why_not("thought_decode", backend, device, dtype, K=K, E=E) is None


@pytest.fixture
def case(backend, device, compiled):
    """``random_case`` on the device of the test, in the dtypes and widths that the back end computes."""
    dtypes = [dtype for dtype in DTYPES if serves(backend, device, dtype)]
    if backend == "cuda":
        return partial(random_case, device=device, dtypes=dtypes, widths=CUDA_WIDTHS)
    if compiled:
        return partial(
            random_case, device=device, dtypes=[torch.float32, torch.bfloat16], widths=[(64, 64), (128, 128)], alike=True
        )
    return partial(random_case, device=device, dtypes=dtypes, widths=WIDTHS)


@pytest.fixture
def shape(backend):
    """For inputs that the back end serves: narrow ones in fp32, or the narrowest of the CUDA kernels."""
    if backend == "cuda":
        return {"width": 64, "value_width": 64, "dtype": torch.bfloat16}
    return {"width": 8, "value_width": 4, "dtype": torch.float32}


def random_case(seed, device, dtypes, widths, alike=False, **sizes):
    """Layout, inputs and options, all drawn from one seed; ``alike``: all options or none."""
    generator = seeded(seed)
    layout = random_layout(generator, KINDS[seed % len(KINDS)], device=device, **sizes)
    options = {
        "step": int(torch.randint(layout.S, (), generator=generator)),
        "scale": pick(generator, [None, None, 0.3]),
        "window": pick(generator, [None, None, 1, 3, 6]),
        "softcap": pick(generator, [None, None, 5.0, 1.0]),
    }
    heads, groups = pick(generator, [(1, 1), (2, 1), (4, 2), (3, 3), (3, 1), (8, 1)])
    widths, dtype = pick(generator, widths), pick(generator, dtypes)
    sinks, strided = pick(generator, [True, False]), pick(generator, [True, False])
    if alike:
        strided = False
        options |= {"window": 3, "softcap": 5.0} if sinks else {"window": None, "softcap": None}
    inputs = decode_inputs(generator, layout, heads, groups, *widths, sinks, strided, dtype)
    return layout, inputs, options


def check(backend, layout, inputs, what, **options):
    op = partial(thought_decode, backend=backend)
    assert_op_close_as_plain(op, plain_decode, inputs, (), what, layout=layout, **options)


@pytest.mark.parametrize("group", range(10))
def test_error_rule_on_random_layouts(backend, group, case, few):
    for seed in few(range(group * GROUP, (group + 1) * GROUP), 5):
        layout, inputs, options = case(seed)
        check(backend, layout, inputs, f"seed {seed} {layout} {options}", **options)


def test_error_rule_on_longer_texts(backend, case, few):
    for seed in few(range(1000, 1012), 6):
        layout, inputs, options = case(seed, max_batch=2, max_text=150)
        check(backend, layout, inputs, f"seed {seed} {layout} {options}", **options)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_rows_that_are_far_from_each_other(backend, device, shape, interpreted, dim):
    """By more than 32 bits; batch rows of a grid, heads, rows and own rows of a tree, also those in the nodes above."""
    shape["dtype"] = torch.float16 if interpreted else torch.bfloat16
    tree = ThoughtLayout.tree(*torch.tensor([[[0, -1]] * 2, [[-1, 0]] * 2, [[3, 3]] * 2]), text_length=5)
    layout = (tree if dim else ThoughtLayout.every_position(2, 5, 1, 3)).to(device)
    tensors = {name: x for name, x in decode_inputs(seeded(0), layout, **shape).items() if x is not None}
    far = {n: spread(x, dim) if 1 < x.dim() > dim + 1 and x.shape[dim] > 1 else x for n, x in tensors.items()}
    want, got = (thought_decode(**x, layout=layout, step=1, backend=backend) for x in (tensors, far))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["every", "anchors", "left", "documents", "ragged"])
def test_step_by_step_equals_attention(backend, kind, device, few, shape):
    """By the error rule: attention and decode sum in different orders."""
    generator = seeded(3)
    layout = random_layout(generator, kind, max_text=20, device=device)
    inputs = attention_inputs(generator, layout, sinks=True, **shape)
    upcast = {name: x.double() for name, x in inputs.items()}
    q, k, v, sinks = inputs.values()
    L, thoughts = layout.L, layout.P * layout.N
    for options in few([{"window": 4}, {}, {"softcap": 2.0}, {"scale": 1.0}], 2):
        plain, truth = (plain_attention(**x, layout=layout, **options)[0] for x in (inputs, upcast))
        own = {"k_own": torch.full_like(k[:, :, L:], torch.nan), "v_own": torch.full_like(v[:, :, L:], torch.nan)}
        own = {name: x.unflatten(2, (thoughts, layout.S)) for name, x in own.items()}
        for step in range(layout.S):
            rows = slice(L + step, None, layout.S)
            own["k_own"][:, :, :, step], own["v_own"][:, :, :, step] = k[:, :, rows], v[:, :, rows]
            text = {"k_text": k[:, :, :L], "v_text": v[:, :, :L]}
            got = thought_decode(
                q[:, :, rows], **text, **own, layout=layout, step=step, sinks=sinks, backend=backend, **options
            )
            assert_close_as_plain(got, plain[:, :, rows], truth[:, :, rows], f"step {step} {options}")


def test_step_as_a_tensor_and_two_runs(backend, case, device, few):
    for seed in few(range(20), 6):
        layout, inputs, options = case(seed)
        want = thought_decode(**inputs, layout=layout, backend=backend, **options)
        for dtype in (torch.int32, torch.int64):
            step = torch.tensor(options["step"], dtype=dtype, device=device)
            again = thought_decode(**inputs, layout=layout, backend=backend, **(options | {"step": step}))
            assert torch.equal(again, want)
        on = layout.branches.table[..., LENGTH] > options["step"]
        assert (want.transpose(1, 2)[~on] == 0).all()
        assert not want.requires_grad and want.dtype == inputs["q"].dtype


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["every", "anchors", "left", "both", "documents", "ragged"])
def test_nan_that_nobody_may_read(backend, kind, softcap, device, few, shape):
    """NaN in own rows not yet written, in rows that are off, in queries that are off and in padded text."""
    hidden = 0
    if softcap is not None:
        shape["dtype"] = torch.float16
    for seed in few([5, 3, 0, 1, 2], 1):
        generator = seeded(seed)
        layout = random_layout(generator, kind, 2, 10, 2, 4, device)
        step = int(torch.randint(layout.S, (), generator=generator))
        inputs = decode_inputs(generator, layout, 2, 1, sinks=True, **shape)
        live = layout.live().flatten(1, 2)  # [B,P*N,S]
        unread = ~live | (torch.arange(layout.S, device=device) > step)
        seen_text = layout.dense_mask()[:, layout.L :, : layout.L].any(1)
        poison = {
            "q": ~live[:, None, :, step, None],
            "k_own": unread[:, None, :, :, None],
            "v_own": unread[:, None, :, :, None],
            "k_text": ~seen_text[:, None, :, None],
            "v_text": ~seen_text[:, None, :, None],
        }
        bad = inputs | {name: inputs[name].masked_fill(where, torch.nan) for name, where in poison.items()}
        options = {"layout": layout, "step": step, "softcap": softcap, "backend": backend}
        assert torch.equal(thought_decode(**inputs, **options), thought_decode(**bad, **options)), f"seed {seed}"
        hidden += int(unread.sum())
    assert hidden


@pytest.mark.parametrize(
    "kind, options, dtype",
    [
        (kind, options, dtype)
        for kind in ("every", "anchors", "left", "documents", "any_lo", "ragged")
        for options in ({}, {"window": 3}, {"softcap": 2.0})
        for dtype in HUGE
        if dtype == torch.float16 or not options
    ],
    ids=str,
)
def test_huge_values_where_a_thought_may_not_look(backend, kind, options, dtype, device, few, shape):
    if not serves(backend, device, dtype):
        pytest.skip(f"{backend} does not compute in {dtype} here")
    generator = seeded(7)
    layout = random_layout(generator, kind, 2, 12, 2, 3, device=device)
    step = layout.S - 1
    inputs = decode_inputs(generator, layout, 2, 1, sinks=True, **(shape | {"dtype": dtype}))
    before = thought_decode(**inputs, layout=layout, step=step, backend=backend, **options)
    mask = layout.dense_mask(options.get("window"))[:, layout.L + step :: layout.S]
    assert before.shape[2] and not mask.all()
    for thought in few(torch.randperm(before.shape[2], generator=generator).tolist(), 1):
        visible = mask[:, thought, None, :, None]
        text, own = visible[:, :, : layout.L], visible[:, :, layout.L :].unflatten(2, (-1, layout.S))
        changed = {}
        for name in ("k_text", "v_text", "k_own", "v_own"):
            x = inputs[name]
            sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
            changed[name] = torch.where(own if "own" in name else text, x, (sign * HUGE[dtype]).to(device, dtype))
        after = thought_decode(**(inputs | changed), layout=layout, step=step, backend=backend, **options)
        assert torch.equal(before[:, :, thought], after[:, :, thought]), f"thought {thought}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["k_text", "v_text", "k_own", "v_own"])
def test_nan_reaches_the_thoughts_that_see_it(backend, name, dtype, device, shape):
    if not serves(backend, device, dtype):
        pytest.skip(f"{backend} does not compute in {dtype} here")
    generator = seeded(4)
    layout = random_layout(generator, "documents", 2, 40, 2, 4, device)
    step = layout.S - 1
    mask = layout.dense_mask()[:, layout.L + step :: layout.S]
    bad = torch.rand(mask.shape[0], mask.shape[2], generator=generator).to(device) < 0.1
    inputs = decode_inputs(generator, layout, 2, 1, **(shape | {"dtype": dtype}))
    bad[:, layout.L :] &= "own" in name
    bad[:, : layout.L] &= "text" in name
    sees = (mask & bad[:, None]).any(-1)
    assert sees.any() and not sees.all()
    part = bad[:, : layout.L] if "text" in name else bad[:, layout.L :].unflatten(1, (-1, layout.S))
    poisoned = inputs | {name: inputs[name].masked_fill(part[:, None, ..., None], torch.nan)}
    want, got = (thought_decode(**x, layout=layout, step=step, backend=backend).transpose(1, 2) for x in (inputs, poisoned))
    assert got[sees].isnan().all() and torch.equal(got[~sees], want[~sees])


EDGES = {
    "B=0": ThoughtLayout.every_position(0, 3, 2, 2),
    "L=0": ThoughtLayout.every_position(2, 0, 2, 2),
    "P=0": ThoughtLayout.every_position(2, 3, 2, 2).text_only(),
    "one": ThoughtLayout.every_position(1, 1, 1, 1),
    "all off": ThoughtLayout.at(torch.full((2, 3), -1), 2, 2, text_length=4),
    "all off, L=0": ThoughtLayout.at(torch.full((2, 3), -1), 2, 2, text_length=0),
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", EDGES)
def test_edges(backend, name, bits, softcap, device, shape):
    layout = EDGES[name].to(device)
    if bits == 16 and backend != "cuda":
        shape |= {"dtype": torch.float16}
    check(backend, layout, decode_inputs(seeded(0), layout, sinks=True, **shape), name, step=layout.S - 1, softcap=softcap)


@pytest.mark.kernels
def test_opcheck(backend, case, device, few, shape):
    for seed in few(range(2), 1):
        layout, inputs, options = case(seed, dtypes=[shape["dtype"]])
        *tensors, sinks = inputs.values()
        step = torch.tensor(options["step"], dtype=torch.int32, device=device)
        metadata = (*layout.branches[:2], None, step)
        rest = (0.5, options["window"], options["softcap"], backend)
        torch.library.opcheck(_forward, (*tensors, *metadata, sinks, *rest))


def test_compiles_without_a_graph_break(backend, device, shape):
    layout = random_layout(seeded(1), "ragged", device=device)
    inputs = decode_inputs(seeded(2), layout, sinks=True, **shape)

    def decode(step, **inputs):
        return 2 * thought_decode(**inputs, layout=layout, step=step, window=4, backend=backend)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for step in (0, torch.tensor(layout.S - 1, device=device)):
        assert torch.equal(compiled(step, **inputs), decode(step, **inputs))
