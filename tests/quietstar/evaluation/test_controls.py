"""Own thoughts are those that evaluation samples; another text's are at the same places."""

import pytest
import torch

from quietstar.evaluation.losses import token_losses, with_own_thoughts, with_thoughts_of_another
from tests.quietstar.common import texts_of, wrap

LENGTHS = (9, 12, 7)


@pytest.fixture(params=[{}, {"end_token_id": 2, "stop_threshold": 0.02}], ids=["whole", "ragged"])
def qs(tiny, request):
    return wrap(tiny("llama"), spread=0.2, thoughts=2, thought_tokens=3, lookahead=3, **request.param)


@pytest.fixture
def texts():
    return texts_of(LENGTHS)


def test_own_thoughts_are_those_of_the_evaluation(qs, texts):
    own = with_own_thoughts(qs, texts, batch_size=2)
    assert [tuple(x["thought_ids"].shape) for x in own] == [(length, 1, 3) for length in LENGTHS]
    losses, same = token_losses(qs, texts), token_losses(qs, own)
    torch.testing.assert_close(same.mixed, losses.mixed, atol=1e-5, rtol=0)
    assert torch.equal(same.text, losses.text) and torch.equal(same.place, losses.place)
    if qs.thought_config.stop_threshold is not None:
        assert {0, 3} < set(torch.cat([x["thought_lengths"] for x in own]).flatten().tolist())


def test_own_thoughts_at_chosen_places(qs, texts):
    places = torch.tensor([2, 5, 6])
    everywhere = with_own_thoughts(qs, texts)
    chosen = with_own_thoughts(qs, [{**x, "anchors": places} for x in texts])
    for some, every in zip(chosen, everywhere, strict=True):
        assert torch.equal(some["thought_ids"], every["thought_ids"][places])


def test_thoughts_of_another_are_at_the_same_places(qs, texts):
    own = with_own_thoughts(qs, texts)
    others = with_thoughts_of_another(own)
    for name in own[0].keys() - {"input_ids"}:
        first, second, third = (x[name] for x in own)
        assert torch.equal(others[0][name], second[:9])
        assert torch.equal(others[1][name], torch.cat([third, third[:5]]))  # where the other text has ended, from its start
        assert torch.equal(others[2][name], first[:7])
    assert [x["input_ids"] is y["input_ids"] for x, y in zip(own, others, strict=True)] == [True] * 3
    assert not torch.allclose(token_losses(qs, own).mixed, token_losses(qs, others).mixed, atol=1e-3)


def numbered(places, **columns):
    """An example of six tokens whose thoughts are numbered by their place in the list."""
    thoughts = torch.arange(len(places))[:, None, None] + 10 * len(places)
    return {"input_ids": torch.arange(6), "anchors": torch.tensor(places), "thought_ids": thoughts, **columns}


def test_neighbours_are_not_each_others_other_text():
    """They may be parts of one document; each text's thoughts are used once."""
    examples = [numbered(range(count)) for count in (1, 2, 3, 4, 5)]
    first = [int(x["thought_ids"][0, 0, 0]) // 10 for x in with_thoughts_of_another(examples)]
    assert first == [3, 4, 5, 1, 2]


def test_unused_places_and_padding_neither_give_nor_take_a_thought():
    padded = numbered([0, 1, 4], attention_mask=torch.tensor([0, 1, 1, 1, 1, 1]))  # thoughts 30, 31 and 32
    unused = numbered([2, 3, 5, -1])  # 40 to 43
    nowhere = numbered([-1, -1])
    one, none, other = with_thoughts_of_another([padded, nowhere, unused])
    assert one["thought_ids"].flatten().tolist() == [30, 40, 41]
    assert other["thought_ids"].flatten().tolist() == [31, 32, 31, 43]
    assert none is nowhere
    with pytest.raises(ValueError, match="need at least 2 examples with thoughts, got 1"):
        with_thoughts_of_another([padded, nowhere])
