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
    gain = objective.rewards(nll_base, nll_mix, targets, layout, "gain")
    assert gain[0].tolist() == [[3.0, 2.25], [6.0, 6.0], [0, 0], [0, 0], [0, 0]]
    likelihood = objective.rewards(nll_base, nll_mix, targets, layout, "likelihood")
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


def test_one_thought_keeps_its_positive_reward():
    assert objective.ADVANTAGES["relu"](torch.tensor([[2.0], [-1.0]])).tolist() == [[2.0], [0.0]]


def test_cross_entropy_means_over_what_counts():
    targets = objective.Targets(
        base=torch.tensor([[1, IGNORED, 1]]),
        mix=torch.tensor([[[[1, 1]], [[1, IGNORED]], [[IGNORED, IGNORED]]]]),
        rewarded=torch.tensor([[True, False, False]]),
    )
    nll_mix = torch.tensor([[[[1.0, 5.0]], [[3.0, 0.0]], [[0.0, 0.0]]]])
    counts = objective.count(targets)
    assert (counts.base, counts.mix.tolist(), counts.places) == (2, [2, 1], 1)
    loss = objective.cross_entropy(torch.tensor([[2.0, 0.0, 4.0]]), nll_mix, counts, 0.5, 0.5)
    assert loss.item() == 0.5 * 3.0 + 0.5 * (2.0 + 5.0) / 2


def test_nothing_to_predict_is_zero_not_nan():
    none = objective.Counts(torch.tensor(0), torch.zeros(2, dtype=torch.long), torch.tensor(0))
    assert objective.cross_entropy(torch.zeros(1, 3), torch.zeros(1, 4, 1, 2), none, 0.5, 0.5) == 0
    assert objective.policy_loss(torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1), none) == 0


def test_policy_loss_divides_by_rewarded_anchors_thoughts_and_tokens():
    logprob = torch.full((1, 3, 2, 4), -1.0)
    advantage = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]])
    counts = objective.Counts(torch.tensor(1), torch.tensor([1]), torch.tensor(2 * 2))
    assert objective.policy_loss(logprob, advantage, counts).item() == pytest.approx((1 + 3) * 4 / (2 * 2 * 4))
