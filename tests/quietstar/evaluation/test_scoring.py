"""Scores of given tokens against the wrapper's forward, and against what generation draws from."""

import pytest
import torch

from quietstar.evaluation import scoring
from quietstar.evaluation.scoring import score_tokens
from tests.quietstar.common import drawn_from, wrap

TEXTS = [[5, 9, 33, 4, 17, 60, 8], [40, 3, 3, 22]]
PLACES = [[1, 3, 4, 6], [2, 3]]


@pytest.fixture(params=["official", "paper"])
def qs(tiny, request):
    return wrap(tiny("llama"), thoughts=2, thought_tokens=3, lookahead=2, preset=request.param).eval()


@pytest.mark.parametrize("think", ["always", "never", 3.5])
def test_scores_are_what_generation_draws_from(qs, think):
    thought = []
    for text, places, (base, scored) in zip(TEXTS, PLACES, score_tokens(qs, TEXTS, PLACES, think), strict=True):
        for i, place in enumerate(places):
            plain, mixed = drawn_from(qs, text[:place], "never"), drawn_from(qs, text[:place], think)
            assert float(base.logprob[i]) == pytest.approx(float(plain[text[place]]), abs=2e-5)
            assert float(scored.logprob[i]) == pytest.approx(float(mixed[text[place]]), abs=2e-5)
            assert bool(scored.likeliest[i]) == (int(mixed.argmax()) == text[place])
            thought.append(not torch.allclose(plain, mixed, atol=1e-3))
    assert any(thought) == (think != "never") and all(thought) == (think == "always"), "the threshold divides the places"


def test_among_some_tokens(qs):
    allowed = torch.tensor([4, 8, 33])
    whole = score_tokens(qs, [[5, 9, token] for token in (4, 8, 33)], [[2]] * 3)
    among = score_tokens(qs, [[5, 9, token] for token in (4, 8, 33)], [[2]] * 3, allowed=[allowed] * 3)
    for kind in (0, 1):
        p = torch.cat([scores[kind].logprob for scores in whole]).exp()
        assert torch.allclose(torch.cat([scores[kind].logprob for scores in among]).exp(), p / p.sum(), atol=1e-5)
        assert [bool(scores[kind].likeliest) for scores in among] == (p == p.max()).tolist()


@pytest.mark.parametrize("name, size", [("ROWS", 20), ("LOGITS", 400)])
def test_in_parts(qs, monkeypatch, name, size):
    whole = score_tokens(qs, TEXTS, PLACES)
    monkeypatch.setattr(scoring, name, size)
    for before, now in zip(whole, score_tokens(qs, TEXTS, PLACES), strict=True):
        for x, y in zip(before, now, strict=True):
            assert torch.allclose(x.logprob, y.logprob, atol=2e-5) and torch.equal(x.likeliest, y.likeliest)


@pytest.mark.parametrize("think", ["always", "never", 3.5])
def test_no_places(qs, think):
    """As lm_eval's empty continuations: nothing to score, and the other texts' scores are as without it."""
    alone, beside = score_tokens(qs, TEXTS[:1], [[]], think), score_tokens(qs, TEXTS, [[], PLACES[1]], think)
    assert all(len(x.logprob) == len(x.likeliest) == 0 for x in (*alone[0], *beside[0]))
    assert torch.allclose(beside[1][1].logprob, score_tokens(qs, TEXTS, PLACES, think)[1][1].logprob, atol=2e-5)
