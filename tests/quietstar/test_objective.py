"""Targets on numbers small enough to check by hand; test_sequential_step.py has the losses, written out as loops."""

import torch

from quietstar import objective
from quietstar_kernels import ThoughtLayout

IGNORED = objective.IGNORED


def test_targets_stop_at_documents_padding_and_labels():
    layout = ThoughtLayout.from_documents(torch.tensor([[0, 0, 0, 1, 1, -1]]), 1, 6)
    labels = torch.tensor([[10, IGNORED, 12, 13, 14, IGNORED]])  # the last is padding
    targets = objective.make_targets(labels, layout, lookahead=2)
    assert targets.base.tolist() == [[IGNORED, 12, IGNORED, 14, IGNORED]]
    assert targets.mix[0, :, 0].tolist() == [
        [IGNORED, 12],
        [12, IGNORED],
        [IGNORED, IGNORED],
        [14, IGNORED],
        [IGNORED, IGNORED],
        [IGNORED, IGNORED],
    ]


def test_a_shorter_thought_predicts_from_its_last_rows_and_counts_fewer_tokens():
    """Thoughts of 3, 1 and 0 tokens have 6, 4 and 3 rows where J = 2; one that is off counts as T = 3 tokens."""
    anchors = torch.tensor([[0, 1]])
    length = torch.tensor([[[6, 4], [3, 0]]])
    layout = ThoughtLayout.at(anchors, 2, 6, text_length=6, length=length)
    targets = objective.make_targets(torch.arange(10, 16)[None], layout, lookahead=2)
    assert targets.mix[0].tolist() == [[[11, 12], [11, 12]], [[12, 13], [IGNORED, IGNORED]]]
    assert targets.sampled[0].tolist() == [[3, 1], [0, 3]]
    assert objective.count(targets).tokens == 3 + 1 + 0 + 3
