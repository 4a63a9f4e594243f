"""The text of experiments/fast.py: its lines are what its docstring shows."""

from itertools import product

import pytest
import torch


@pytest.fixture
def text(scripts):
    return scripts("fast_text")


def test_a_line_is_an_answer_alone_or_after_an_aside_whose_first_copies_may_lack(text):
    sums = text.digit_sums
    digits = torch.randint(10, (3000, 5), generator=torch.Generator().manual_seed(0))
    dropped, asides, helpful = 0, 0, 0
    for line, own in zip(text.mixed_lines(digits, torch.Generator().manual_seed(1)).tolist(), digits.tolist(), strict=True):
        line = line[: line.index(sums.PAUSE)] if sums.PAUSE in line else line
        answer = sum(own) % 10
        assert line[:6] == [*own, 10] and line[-2:] == [answer, 12]
        if len(line) == 8:
            continue
        asides += 1
        assert line[6] == line[-3] == sums.DASH
        aside, running = line[7:-3], [sum(own[:n]) % 10 for n in range(2, 6)]
        dropped += 8 - len(aside)
        helpful += is_written(aside, running)
        assert is_written(aside, running) or is_written(aside, own[:4])
    assert asides / 3000 == pytest.approx(1 - sums.DIRECT, abs=0.03)
    assert helpful / asides == pytest.approx(sums.HELPFUL, abs=0.04)
    assert dropped / (4 * asides) == pytest.approx(text.DROPPED, abs=0.015)


def is_written(aside, tokens):
    """Whether the aside has each of these tokens once or twice, in order."""
    return any(aside == [x for x, n in zip(tokens, counts, strict=True) for _ in range(n)] for counts in COUNTS)


COUNTS = list(product((1, 2), repeat=4))
