"""The tools of the other tests: the rule rejects wrong results, and layouts are of their kind."""

import pytest
import torch

from quietstar_kernels.testing import LAYOUT_KINDS, assert_close_as_plain, assert_op_close_as_plain, random_layout

TRUTH = torch.tensor([[1.0, -2.0], [0.0, -torch.inf]], dtype=torch.float64)


def test_rule_accepts_twice_the_plain_error_and_no_more():
    plain = TRUTH.float()
    plain[0, 0] += 1e-3
    for factor, fine in ((1.9, True), (2.1, False)):
        got = TRUTH.float()
        got[0, 1] += factor * 1e-3
        if fine:
            assert_close_as_plain(got, plain, TRUTH)
        else:
            with pytest.raises(AssertionError, match=r"dq: error 0.0021 at \[0, 1\] .* exceeds 0.002.* by .*: got -1.99"):
                assert_close_as_plain(got, plain, TRUTH, "dq")


def test_rule_has_a_floor_of_a_few_ulps():
    got = TRUTH.float()
    got[0, 0] += 4 * torch.finfo(torch.float32).eps
    assert_close_as_plain(got, TRUTH.float(), TRUTH)
    got[0, 0] += 100 * torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_as_plain(got, TRUTH.float(), TRUTH)
    assert_close_as_plain(got, TRUTH.float(), TRUTH, magnitude=100)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rule_refuses_a_number_that_is_not_finite(value):
    got = TRUTH.float()
    got[1, 0] = value
    with pytest.raises(AssertionError, match=r"error inf at \[1, 0\]"):
        assert_close_as_plain(got, TRUTH.float(), TRUTH)


def test_rule_refuses_a_finite_number_for_infinity_other_shapes_and_a_useless_plain():
    got = TRUTH.float()
    got[1, 1] = -1e30
    with pytest.raises(AssertionError, match=r"error inf at \[1, 1\]"):
        assert_close_as_plain(got, TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match=r"got shape \[2\]"):
        assert_close_as_plain(got[0], TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match="can't judge"):
        assert_close_as_plain(TRUTH.float(), torch.full((2, 2), torch.inf), TRUTH)


def test_op_rule_sees_a_wrong_output_and_a_wrong_gradient():
    inputs = {"x": torch.linspace(1, 2, 5)}
    grad = (torch.ones(5),)
    square = lambda x: x * x  # noqa: E731
    assert_op_close_as_plain(lambda x: x**2, square, inputs, grad)
    with pytest.raises(AssertionError, match="case output 0: error"):
        assert_op_close_as_plain(lambda x: x**2 + 1e-3, square, inputs, grad, "case")
    with pytest.raises(AssertionError, match="case gradient of x: error"):
        assert_op_close_as_plain(lambda x: x * x.detach(), square, inputs, grad, "case")


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_random_layouts_hold_what_their_kind_says(kind):
    layouts = [random_layout(torch.Generator().manual_seed(seed), kind) for seed in range(60)]
    again = [random_layout(torch.Generator().manual_seed(seed), kind) for seed in range(60)]
    for a, b in zip(layouts, again, strict=True):
        assert torch.equal(a.dense_mask(), b.dense_mask())
    t = [torch.arange(layout.L) for layout in layouts]
    facts = {
        "every": any(layout.P == layout.L > 5 for layout in layouts),
        "anchors": any((x.anchor == -1).any() and (x.anchor >= 0).any() for x in layouts),
        "left": any(layout.lo.max() > 0 for layout in layouts),
        "right": any((x.P == x.L) and x.length[:, -1].max() == 0 < x.length.max() for x in layouts),
        "both": any(x.length[:, :1].max() == 0 < x.length.max() for x in layouts if x.P == x.L),
        "documents": any(len(layout.lo.unique()) > 2 for layout in layouts),
        "any_lo": any((x.lo[:, 1:] < x.lo[:, :-1]).any() for x in layouts),
        "ragged": any(len(layout.length.unique()) > 2 for layout in layouts),
        "no_anchors": all(layout.P == layout.R == 0 for layout in layouts),
        "one": all((x.B, x.L, x.P, x.N, x.S) == (1, 1, 1, 1, 1) for x in layouts),
    }
    assert facts[kind]
    assert all(((x.lo >= 0) & (x.lo <= u)).all() for x, u in zip(layouts, t, strict=True))
