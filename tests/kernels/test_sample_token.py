"""sample_token: its definition in plain Python, its distribution, known draws, what changes a draw and what doesn't."""

import math

import pytest
import torch

from quietstar_kernels import _dispatch, sample_token
from quietstar_kernels.checks import LARGEST_FP32
from quietstar_kernels.philox import draw_words
from quietstar_kernels.sample_token import _forward
from quietstar_kernels.testing import assert_close_as_plain, plain_log_softmax, sample_inputs

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"banned": (3, 7, 11)},
    {"softcap": 4.0},
    {"scale": 0.5, "softcap": 3.0, "temperature": 2.0, "banned": (0, 5)},
]
SEED = 0x9E3779B97F4A7C15


def make(seed, rows, width=8, vocabulary=333, bias=True, dtype=torch.float32, device=None):
    return sample_inputs(torch.Generator().manual_seed(seed), rows, width, vocabulary, bias, dtype, device)


def serves(backend, device, dtype):
    return _dispatch.why_not("sample_token", backend, device, dtype) is None


def log_softmax(inputs, dtype=torch.float64, **options):
    """[R,V] in plain PyTorch."""
    hidden, weight, bias = (x if x is None else x.to(dtype) for x in list(inputs.values())[:3])
    return plain_log_softmax(hidden, weight, bias, **options)


def defined_draws(inputs, seed, **options):
    """The docstring of sample_token in fp64, row by row. Returns ids, and how close each draw was to another id."""
    inputs = {name: x if x is None else x.cpu() for name, x in inputs.items()}
    logp = log_softmax(inputs, **options)
    V = logp.shape[1]
    blocks = range(0, V, 128)
    signed = seed - 2**64 if seed >= 2**63 else seed
    word0, word1 = draw_words(inputs["counters"], torch.arange(len(blocks)), signed)
    ids, margins = [], []
    for row, weights in enumerate(logp.exp().tolist()):
        scores = []
        for block, first in enumerate(blocks):
            total = sum(weights[first : first + 128])
            exponential = -math.log1p(-(int(word0[row, block]) + 0.5) / 2**32)
            scores.append(math.log(total) - math.log(exponential) if total else -math.inf)
        best = max(range(len(scores)), key=scores.__getitem__)
        inside = weights[128 * best : 128 * best + 128]
        goal = (int(word1[row, best]) + 0.5) / 2**32 * sum(inside)
        running, nearest = 0.0, math.inf
        drawn = None
        for column, weight in enumerate(inside):
            running += weight
            nearest = min(nearest, abs(running - goal) / sum(inside)) if weight else nearest
            drawn = 128 * best + column if drawn is None and running > goal else drawn
        ids.append(drawn)
        others = [score for block, score in enumerate(scores) if block != best]
        margins.append(min([nearest] + [scores[best] - score for score in others]))
    return torch.tensor(ids), torch.tensor(margins)


def assert_same_draws(got, want, margins):
    """At most one difference in 1,000 draws, and only if another candidate was within rounding."""
    different = got.cpu() != want
    assert int(different.sum()) <= max(1, len(got) // 1000), f"{int(different.sum())} draws differ"
    assert (margins[different] < 1e-4).all(), f"margins {margins[different].tolist()}"


@pytest.mark.parametrize(
    "options, vocabulary",
    [({}, vocabulary) for vocabulary in (1, 16, 127, 128, 1000)] + [(x, size) for x in OPTIONS for size in (129, 333)],
    ids=str,
)
def test_draws_are_those_of_the_definition(backend, device, options, vocabulary):
    options = {"banned": (), **options}
    options["banned"] = tuple(i for i in options["banned"] if i < vocabulary - 1)
    inputs = make(vocabulary, 200, vocabulary=vocabulary, device=device)
    got, _ = sample_token(**inputs, seed=SEED, backend=backend, **options)
    assert_same_draws(got, *defined_draws(inputs, SEED, **options))


def test_a_large_vocabulary(backend, device, interpreted):
    """34 rows fill more than one buffer of logits, on all back ends with a fixed buffer."""
    inputs = make(0, 34, 4, 3_001 if interpreted else 130_001, device=device)
    assert_same_draws(sample_token(**inputs, seed=3, backend=backend)[0], *defined_draws(inputs, 3))


KNOWN = {  # ids of 16 counters with the inputs of test_known_draws
    5: [165, 27, 201, 27, 214, 80, 80, 100, 146, 292, 210, 112, 165, 228, 164, 41],
    2**63 + 12345: [268, 12, 294, 186, 239, 281, 81, 48, 264, 233, 191, 4, 268, 209, 9, 77],
}


@pytest.mark.parametrize("seed", KNOWN)
def test_known_draws(backend, device, seed):
    """Logits are multiples of 1/32 below 8, exact in any dtype: these draws are part of the package's definition."""
    j = torch.arange(300.0)
    weight = torch.stack([j * 7 % 32 / 8, j * 5 % 16 / 8, torch.ones(300)], 1)
    counters = [[i * 1000003, i * 37, i % 4, i % 5] for i in range(12)] + [[0, 0, 0, i] for i in range(4)]
    hidden = torch.tensor([[0.5, 1.0, 0.25], [1.0, -0.5, 2.0]]).repeat(8, 1)
    inputs = {"hidden": hidden, "weight": weight, "bias": None, "counters": torch.tensor(counters).int()}
    ids, margins = defined_draws(inputs, seed)
    assert margins.min() > 1e-4 and ids.tolist() == KNOWN[seed]
    inputs["counters"] = inputs["counters"].to(device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        if serves(backend, device, dtype):
            same = inputs | {"hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype)}
            assert sample_token(**same, seed=seed, backend=backend)[0].tolist() == KNOWN[seed], dtype


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_extreme_counters(backend, device, seed):
    ends = torch.tensor([[0, 0, 0, 0], [2**31 - 1, 2**31 - 1, 65535, 65535], [-1, 2**31 - 1, 0, 65535], [5, 0, 65535, 0]])
    inputs = make(0, 48, device=device) | {"counters": ends.repeat(12, 1).int().to(device)}
    draws, _ = sample_token(**inputs, seed=seed, backend=backend)
    assert_same_draws(draws, *defined_draws(inputs, seed % 2**64))


@pytest.mark.parametrize("options, vocabulary", [(OPTIONS[0], 200), (OPTIONS[-1], 333)], ids=str)
def test_chi_square(options, vocabulary):
    """Many draws from one distribution, by the definition. Cells with fewer than 5 expected draws are merged."""
    inputs, draws = make(vocabulary, 1, vocabulary=vocabulary), 100_000
    position = torch.arange(draws)
    counters = torch.stack([position % 3, position // 3, position % 7, position % 11], 1).int()
    many = inputs | {"hidden": inputs["hidden"].expand(draws, -1), "counters": counters}
    ids, _ = sample_token(**many, seed=1, backend="cpu", **options)
    counts = torch.bincount(ids, minlength=vocabulary)
    expected = draws * log_softmax(inputs, **options)[0].exp()
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert len(expected) > 50
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-4
    wrong = 1.1 * observed
    assert torch.special.gammaincc(freedom, ((wrong - expected) ** 2 / expected).sum() / 2) < 1e-4


@pytest.mark.parametrize(
    "options, temperature, dtype",
    [
        (options, temperature, dtype)
        for options in ({}, {"banned": (3, 7)}, {"scale": 0.5, "softcap": 3.0})
        for temperature in (0.0, 0.7, 1.0)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if dtype == torch.float32 or temperature == 0.7
    ],
    ids=str,
)
def test_logprob(backend, device, options, temperature, dtype):
    """The log-probability of what was drawn; at temperature 0 of the lowest argmax, at temperature 1."""
    if not serves(backend, device, dtype):
        pytest.skip(f"{backend} does not compute in {dtype} here")
    inputs = make(0, 50, dtype=dtype, device=device)
    ids, logprob = sample_token(**inputs, seed=3, temperature=temperature, backend=backend, **options)
    options = options | {"temperature": temperature or 1.0}
    truth, plain = log_softmax(inputs, **options), log_softmax(inputs, dtype, **options)
    drawn = ids[:, None]
    assert ids.dtype == torch.int64 and logprob.dtype == torch.float32
    assert_close_as_plain(logprob, plain.gather(1, drawn)[:, 0], truth.gather(1, drawn)[:, 0], "logprob")
    if temperature == 0:
        assert torch.equal(ids, truth.argmax(1))


def test_argmax_takes_the_lowest_of_equals(backend, device):
    weight = torch.zeros(400, 2, device=device)
    weight[[350, 130, 299]] = torch.tensor([1.0, 2.0], device=device)
    inputs = make(0, 6, 2, device=device) | {"hidden": torch.ones(6, 2, device=device), "weight": weight, "bias": None}
    draw = lambda banned: sample_token(  # noqa: E731
        **inputs, seed=0, temperature=0, banned=banned, backend=backend
    )[0].tolist()
    assert draw(()) == [130] * 6 and draw((130,)) == [299] * 6 and draw((130, 299, 350)) == [0] * 6


def test_banned_ids_are_never_drawn(backend, device):
    """Though they are far likelier than the others; one whole block is banned."""
    allowed = {5, 7, 331}
    banned = [i for i in range(333) if i not in allowed]
    inputs = make(0, 2000, device=device)
    inputs["bias"][list(allowed)] -= 1000
    ids, logprob = sample_token(**inputs, seed=0, banned=banned, backend=backend)
    assert set(ids.tolist()) == allowed and logprob.isfinite().all()


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive(backend, device, scale):
    """It reverses the order of the logits, or makes them equal."""
    inputs = make(0, 100, device=device)
    draws, _ = sample_token(**inputs, seed=1, scale=scale, softcap=5.0, banned=(2,), backend=backend)
    assert_same_draws(draws, *defined_draws(inputs, 1, scale=scale, softcap=5.0, banned=(2,)))
    draws, _ = sample_token(**inputs, seed=1, scale=scale, temperature=0, banned=(0,), backend=backend)
    assert torch.equal(draws.cpu(), log_softmax(inputs, scale=scale, banned=(0,)).argmax(1).cpu())


def test_draws_do_not_depend_on_the_split(backend, device):
    inputs = make(0, 500, device=device)
    shared = {"weight": inputs["weight"], "bias": inputs["bias"], "seed": 9, "backend": backend}
    ids, logprob = sample_token(**inputs, seed=9, backend=backend)
    again, logprob_again = sample_token(**inputs, seed=9, backend=backend)
    assert torch.equal(ids, again) and torch.equal(logprob, logprob_again)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    for rows in (order, *torch.arange(500).split([3, 97, 400]), torch.tensor([250])):
        part, _ = sample_token(inputs["hidden"][rows], counters=inputs["counters"][rows], **shared)
        assert torch.equal(part, ids[rows])


def test_seed_and_every_counter_matter(backend, device):
    inputs = make(0, 200, device=device) | {"counters": torch.tensor([[1, 2, 3, 4]], device=device).int().repeat(200, 1)}
    inputs["hidden"] = inputs["hidden"][:1].repeat(200, 1)
    base, _ = sample_token(**inputs, seed=0, backend=backend)
    assert (base == base[0]).all()
    for column in range(4):
        counters = inputs["counters"].clone()
        counters[:, column] += torch.arange(200, device=device)
        ids, _ = sample_token(**(inputs | {"counters": counters}), seed=0, backend=backend)
        assert ids[0] == base[0] and len(ids.unique()) > 20, f"counter {column}"
    seeds = [0, 1, 2**32, 2**40, 2**63, 2**64 - 1]
    varied = make(0, 200, device=device)
    draws = [sample_token(**varied, seed=seed, backend=backend)[0] for seed in seeds]
    assert all((a != b).sum() > 100 for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[-1], sample_token(**varied, seed=-1, backend=backend)[0])


@pytest.mark.parametrize("seed", [-5, 2**40 + 3])
def test_a_seed_on_the_device(backend, device, seed):
    """The numbers are those of the same seed in Python."""
    inputs = make(0, 50, device=device)
    want = sample_token(**inputs, seed=seed, backend=backend)
    got = sample_token(**inputs, seed=torch.tensor([7, seed], device=device)[1], backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(0, 3, 20), (1, 1, 1)], ids=str)
def test_edges(backend, device, shape, temperature):
    ids, logprob = sample_token(**make(0, *shape, device=device), seed=0, temperature=temperature, backend=backend)
    assert ids.tolist() == [0] * shape[0] and logprob.tolist() == [0.0] * shape[0]


NOT_FINITE = {  # (what, ids, to what) is set in inputs of 333 ids, whose logits all differ: the rows that are then not finite
    "NaN state": ("hidden", [3], math.nan, [3]),
    "infinite state": ("hidden", [3], math.inf, [3]),
    "NaN weight": ("weight", [200], math.nan, range(20)),
    "NaN weight, last id": ("weight", [332], math.nan, range(20)),
    "NaN bias": ("bias", [0], math.nan, range(20)),
    "NaN bias, banned id": ("bias", [7], math.nan, range(20)),
    "infinite bias": ("bias", [140], math.inf, range(20)),
    "infinite bias, banned id": ("bias", [7], math.inf, range(20)),
    "a bias of -inf": ("bias", [0, 140, 332], -math.inf, []),
    "a block of -inf": ("bias", range(128, 256), -math.inf, []),
    "all -inf": ("bias", range(333), -math.inf, range(20)),
    "all but one -inf": ("bias", range(332), -math.inf, []),
    "all far below": ("bias", range(333), -3e38, range(20)),
    "all far above": ("bias", range(333), 3e38, range(20)),
    "one far above": ("bias", [140], 3e38, range(20)),
    "a block far below": ("bias", range(128, 256), -3e38, []),
}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("case", NOT_FINITE)
def test_logits_that_are_not_finite(backend, device, case, temperature):
    """They give id -1 and log-probability NaN, and change nothing in other rows."""
    name, places, value, rows = NOT_FINITE[case]
    inputs = make(0, 20, device=device)
    options = {"temperature": temperature, "banned": (7, 11), "seed": 1, "backend": backend}
    before, _ = sample_token(**inputs, **options)
    inputs[name] = inputs[name].clone()
    inputs[name][torch.tensor(places)] = value
    ids, logprob = sample_token(**inputs, **options)
    want = torch.isin(torch.arange(20), torch.tensor(list(rows), dtype=torch.int64))
    assert torch.equal((ids == -1).cpu(), want) and torch.equal(logprob.isnan().cpu(), want)
    assert logprob[~want].isfinite().all() and ((ids[~want] >= 0) & (ids[~want] < 333)).all()
    if name == "hidden":
        assert torch.equal(ids[~want], before[~want])
    elif value == -math.inf or case == "a block far below":
        assert not torch.isin(ids.cpu(), torch.tensor(places)).any()
        inputs[name][torch.tensor(places)] = 0
        masked = sample_token(**inputs, **(options | {"banned": sorted({7, 11, *places})}))[0] if not all(want) else ids
        assert torch.equal(ids, masked)


@pytest.mark.parametrize("vocabulary", [1, 10, 333])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_infinite_logit_stays_so_under_a_soft_cap(backend, device, vocabulary, temperature):
    inputs = make(0, 6, vocabulary=vocabulary, device=device)
    inputs["hidden"][:, 0], inputs["weight"][:, 0] = 0, 1
    inputs["hidden"][1, 0], inputs["hidden"][2, 0], inputs["hidden"][3, 0] = math.inf, -math.inf, math.nan
    ids, logprob = sample_token(**inputs, seed=0, softcap=3.0, temperature=temperature, backend=backend)
    assert ((ids == -1) == logprob.isnan()).all()
    assert (ids == -1).tolist() == [False, True, True, True, False, False]


OVERFLOWS = [
    {"softcap": 1e39},
    {"scale": 1e39},
    {"scale": -1e39},
    {"temperature": 1e-45},
    {"temperature": 5e-324},
    {"scale": 1e20, "temperature": 1e-20},
    {"scale": 1e20, "softcap": 1e-20},
    {"softcap": 1e20, "temperature": 1e-20},
]


@pytest.mark.parametrize("options", OVERFLOWS, ids=str)
def test_options_that_overflow(backend, device, options):
    """No row is finite, not even one whose products are all zero."""
    inputs = make(0, 4, bias=False, device=device)
    inputs["hidden"][0] = 0
    for dtype in (torch.float32, torch.float64):
        if serves(backend, device, dtype):
            cast = inputs | {name: inputs[name].to(dtype) for name in ("hidden", "weight")}
            ids, logprob = sample_token(**cast, seed=0, backend=backend, **options)
            assert ids.tolist() == [-1] * 4 and logprob.isnan().all() and logprob.dtype == torch.float32


@pytest.mark.parametrize("options", [{"scale": 1e38}, {"temperature": 1e-38}, {"scale": -1e38}, {"scale": 1e31}], ids=str)
def test_products_that_overflow(backend, device, options):
    """A row without products keeps its distribution."""
    inputs = make(0, 4, bias=False, device=device)
    inputs["hidden"][0] = 0
    ids, logprob = sample_token(**inputs, seed=0, backend=backend, **options)
    assert ids[0] == sample_token(**inputs, seed=0, backend=backend)[0][0] and (ids[1:] == -1).all()
    assert logprob[0].isfinite() and logprob[1:].isnan().all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 1e30}], ids=str)
def test_the_largest_temperature(backend, device, options):
    """All ids are equally likely, on every back end; ``test_bad_input`` has temperatures above."""
    inputs, options = make(0, 40, device=device), {"seed": 0, "temperature": LARGEST_FP32, **options}
    (ids, logprob), (want, _) = (sample_token(**inputs, backend=name, **options) for name in (backend, "reference"))
    assert torch.equal(ids, want)
    assert (logprob + math.log(len(inputs["weight"]))).abs().max() < 1e-5


def inside(x, before, after):
    """x as a part of wider rows."""
    return torch.nn.functional.pad(x, (before, after))[:, before : before + x.shape[1]]


STRIDED = {
    "columns": lambda x: x.T.contiguous().T,
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "odd step": lambda x: inside(x, 0, 1),
    "odd start": lambda x: inside(x, 1, 15),
}


@pytest.mark.parametrize("stride", STRIDED.values(), ids=STRIDED)
def test_strided(backend, device, stride):
    inputs = make(0, 50, 16, device=device)
    strided = inputs | {name: stride(inputs[name]) for name in ("hidden", "weight", "counters")}
    assert not any(strided[name].is_contiguous() for name in ("hidden", "weight", "counters"))
    want, got = (sample_token(**x, seed=0, backend=backend)[0] for x in (inputs, strided))
    assert torch.equal(want, got)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_opcheck(backend, device, options):
    hidden, weight, bias, counters = make(0, 5, 3, 20, bias=bool(options), device=device).values()
    temperature, banned = options.get("temperature", 1.0), list(options.get("banned", ()))
    rest = (options.get("scale"), options.get("softcap"), temperature, banned, backend)
    torch.library.opcheck(_forward, (hidden, weight, counters, torch.tensor(-5, device=device), bias, *rest))


def test_compiles_without_a_graph_break(backend, device):
    inputs = make(0, 40, device=device)
    draw = lambda **inputs: sample_token(**inputs, seed=5, softcap=5.0, banned=(3,), backend=backend)  # noqa: E731
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(**inputs), draw(**inputs), strict=True))
