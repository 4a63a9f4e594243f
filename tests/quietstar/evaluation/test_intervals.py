"""Intervals against published examples."""

import math
import random

import pytest

from quietstar.evaluation.intervals import mean_interval, paired, student, wilson


# Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
@pytest.mark.parametrize(
    "right, questions, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right, questions, low, high):
    assert wilson(right, questions) == pytest.approx((low, high), abs=5e-5)
    assert wilson(questions - right, questions) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def answers(both, first, second, neither):
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [x for x, _ in pairs], [y for _, y in pairs]


# Airway reactivity before and after transplantation, from Fagerland, Lydersen and Laake 2014: Newcombe's interval, the exact
# test. Two media for culturing, from Armitage and Berry 1994: the exact test.
@pytest.mark.parametrize(
    "counts, difference, low, high, p",
    [((1, 1, 7, 12), -6 / 21, -0.507, -0.026, 0.0703), ((20, 12, 2, 16), 10 / 50, 0.0562, 0.3292, 0.0129)],
)
def test_paired(counts, difference, low, high, p):
    found = paired(*answers(*counts))
    assert (found["both"], found["first"], found["second"], found["neither"]) == counts
    assert found["difference"] == pytest.approx(difference)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-4)
    assert found["p"] == pytest.approx(p, abs=5e-5)
    swapped = paired(*reversed(answers(*counts)))
    assert (swapped["low"], swapped["high"], swapped["p"]) == pytest.approx((-found["high"], -found["low"], found["p"]))


@pytest.mark.parametrize("counts", [(4, 0, 0, 0), (0, 0, 0, 4), (0, 4, 0, 0), (3, 0, 0, 3)])
def test_paired_at_the_ends(counts):
    found = paired(*answers(*counts))
    assert -1 <= found["low"] <= found["difference"] <= found["high"] <= 1 and found["low"] < found["high"]
    assert found["p"] == (0.125 if counts[1] else 1)


@pytest.mark.parametrize("freedom, t", [(1, 12.7062), (2, 4.3027), (9, 2.2622), (29, 2.0452), (10**9, 1.9600)])
def test_quantiles_of_students_t(freedom, t):
    assert student(freedom) == pytest.approx(t, abs=5e-5)


def test_mean_interval():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 6.0])
    margin = 3.182446 * math.sqrt(14 / 3 / 4)
    assert (mean, low, high) == pytest.approx((3, 3 - margin, 3 + margin))
    assert mean_interval([0.25]) == (0.25, None, None)
    with pytest.raises(ValueError, match="there must be a value"):
        mean_interval([])
