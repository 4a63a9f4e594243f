"""Every objective on a case so small that all thoughts can be listed: its expected gradient against the one on paper.

Three tokens, one anchor, a softmax over three logits for each step. Expectations run over all joint samples of the N thoughts,
weighted with their probability, in fp64.
"""

import itertools

import pytest
import torch

from quietstar import objective
from tests.quietstar.common import assert_same_gradients, gradients, short_run, text, texts_of, wrap

V = 3
REWARD = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
LOGITS = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
OTHER = torch.tensor([-0.7, 0.5, 0.3], dtype=torch.float64)
COUNTS = objective.Counts(torch.ones(5, dtype=torch.int64))


def p_of(logits):
    return logits.softmax(-1)


def expected_gradient(loss, logits, N, sampler=None):
    """Gradient at ``logits`` [V] of the mean over all joint samples of N one-token thoughts of ``loss(logp [N], ids [N])``."""
    logits = logits.clone().requires_grad_()
    weights = p_of(LOGITS if sampler is None else sampler).detach()
    total = 0
    for ids in itertools.product(range(V), repeat=N):
        ids = torch.tensor(ids)
        total = total + weights[ids].prod() * loss(logits.log_softmax(-1)[ids], ids)
    total.backward()
    return logits.grad


def softmax_gradient(value, logits):
    """Of the sum over k of p_k * value_k, value held fixed: p_k (value_k - mean)."""
    p = p_of(logits)
    return p * (value - (p * value).sum())


def family(name, advantage=torch.relu, **given):
    """``loss(logp, ids)`` of one policy term on one anchor's N thoughts of one token, meaned over the thoughts."""

    def loss(logp, ids):
        sampled = objective.Sampled(
            logp[None, None, :, None],
            advantage(REWARD[ids][None, None]),
            torch.ones(1, 1, len(ids), 1, dtype=torch.bool),
            **{key: x[ids][None, None, :, None] if isinstance(x, torch.Tensor) else x for key, x in given.items()},
        )
        counts = objective.Counts(torch.tensor([1, *[len(ids)] * 3, 1]))
        return objective.policy_loss(sampled, counts, {name: 1.0})

    return loss


def leads(compare):
    """Of each token, the expected value of a comparison of its reward with that of one other thought."""
    return (compare(REWARD[:, None] - REWARD) * p_of(LOGITS)).sum(1)


@pytest.mark.parametrize(
    "name, N, worth",
    [
        ("leave_one_out", 2, REWARD),
        ("leave_one_out", 3, REWARD),
        ("mean", 2, REWARD / 2),  # with oneself in it, it shrinks the gradient of the expected reward
        ("mean", 3, REWARD * 2 / 3),
        ("relu", 2, leads(torch.relu) / 2),  # against one other thought: half of what a token leads by, where it leads
        ("zscore", 2, leads(torch.sign) / 2**0.5),  # of two it is +-1/sqrt(2): the chance to win minus the chance to lose
    ],
)
def test_expected_gradients_of_the_advantages(name, N, worth):
    got = expected_gradient(family("reinforce", objective.ADVANTAGES[name]), LOGITS, N)
    torch.testing.assert_close(got, -softmax_gradient(worth, LOGITS), rtol=1e-5, atol=1e-7)


def test_the_ratio_corrects_for_thoughts_of_an_older_policy():
    """Sampled by other logits, with a clip range that is never reached: the gradient of the expected advantage now."""
    old = OTHER.log_softmax(-1)
    loss = family("clipped", lambda reward: reward, old_logprob=old, ratio_clip=(100.0, 100.0))
    torch.testing.assert_close(expected_gradient(loss, LOGITS, 1, OTHER), -softmax_gradient(REWARD, LOGITS))


def whole_thoughts(T, N, term, **given):
    """Expected gradient of a term over thoughts of T tokens, each drawn given the one before; parameters [V+1,V]."""
    table = torch.randn(V + 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    base = torch.randn(V + 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    every = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [V^T,T]
    before = torch.cat([torch.full((len(every), 1), V), every[:, :-1]], 1)
    logp, logp_base = (x.log_softmax(-1)[before, every] for x in (table, base))
    divergence = (logp.sum(1).exp() * (logp - logp_base).sum(1)).sum()
    entropy = -(logp.sum(1).exp() * logp.sum(1)).sum()
    exact = torch.autograd.grad({"divergence": -divergence, "entropy": entropy}[term], table, retain_graph=True)[0]
    total = 0
    for chosen in itertools.product(range(len(every)), repeat=N):
        chosen = list(chosen)
        sampled = objective.Sampled(
            logp[chosen][None, None],
            torch.zeros(1, 1, N, dtype=torch.float64),
            torch.ones(1, 1, N, T, dtype=torch.bool),
            base_logprob=logp_base[chosen][None, None],
        )
        counts = objective.Counts(torch.tensor([1, N, N, N, 1]))
        total = total + logp[chosen].sum().exp().detach() * objective.policy_loss(sampled, counts, {term: 1.0})
    return torch.autograd.grad(total, table)[0], exact


@pytest.mark.parametrize("term", ["divergence", "entropy"])
@pytest.mark.parametrize(("T", "N"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_divergence_and_entropy_of_whole_thoughts(term, T, N):
    """With T > 1 a token answers for what follows it; with N > 1 the others' mean changes nothing in expectation."""
    got, exact = whole_thoughts(T, N, term)
    torch.testing.assert_close(got, -exact)


def test_the_weight_of_a_score_has_no_gradient_of_its_own():
    """Expectations would not show it: k1 alone multiplies the gradient of log pi."""
    logprob = torch.tensor([[[[-1.0, -2.0]]]], requires_grad=True)
    sampled = objective.Sampled(logprob, torch.zeros(1, 1, 1), logprob < 0, base_logprob=torch.tensor([[[[-1.5, -3.0]]]]))
    assert torch.autograd.grad(objective.divergence(sampled).sum(), logprob)[0].tolist() == [[[[-1.5, -1.0]]]]
    assert torch.autograd.grad(objective.entropy(sampled).sum(), logprob)[0].tolist() == [[[[3.0, 2.0]]]]


def test_what_is_off_weighs_nothing():
    logprob = torch.full((1, 1, 2, 3), -1.0, requires_grad=True)
    on = torch.tensor([[[[True, True, False], [True, False, False]]]])
    sampled = objective.Sampled(
        logprob, torch.ones(1, 1, 2), on, base_logprob=torch.full((1, 1, 2, 3), float("nan")).where(~on, -2.0)
    )
    counts = objective.Counts(torch.tensor([1, 2, 3, 2, 1]))
    loss = objective.policy_loss(sampled, counts, {"reinforce": 1.0, "divergence": 0.5, "entropy": 0.5})
    loss.backward()
    assert torch.isfinite(loss) and not logprob.grad[~on].any() and logprob.grad[on].all()


def test_the_gate_follows_what_thinking_earns_above_its_cost():
    """Expected over thinking or not: the gradient of g * (R - cost), for each position by itself."""
    score = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    gain, cost = torch.tensor([0.7, 0.1], dtype=torch.float64), 0.2
    g = torch.sigmoid(score)
    total = 0
    for thinks in itertools.product((False, True), repeat=2):
        thinks = torch.tensor(thinks)
        targets = objective.Targets(*(torch.zeros(0),) * 2, thinks[None], *(torch.zeros(0),) * 4)
        loss = objective.gate_loss(g[None], gain[None, :, None].expand(1, 2, 4), targets, cost, COUNTS)
        total = total + torch.where(thinks, g, 1 - g).prod().detach() * loss
    got = torch.autograd.grad(total, score, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(-(g * (gain - cost)).sum(), score)[0])


SMALL = {"thoughts": 2, "thought_tokens": 3, "lookahead": 2, "policy_weight": 1.0, "policy_temperature": 1.0}


@pytest.fixture
def thinker(tiny):
    return lambda name="llama", **fields: wrap(tiny(name), spread=0.2, embedding_scale=1.0, **SMALL | fields).train()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_base_of_the_divergence_is_the_plain_model_going_on(tiny, thinker, name):
    """The stock model's log-probability of text up to the anchor and then the thought's tokens, no start vector."""
    qs, ids = thinker(name, kl_weight=0.1, start_token_id=5), text(2, 10)
    anchors = torch.tensor([[3, 6], [0, -1]])
    ids[ids == 5] = 6
    out = qs(ids, anchors=anchors, seed=0)
    plain = tiny(name)
    for b, p in ((0, 0), (0, 1), (1, 0)):
        t = int(anchors[b, p])
        for n in range(2):
            row = torch.cat([ids[b, : t + 1], out.thought_ids[b, p, n]])
            logits = plain(input_ids=row[None]).logits[0, t:-1]
            logits[:, 5] = -1e10  # never sampled
            expected = logits.log_softmax(-1).gather(1, out.thought_ids[b, p, n, :, None])[:, 0]
            torch.testing.assert_close(out.base_logprob[b, p, n], expected, rtol=0, atol=1e-4)
    assert not out.base_logprob[1, 1].any() and not out.logprob[1, 1].any()


def test_divergence_and_entropy_reach_the_loss_with_their_weights(thinker):
    """In the gradient: of two thoughts the leave-one-out terms add up to 0."""
    ids = text(2, 10)

    def gradient(**weights):
        qs = thinker(policy_weight=2.0, **weights)
        out = qs(ids, seed=0)
        torch.testing.assert_close(out.loss, out.loss_ce + 2 * out.policy_loss)
        out.policy_loss.backward()
        return torch.cat([x.grad.flatten() for x in qs.parameters() if x.grad is not None])

    plain = gradient()
    for field in ("kl_weight", "entropy_weight"):
        one, two = (gradient(**{field: weight}) - plain for weight in (0.1, 0.2))
        assert one.norm() > 0.01 * plain.norm()
        torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-6)


def test_a_second_update_on_the_same_thoughts(thinker):
    """The first one's ratio is 1 and its gradient REINFORCE's; the second one's is the ratio of the two passes."""
    ids = text(2, 10)
    plain, qs = thinker(advantage="mean"), thinker(advantage="mean", ratio_clip=0.2)
    for model in (plain, qs):
        model.thought_config.base_weight = model.thought_config.mix_weight = 0.0
        model(ids, seed=0).loss.backward()
    assert_same_gradients(gradients(qs), gradients(plain), bound=1e-4)
    first = qs(ids, seed=0)
    with torch.no_grad():
        for parameter in (x for x in qs.parameters() if x.grad is not None):
            parameter -= 5 * parameter.grad
    second = qs(ids, thought_ids=first.thought_ids, old_logprob=first.logprob)
    ratio = (second.logprob - first.logprob).exp()
    assert ((ratio - 1).abs() > 0.2).any() and ((ratio - 1).abs() < 0.2).any()
    A = second.advantage[..., None]
    rewarded = torch.arange(10) <= 10 - 2 - 2
    term = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)[:, rewarded]
    torch.testing.assert_close(second.policy_loss, -term.mean())
    with pytest.raises(ValueError, match=r"old_logprob must have shape \[B,P,N,T\]"):
        qs(ids, thought_ids=first.thought_ids, old_logprob=first.logprob[..., :1])


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_the_reward_against_a_base_that_stays_or_follows(tiny, thinker, kind):
    """log p_mix of the thinking model minus log p of the other, which is phi <- 0.9 phi + 0.1 theta after each step."""
    qs, ids = thinker(base_model=kind, base_model_decay=0.9), text(2, 10)
    twin = tiny("llama")
    torch.manual_seed(0)
    for _ in range(2):
        with torch.no_grad():
            for parameter in qs.model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
            if kind == "ema":
                for mean, weight in zip(twin.parameters(), qs.model.parameters(), strict=True):
                    mean.copy_(0.9 * mean + 0.1 * weight)
        qs.update_base_model()
    out = qs(ids, seed=0)
    logp = twin(input_ids=ids).logits.log_softmax(-1)
    nll = -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    for t in range(10 - 2 - 1):
        expected = nll[:, t : t + 2].sum(1)[:, None] - out.nll_mix[:, t].sum(-1)
        torch.testing.assert_close(out.reward[:, t], expected, rtol=0, atol=1e-4)
    assert (out.nll_base - nll).abs().max() > 0.05
    out.loss.backward()
    assert all(x.grad is None for name, x in qs.named_parameters() if name.startswith("base_model."))


@pytest.mark.parametrize("anchor_chunk", [None, 1, "auto"])
def test_texts_without_anchors_have_no_divergence(thinker, anchor_chunk):
    qs = thinker(kl_weight=0.1)
    qs.anchor_chunk = anchor_chunk
    out = qs(text(2, 10), anchors=torch.zeros(2, 0, dtype=torch.int64), seed=0)
    assert out.base_logprob.shape == (2, 0, 2, 3) and bool(out.loss.isfinite())


def test_a_thought_that_ends_early_pays_for_its_own_tokens(thinker):
    qs, ids = thinker(kl_weight=0.1), text(2, 10)
    whole = qs(ids, seed=0)
    for logprob in (whole.logprob, whole.base_logprob):  # as all policy terms, of rewarded anchors alone
        assert logprob[:, :7].all() and not logprob[:, 7:].any()
    lengths = torch.tensor([0, 1, 2, 3, 1]).repeat(8)[:40].view(2, 10, 2)
    short = qs(ids, thought_ids=whole.thought_ids, thought_lengths=lengths)
    on = torch.arange(3) < lengths[..., None]
    for name in ("logprob", "base_logprob"):
        torch.testing.assert_close(short[name], torch.where(on, whole[name], 0), rtol=0, atol=1e-5)


DATA = texts_of([8 + i % 3 for i in range(7)])


def test_a_run_of_everything_resumes_bitwise(thinker, tmp_path):
    fields = {"advantage": "leave_one_out", "ratio_clip": 0.2, "kl_weight": 0.05, "entropy_weight": 0.01}
    fields |= {"base_model": "ema", "base_model_decay": 0.9}

    def run(out, **changes):
        return short_run(thinker(**fields), DATA, tmp_path / out, updates=2, steps=2, save_every=1, **changes)

    unbroken = run("a")
    assert run("b", resume=tmp_path / "a" / "checkpoints" / "step-000001") == unbroken[1:]
    assert all("divergence" in line for line in unbroken)
    for a, b in zip(unbroken, run("cut", accumulation=2), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_the_base_model_follows_every_update_of_a_run(thinker, tmp_path):
    """With a decay of 0 it is the model, after training as well."""
    qs = thinker(base_model="ema", base_model_decay=0.0, ratio_clip=0.2)
    before = qs.model.lm_head.weight.clone()
    short_run(qs, DATA, tmp_path, steps=1, updates=2)
    assert not torch.equal(qs.model.lm_head.weight, before)
    assert all(map(torch.equal, qs.base_model.parameters(), qs.model.parameters()))


def test_a_second_update_of_a_run_sees_the_thoughts_of_the_first(thinker, tmp_path):
    seen = []

    def loss(model, texts, counts, seed):
        seen.append((texts, model(texts, counts=counts, seed=seed)))
        return seen[-1][1].loss, seen[-1][1]

    qs = thinker(ratio_clip=0.2, kl_weight=0.1)
    (line,) = short_run(qs, DATA, tmp_path, loss=loss, steps=1, updates=2)
    (texts, first), (again, second) = seen
    assert texts.thought_ids is None and torch.equal(again.thought_ids, first.thought_ids)
    assert torch.equal(again.old_logprob, first.logprob) and not torch.equal(second.logprob, first.logprob)
    counts = qs.count_targets(texts)
    assert line["divergence"] == pytest.approx(((first.logprob - first.base_logprob).sum() / counts.tokens).item())
    assert line["reward"] == pytest.approx((first.reward.sum() / counts.places).item())
    assert line["weight"] == pytest.approx(first.weight[..., 0][first.nll_mix[..., 0] != 0].mean().item())
