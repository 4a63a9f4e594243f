"""The whole step against a slow one: an ordinary forward per thought and the objective written out as loops."""

import pytest
import torch

from tests.quietstar.common import assert_same_gradients, gradients, text

T, J = 3, 2


def slow_step(qs, texts, thought_ids, anchors, last_rewarded, lengths=None):
    """``texts``: list of (ids, labels) of single documents; thought_ids[i][t, n]; anchors[i]: positions that think, rewarded up
    to last_rewarded[i]; lengths[i][t, n], or T: of a thought.

    Returns the loss, and dicts of rewards and of log-probabilities by (text, anchor, n). Written from the objective's
    definition, one number at a time.
    """
    config, model, embed = qs.thought_config, qs.model.model, qs.model.get_input_embeddings()
    weight = qs.lm_head.linear.weight
    start, end = config.embedding_scale * qs.start_embedding, config.embedding_scale * qs.end_embedding
    base_terms, mix_terms, rewards, logprobs = [], [[] for _ in range(J)], {}, {}
    for i, (ids, labels) in enumerate(texts):
        L = len(ids)
        h_text = model(inputs_embeds=embed(ids)[None]).last_hidden_state[0]
        base = (h_text @ weight.T).log_softmax(-1)
        nll_base = [-base[t, labels[t + 1]] if labels[t + 1] != -100 else None for t in range(L - 1)]
        base_terms += [x for x in nll_base if x is not None]
        for t in anchors[i]:
            for n in range(config.thoughts):
                size = T if lengths is None else int(lengths[i][t, n])
                z = thought_ids[i][t, n, :size]
                forced = ids[t + 1 : t + J]
                rows = torch.cat([embed(ids[: t + 1]), start[None], embed(z), end[None], embed(forced)])
                h = model(inputs_embeds=rows[None]).last_hidden_state[0][t + 1 :]
                reward = 0.0
                for j in range(J):
                    target = t + j + 1
                    if target >= L or labels[target] == -100:
                        continue
                    hb, ht = h_text[t + j], h[size + 1 + j]
                    w = qs.mixing_head(torch.cat([hb, ht]))
                    if config.mixing == "logits":
                        nll = -(((1 - w) * hb + w * ht) @ weight.T).log_softmax(-1)[labels[target]]
                    else:
                        w = torch.sigmoid(w)[0]
                        lb, lt = ((x @ weight.T).log_softmax(-1)[labels[target]] for x in (hb, ht))
                        nll = -((1 - w) * lb + w * lt)
                    mix_terms[j].append(nll)
                    reward += (nll_base[t + j].item() if config.reward == "gain" else 0.0) - nll.item()
                if t <= last_rewarded[i]:
                    rewards[i, t, n] = reward
                    logits = h[:size] @ weight.T / config.policy_temperature
                    logprobs[i, t, n] = logits.log_softmax(-1).gather(1, z[:, None])[:, 0]
    loss = config.base_weight * torch.stack(base_terms).mean()
    loss = loss + config.mix_weight / J * sum(torch.stack(terms).mean() for terms in mix_terms)
    return loss, rewards, logprobs


def policy(config, rewards, logprobs, tokens):
    """The policy's loss, a mean over ``tokens``."""
    total = 0.0
    for (i, t, n), logprob in logprobs.items():
        mean = sum(rewards[i, t, m] for m in range(config.thoughts)) / config.thoughts if config.thoughts > 1 else 0.0
        total = total - max(rewards[i, t, n] - mean, 0.0) * logprob.sum()
    return total / tokens


def compare(qs, out, slow_loss_ce, slow_policy):
    torch.testing.assert_close(out.loss_ce, slow_loss_ce, rtol=1e-4, atol=0)
    torch.testing.assert_close(out.policy_loss, slow_policy, rtol=1e-4, atol=1e-7)
    found = []
    for loss in (out.loss, slow_loss_ce + qs.thought_config.policy_weight * slow_policy):
        qs.zero_grad()
        loss.backward()
        found.append(gradients(qs))
    assert_same_gradients(*found, bound=1e-3)


@pytest.mark.parametrize("changes", [{}, {"thoughts": 1}, {"preset": "paper"}], ids=["official", "one thought", "paper"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(thinker, changes, side):
    qs = thinker(**changes)
    N = qs.thought_config.thoughts
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (L,), generator=generator) for L in (9, 6)]
    labels = [x.clone() for x in ids]
    labels[0][4] = -100
    thoughts = [torch.randint(3, 61, (len(x), N, T), generator=generator) for x in ids]
    # The last rewarded place is that of the padded batch, 9 - 2 - J: right padding rewards the short text's last anchors too.
    last = [9 - 2 - J, 9 - 2 - J - (3 if side == "left" else 0)]
    loss_ce, rewards, logprobs = slow_step(qs, list(zip(ids, labels, strict=True)), thoughts, [range(9), range(6)], last)
    # Padded anchors count in the policy's denominator: 2 texts of 9 - 1 - J places.
    slow_policy = policy(qs.thought_config, rewards, logprobs, tokens=2 * (9 - 1 - J) * N * T)

    def pad(x, value):
        fill = x.new_full((3, *x.shape[1:]), value)
        return torch.cat([fill, x] if side == "left" else [x, fill])

    batch = torch.stack([ids[0], pad(ids[1], 0)])
    mask = torch.stack([torch.ones(9, dtype=torch.long), pad(torch.ones(6, dtype=torch.long), 0)])
    batch_labels = torch.stack([labels[0], pad(labels[1], 5)])
    batch_thoughts = torch.stack([thoughts[0], pad(thoughts[1], 7)])
    out = qs(batch, mask, batch_labels, thought_ids=batch_thoughts)
    offset = 3 if side == "left" else 0
    for (i, t, n), reward in rewards.items():
        assert out.reward[i, t + offset * i, n].item() == pytest.approx(reward, abs=1e-4)
    compare(qs, out, loss_ce, slow_policy)


def test_packed_documents(thinker):
    qs = thinker()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 61, (L,), generator=generator) for L in (5, 7)]
    thoughts = [torch.randint(3, 61, (len(x), 2, T), generator=generator) for x in ids]
    loss_ce, _, _ = slow_step(qs, [(x, x) for x in ids], thoughts, [range(5), range(7)], [-1, -1])
    documents = torch.tensor([[0] * 5 + [1] * 7])
    out = qs(torch.cat(ids)[None], document_ids=documents, thought_ids=torch.cat(thoughts)[None])
    torch.testing.assert_close(out.loss_ce, loss_ce, rtol=1e-4, atol=0)


def test_chosen_anchors(thinker):
    qs = thinker()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 61, (2, 10), generator=generator)
    thoughts = torch.randint(3, 61, (2, 10, 2, T), generator=generator)
    anchors = torch.tensor([[1, 4, 9], [6, -1, -1]])
    loss_ce, rewards, logprobs = slow_step(qs, [(x, x) for x in ids], thoughts, [[1, 4, 9], [6]], [10 - 2 - J] * 2)
    # Rewarded places: 1 and 4 of the first text, 6 of the second; the unused ones don't count.
    slow_policy = policy(qs.thought_config, rewards, logprobs, tokens=3 * 2 * T)
    rows = torch.arange(2)[:, None]
    out = qs(ids, thought_ids=thoughts[rows, anchors.clamp(min=0)], anchors=anchors)
    compare(qs, out, loss_ce, slow_policy)


@pytest.mark.parametrize("chunk", [None, 3])
def test_thoughts_of_different_lengths(thinker, chunk):
    """Each is as if alone, and the policy's loss is a mean over live sampled tokens."""
    qs, ids, L = thinker(), text(2, 10), 10
    generator = torch.Generator().manual_seed(1)
    thoughts, lengths = (
        torch.randint(*bounds, generator=generator) for bounds in ((3, 61, (2, L, 2, T)), (0, T + 1, (2, L, 2)))
    )
    loss_ce, rewards, logprobs = slow_step(qs, [(x, x) for x in ids], thoughts, [range(L)] * 2, [L - 2 - J] * 2, lengths)
    slow_policy = policy(qs.thought_config, rewards, logprobs, int(lengths[:, : L - 1 - J].sum()))
    qs.anchor_chunk = chunk
    compare(qs, qs(ids, thought_ids=thoughts, thought_lengths=lengths), loss_ce, slow_policy)
