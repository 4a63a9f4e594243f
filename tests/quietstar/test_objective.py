"""The objective's functions on numbers small enough to check by hand."""

import pytest
import torch

from quietstar import objective
from quietstar_kernels import ThoughtLayout

IGNORED = objective.IGNORED


def test_targets_of_every_position():
    layout = ThoughtLayout.every_position(1, 5, 1, 6)
    targets = objective.make_targets(torch.tensor([[10, 11, 12, 13, 14]]), None, layout, lookahead=2)
    assert targets.base.tolist() == [[11, 12, 13, 14]]
    assert targets.mix[0, :, 0].tolist() == [[11, 12], [12, 13], [13, 14], [14, IGNORED], [IGNORED, IGNORED]]
    assert targets.rewarded.tolist() == [[True, True, False, False, False]]


def test_targets_stop_at_documents_padding_and_labels():
    layout = ThoughtLayout.from_documents(torch.tensor([[0, 0, 0, 1, 1, -1]]), 1, 6)
    labels = torch.tensor([[10, IGNORED, 12, 13, 14, 15]])
    targets = objective.make_targets(labels, torch.tensor([[1, 1, 1, 1, 1, 0]]), layout, lookahead=2)
    assert targets.base.tolist() == [[IGNORED, 12, IGNORED, 14, IGNORED]]
    assert targets.mix[0, :, 0].tolist() == [
        [IGNORED, 12],
        [12, IGNORED],
        [IGNORED, IGNORED],
        [14, IGNORED],
        [IGNORED, IGNORED],
        [IGNORED, IGNORED],
    ]


def test_reward_compares_with_the_base_at_the_same_target():
    layout = ThoughtLayout.every_position(1, 5, 2, 6)
    targets = objective.make_targets(torch.arange(5)[None], None, layout, lookahead=2)
    nll_base = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    nll_mix = torch.zeros(1, 5, 2, 2)
    nll_mix[0, 0, 1] = torch.tensor([0.5, 0.25])
    nll_base = objective.at_anchors(nll_base, layout, lookahead=2)
    gain = objective.rewards(nll_base, nll_mix, targets, "gain")
    assert gain[0].tolist() == [[3.0, 2.25], [6.0, 6.0], [0, 0], [0, 0], [0, 0]]
    likelihood = objective.rewards(nll_base, nll_mix, targets, "likelihood")
    assert likelihood[0, 0].tolist() == [0.0, -0.75]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", [0.0, 0.0, 2.0]),
        ("mean", [-1.0, -1.0, 2.0]),
        ("leave_one_out", [-1.5, -1.5, 3.0]),
        ("zscore", [-(3**-0.5), -(3**-0.5), 2 * 3**-0.5]),
    ],
)
def test_advantages(name, expected):
    got = objective.ADVANTAGES[name](torch.tensor([1.0, 1.0, 4.0]))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_advantages_are_0_at_anchors_that_are_not_rewarded():
    targets = objective.make_targets(torch.arange(5)[None], None, ThoughtLayout.every_position(1, 5, 2, 6), lookahead=2)
    got = objective.advantages(torch.tensor([3.0, 1.0]).expand(1, 5, 2), targets, "mean")
    assert got[0].tolist() == [[1.0, -1.0], [1.0, -1.0], [0, 0], [0, 0], [0, 0]]


def test_cross_entropy_means_over_what_counts():
    targets = objective.Targets(
        base=torch.tensor([[1, IGNORED, 1]]),
        mix=torch.tensor([[[[1, 1]], [[1, IGNORED]], [[IGNORED, IGNORED]]]]),
        rewarded=torch.tensor([[True, False, False]]),
        sampled=torch.tensor([[[3], [4], [4]]]),
    )
    nll_mix = torch.tensor([[[[1.0, 5.0]], [[3.0, 0.0]], [[0.0, 0.0]]]])
    counts = objective.count(targets)
    assert (counts.base, counts.mix.tolist(), counts.places, counts.tokens) == (2, [2, 1], 1, 3)
    loss = objective.cross_entropy(torch.tensor([[2.0, 0.0, 4.0]]), nll_mix, counts, 0.5, 0.5)
    assert loss.item() == 0.5 * 3.0 + 0.5 * (2.0 + 5.0) / 2


def test_nothing_to_predict_is_zero_not_nan():
    zero = torch.tensor(0)
    none = objective.Counts(zero, torch.zeros(2, dtype=torch.long), zero, zero, zero)
    assert objective.cross_entropy(torch.zeros(1, 3), torch.zeros(1, 4, 1, 2), none, 0.5, 0.5) == 0
    sampled = objective.Sampled(torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 3, dtype=torch.bool))
    assert objective.policy_loss(sampled, none, {"reinforce": 1.0}) == 0


def test_policy_loss_divides_by_rewarded_anchors_thoughts_and_tokens():
    logprob = torch.full((1, 3, 2, 4), -1.0)
    advantage = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]])
    counts = objective.Counts(torch.tensor(1), torch.tensor([1]), *map(torch.tensor, (4, 16, 4)))
    sampled = objective.Sampled(logprob, advantage, torch.ones(1, 3, 2, 4, dtype=torch.bool))
    loss = objective.policy_loss(sampled, counts, {"reinforce": 1.0})
    assert loss.item() == pytest.approx((1 + 3) * 4 / (2 * 2 * 4))


def test_a_shorter_thought_predicts_from_its_last_rows_and_counts_fewer_tokens():
    """Thoughts of 3, 1 and 0 tokens have 6, 4 and 3 rows where J = 2; one that is off counts as T = 3 tokens."""
    anchors = torch.tensor([[0, 1]])
    length = torch.tensor([[[6, 4], [3, 0]]])
    layout = ThoughtLayout.at(anchors, 2, 6, text_length=6, length=length)
    targets = objective.make_targets(torch.arange(10, 16)[None], None, layout, lookahead=2)
    assert targets.mix[0].tolist() == [[[11, 12], [11, 12]], [[12, 13], [IGNORED, IGNORED]]]
    assert targets.sampled[0].tolist() == [[3, 1], [0, 3]]
    assert objective.count(targets).tokens == 3 + 1 + 0 + 3


def test_one_thought_keeps_its_positive_reward():
    assert objective.ADVANTAGES["relu"](torch.tensor([[2.0], [-1.0]])).tolist() == [[2.0], [0.0]]
