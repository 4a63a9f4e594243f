"""Where to think: what each policy chooses, that it is reproducible, and how it goes through the loss and a checkpoint."""

import math
from dataclasses import replace

import pytest
import torch

import quietstar
from quietstar.testing import byte_tokenizer, tiny_model
from quietstar.thinking.anchors import EXPLORATION
from quietstar_kernels.philox import draw_words
from tests.quietstar.common import short_run, text, texts_of, wrap

CONFIG = {"thoughts": 2, "thought_tokens": 2, "lookahead": 2, "policy_weight": 1.0, "embedding_scale": 1.0}
SUBSETS = ["random", "entropy", "every", "gate"]


@pytest.fixture
def thinker(tiny):
    """``thinker(policy, **fields)`` in training mode, with a mixing head that has opinions."""

    def make(policy, **fields):
        qs = wrap(tiny("llama"), spread=0.2, anchors=policy, **CONFIG | fields).train()
        if qs.gate is not None:
            torch.nn.init.normal_(qs.gate.linear.weight, 0, 0.2, generator=torch.Generator().manual_seed(3))
        return qs

    return make


def rows(anchors):
    return [[t for t in row if t >= 0] for row in anchors.tolist()]


def test_every_kth_counts_from_each_documents_start(thinker):
    qs = thinker("every", anchor_stride=3)
    assert rows(qs.choose_anchors(text(1))) == [[2, 5, 8]]  # 11 has no next token
    documents = torch.tensor([[0] * 6 + [1] * 6, [0] * 4 + [1] * 6 + [-1] * 2])
    assert rows(qs.choose_anchors(text(2), document_ids=documents)) == [[2, 8], [2, 6]]  # 5 and 9 end their documents
    left = torch.tensor([[0] * 4 + [1] * 8])
    assert rows(qs.choose_anchors(text(1), left)) == [[6, 9]]


def test_random_takes_its_share_evenly(thinker):
    qs = thinker("random", anchor_share=0.3)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    anchors = qs.choose_anchors(text(3), mask, seed=0)
    assert [len(row) for row in rows(anchors)] == [math.ceil(0.3 * 11), math.ceil(0.3 * 6), math.ceil(0.3 * 11)]
    assert (anchors[1] == -1).tolist() == [False, False, True, True] and max(rows(anchors)[1]) < 6
    hits = torch.zeros(11)
    for seed in range(100):
        hits[rows(qs.choose_anchors(text(1), seed=seed))[0]] += 1
    assert (hits / 100 - 4 / 11).abs().max() < 5 * math.sqrt(4 / 11 * 7 / 11 / 100)


def test_the_random_numbers_are_those_of_the_counters(thinker):
    """Sequence id, position from the document's start, an n that no thought has, step 0."""
    qs, seed = thinker("random", anchor_share=0.2), 5
    counters = torch.tensor([[7, t, 65535, 0] for t in range(12)], dtype=torch.int32)
    words = draw_words(counters, torch.zeros(1, dtype=torch.long), seed)[0][:11, 0]
    (chosen,) = rows(qs.choose_anchors(text(1), sequence_ids=torch.tensor([7]), seed=seed))
    assert chosen == sorted(words.argsort(descending=True)[:3].tolist())


def test_entropy_takes_where_the_model_knows_least(tiny, thinker):
    qs, ids = thinker("entropy", anchor_share=0.25), text(3)
    logp = tiny("llama")(input_ids=ids).logits.double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[:, :-1]
    expected = [sorted(row.topk(3).indices.tolist()) for row in entropy]
    assert rows(qs.choose_anchors(ids)) == expected


def test_the_gate_is_drawn_with_its_probability(tiny, thinker):
    qs, ids = thinker("gate", anchor_share=0.4), text(3)
    hidden = tiny("llama").model(input_ids=ids).last_hidden_state
    score = hidden @ qs.gate.linear.weight[0] + qs.gate.linear.bias
    probability = EXPLORATION + (1 - 2 * EXPLORATION) * torch.sigmoid(score)
    torch.testing.assert_close(qs.gate(hidden), probability)
    hits = torch.zeros(3, 12)
    for seed in range(40):
        for b, row in enumerate(rows(qs.choose_anchors(ids, seed=seed))):
            hits[b, row] += 1
    assert not hits[:, 11].any()
    error = (hits / 40 - probability)[:, :11].abs() / (probability * (1 - probability) / 40).sqrt()[:, :11]
    assert error.max() < 5
    assert rows(qs.eval().choose_anchors(ids)) == [row[:11].nonzero()[:, 0].tolist() for row in probability > 0.5]


@pytest.mark.parametrize("policy", SUBSETS)
def test_a_text_is_chosen_for_alike_in_any_batch(thinker, policy):
    qs, ids = thinker(policy), text(3)
    together = rows(qs.choose_anchors(ids, sequence_ids=torch.tensor([4, 5, 6]), seed=1))
    alone = [rows(qs.choose_anchors(ids[i : i + 1], sequence_ids=torch.tensor([4 + i]), seed=1))[0] for i in range(3)]
    assert together == alone and any(together)
    other = [rows(qs.choose_anchors(ids, seed=seed)) for seed in (1, 2)]
    assert (other[0] == other[1]) == (policy in ("entropy", "every"))


@pytest.mark.parametrize("policy", SUBSETS)
def test_forward_thinks_where_the_policy_says_in_training_alone(thinker, policy):
    qs, ids = thinker(policy), text(3)
    out = qs(ids, seed=3)
    anchors = qs.choose_anchors(ids, seed=3)
    assert torch.equal(out.anchors, anchors)
    named = qs(ids, anchors=anchors, seed=3)
    assert torch.equal(named.loss, out.loss) and torch.equal(named.thought_ids, out.thought_ids)
    elsewhere = qs(ids, anchors=torch.tensor([[1, 4]] * 3), seed=3)
    assert elsewhere.reward.shape == (3, 2, 2)
    everywhere = qs.eval()(ids)
    assert everywhere.anchors is None and everywhere.reward.shape == (3, 12, 2)


def test_the_gates_loss_is_the_formula(thinker):
    """-(mean reward - cost) log g, summed over anchors that are rewarded, per text target; its gradient stays in the gate."""
    qs, ids = thinker("gate", gate_cost=0.2), text(3)
    out = qs(ids, seed=1)
    hidden = qs.model.model(input_ids=ids).last_hidden_state
    total = 0
    for b, row in enumerate(rows(out.anchors)):
        for p, t in enumerate(row):
            if t <= 12 - 2 - 2:
                total = total - (out.reward[b, p].mean() - 0.2) * qs.gate(hidden[b, t]).log()
    rest = out.loss_ce + out.policy_loss
    torch.testing.assert_close(out.loss - rest, total / (3 * 11), rtol=1e-4, atol=1e-6)
    (out.loss - rest).backward()
    assert qs.gate.linear.weight.grad.any()
    assert not any(x.grad is not None and x.grad.abs().max() > 1e-6 for name, x in qs.named_parameters() if name[:5] != "gate.")


def test_a_text_with_nowhere_to_think(thinker):
    qs = thinker("every", anchor_stride=50)
    out = qs(text(3), seed=0)
    assert out.anchors.tolist() == [[-1]] * 3
    assert out.loss == out.loss_ce and torch.isfinite(out.loss) and not out.reward.any()
    out.loss.backward()


def test_another_policy_has_no_gate(thinker, tmp_path):
    qs = thinker("gate")
    qs.save_pretrained(tmp_path / "model")
    qs.use_config(replace(qs.thought_config, anchors="all"))
    assert qs.gate is None and not any(name.startswith("gate.") for name in qs.state_dict())
    settings = (tmp_path / "model" / "quietstar.json").read_text()
    (tmp_path / "model" / "quietstar.json").write_text(settings.replace('"anchors": "gate"', '"anchors": "random"'))
    with pytest.raises(ValueError, match="must hold .*got .*gate.linear.bias"):
        quietstar.QuietStar.from_pretrained(tmp_path / "model", verify=False)


def test_a_run_reports_how_many_positions_thought(thinker, tmp_path):
    lengths = [8 + i % 3 for i in range(7)]

    def run(policy, **fields):
        (line,) = short_run(thinker(policy, **fields), texts_of(lengths), tmp_path / policy, steps=1, batch_size=7)
        return line

    line = run("every", anchor_stride=2)
    assert line["anchors"] == sum((length - 1) // 2 for length in lengths)
    assert line["anchor_share"] == pytest.approx(line["anchors"] / sum(lengths))
    assert "anchors" not in run("all")


def test_a_count_of_anchors_and_ends_of_sentences():
    """So many a text, where J tokens of its document follow if the thought alone predicts; sentences end before a space."""
    tokenizer, words = byte_tokenizer(), "It is 3.5 so. No! Is it? Yes... and (3.) fine"
    fields = {"thoughts": 2, "thought_tokens": 2, "lookahead": 3, "thought_start": "", "thought_end": ""}
    ids = torch.tensor(tokenizer([words, words])["input_ids"])
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0

    def chosen(**changes):
        config = quietstar.ThoughtConfig(**fields | changes)
        return rows(quietstar.QuietStar(tiny_model(256), config, tokenizer, verify=False).choose_anchors(ids, mask, seed=1))

    ends = [words.index(x) + len(x) - 1 for x in ("so.", "No!", "it?", "...")]
    assert chosen(anchors="sentences") == [ends, [t for t in ends if t < 19]]
    some = chosen(anchors="sentences", anchor_count=2)
    assert all(len(row) == 2 and set(row) <= set(ends) for row in some)
    for anchors in ("random", "entropy"):
        found = chosen(preset="rlp", anchors=anchors, anchor_count=15)
        assert [len(row) for row in found] == [15, 15] and max(found[1]) <= 19 - 3
        assert len(chosen(preset="rlp", anchors=anchors, anchor_count=30)[1]) == 17  # all that have 3 tokens after them
