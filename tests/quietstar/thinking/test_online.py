"""Reinforcement learning on ordinary text against plain PyTorch that follows the papers, one sequence for each thought."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from quietstar import QuietStar, ThoughtConfig, evaluate
from quietstar.cli.generate import Generate
from quietstar.cli.summary import finish
from quietstar.evaluation.alarms import alarms
from quietstar.hf.modules import backbone
from quietstar.testing import byte_tokenizer
from quietstar.thinking.forward import PackedInputs
from quietstar.thinking.text_thoughts import WrittenRows
from tests.quietstar.common import gradients, short_run, texts_of

START, END = "<t>", "</t>"
ANCHORS, L, T = (3, 7, 12), 22, 6


def online(preset, seed=0, dtype=torch.float64, model=None, **fields):
    """Of a model for bytes, or a GPT-2, whose norms stay in fp64, as those of newer models don't."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    model = model or GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).to(dtype)
    fields = {"thoughts": 4, "thought_tokens": T, "thought_start": START, "thought_end": END} | fields
    return QuietStar(model, ThoughtConfig(preset=preset, **fields), byte_tokenizer(), verify=False).train()


def thoughts_of(seed, N=4):
    """Thoughts of unequal length, one of which ended itself, one with nothing in it; and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (1, len(ANCHORS), N, T), generator=generator)
    lengths = torch.randint(1, T + 1, ids.shape[:3], generator=generator)
    end = torch.tensor(byte_tokenizer()(END)["input_ids"])
    ids[0, 0, 0, 1 : 1 + len(end)], lengths[0, 0, 0] = end, 1 + len(end)
    lengths[0, 1, 1] = 0
    return ids, lengths


def logprobs(model, ids, temperature=1.0):
    return (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def plain_loss(qs, base, text, ids, lengths, old, J, discount, clip, temperature, right=None, ce=0.0):
    """RLP's equations 3 to 8. ``right`` holds RPT's rewards, whose advantages are GRPO's."""
    tokenizer, model = byte_tokenizer(), qs.model
    start, end = (torch.tensor(tokenizer(x)["input_ids"]) for x in (START, END))
    terms = []
    for p, t in enumerate(ANCHORS):
        before, after = text[: t + 1], text[t + 1 : t + 1 + J]
        rewards, policies = [], []
        for n in range(ids.shape[2]):
            sampled = ids[0, p, n, : lengths[0, p, n]]
            ended = len(sampled) >= len(end) and bool((sampled[-len(end) :] == end).all())
            written = torch.cat([before, start, sampled, end[: 0 if ended else None]])
            with torch.no_grad():
                reasoned = logprobs(model, torch.cat([written, after]))[-J:]
                plain = logprobs(base, torch.cat([before, after]))[-J:]
            rewards.append(sum(discount**j * (reasoned[j] - plain[j]) for j in range(J)))
            first = len(before) + len(start) - 1
            logp = logprobs(model, written, temperature)[first : first + len(sampled)]
            policies.append((logp, old[0, p, n, : len(sampled)]))
        r = torch.stack(rewards) if right is None else right[p]
        G = len(r)
        A = G / (G - 1) * (r - r.mean()) if right is None else (r - r.mean()) / (r.std() + 1e-6)
        for advantage, (logp, before_update) in zip(A, policies, strict=True):
            if len(logp):
                rho = (logp - before_update).exp()
                terms.append(torch.minimum(rho * advantage, rho.clamp(1 - clip[0], 1 + clip[1]) * advantage).mean())
    loss = -torch.stack(terms).mean()
    return loss - ce * logprobs(model, text).mean() if ce else loss


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("preset", ["rlp", "grlp", "rpt"])
def test_loss_and_every_gradient(preset, seed, model=None):
    qs = online(preset, seed, model=model)
    config = qs.thought_config
    text = torch.randint(60, (L,), generator=torch.Generator().manual_seed(seed))  # letters without braces
    ids, lengths = thoughts_of(seed)
    box = torch.tensor(byte_tokenizer()("\\boxed{}")["input_ids"])
    right = None
    if preset == "rpt":  # T is too small for a box
        qs = online(preset, seed, thought_tokens=16)
        ids = torch.cat([ids, ids.new_full((*ids.shape[:3], 10), 65)], -1)
        right = torch.zeros(len(ANCHORS), 4, dtype=torch.float64)
        for p, n, guess in ((0, 0, 1), (0, 1, 2), (1, 2, 0), (2, 3, 1)):
            prediction = torch.cat([box[:-1], text[ANCHORS[p] + 1 : ANCHORS[p] + 1 + guess], box[-1:]])
            ids[0, p, n, : len(prediction)], lengths[0, p, n] = prediction, len(prediction)
            right[p, n] = float(guess > 0)
    if qs.base_model is not None:  # as after some updates
        with torch.no_grad():
            for weight in qs.base_model.parameters():
                weight += 0.01 * torch.randn_like(weight)
        qs.base_model.double()
    noise = 0.3 * torch.randn(ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = {"anchors": torch.tensor([ANCHORS]), "thought_ids": ids, "thought_lengths": lengths}
    old = qs(text[None], **given).logprob + noise
    base = qs.base_model or qs.model
    found = []
    out = qs(text[None], **given, old_logprob=old)
    clip = (config.ratio_clip, config.ratio_clip_high)
    fields = (config.lookahead, config.lookahead_discount, clip, config.policy_temperature)
    want = plain_loss(qs, base, text, ids, lengths, old, *fields, right, config.base_weight)
    for loss in (out.loss, want):
        qs.zero_grad()
        loss.backward()
        found.append(gradients(qs))
    assert out.loss.dtype == torch.float64
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=0)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-10 * float(value.abs().max()) + 1e-15)


def test_dead_groups_are_not_computed():
    """The rows of the forward are those of the other groups; loss and gradients are the same."""
    qs, found = online("rpt", thought_tokens=16), []
    text = torch.arange(L) + 10
    ids = torch.full((1, len(ANCHORS), 4, 16), 65)
    prediction = torch.tensor(byte_tokenizer()("\\boxed{}")["input_ids"])
    right = torch.cat([prediction[:-1], text[8:10], prediction[-1:]])
    ids[0, 1, 2, : len(right)] = right
    given = {"anchors": torch.tensor([ANCHORS]), "thought_ids": ids}
    rows = WrittenRows.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WrittenRows, "of", lambda *args: found.append(rows(*args)) or found[-1])
        out = qs(text[None], **given)
        assert out.dead.tolist() == [[True, False, True]] and out.reward.sum() == 1 and out.loss.requires_grad
        length = len(qs.thinker.marks.start) + 16 + len(qs.thinker.marks.end)
        assert found[0].layout.R == 4 * length
        out.loss.backward()
        wanted = gradients(qs)
        patch.setattr(PackedInputs, "without", lambda self, left_out: self)
        qs.zero_grad()
        whole = qs(text[None], **given)
        whole.loss.backward()
        assert found[1].layout.R == 12 * length
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-12, atol=0)
    for name, value in gradients(qs).items():
        torch.testing.assert_close(wanted[name], value, rtol=0, atol=1e-12 * float(value.abs().max()) + 1e-15)


def slowly(qs, text, t, n, sequence, seed):
    """One thought, sampled by itself: a forward of the whole sequence for each token."""
    from quietstar_kernels import sample_token

    marks, ids = qs.thinker.marks, text[: t + 1].tolist()
    ids += marks.start
    sampled = []
    while len(sampled) < qs.thought_config.thought_tokens:
        hidden = backbone(qs.model)(input_ids=torch.tensor([ids + sampled])).last_hidden_state[0, -1:]
        counters = torch.tensor([[sequence, t, n, len(sampled)]], dtype=torch.int32)
        token, _ = sample_token(hidden, qs.lm_head.linear.weight, counters, seed, bias=qs.model.lm_head.bias, temperature=3.0)
        sampled.append(int(token))
        if tuple(sampled[-len(marks.end) :]) == marks.end or sampled[-1] in marks.stops:
            break
    return sampled


@pytest.mark.parametrize("live, end, likely", [(None, "e", 10.0), (2, "ee", 14.0)])
def test_thoughts_that_end_themselves(live, end, likely, monkeypatch, model=None):
    """The same tokens as sampled one by one, whatever else is in the batch and however many are live."""
    monkeypatch.setattr("quietstar.thinking.cohorts.FIRST_ROWS", 4)
    qs = online("rlp", 3, torch.float32, model, thought_tokens=24, thought_end=end, temperature=3.0)
    qs.anchor_chunk = live
    bias = torch.nn.Parameter(torch.zeros(256).index_fill(0, torch.tensor(ord("e") - 33), likely))
    qs.model.lm_head.bias = bias  # thoughts end after a dozen tokens or so
    text = torch.randint(256, (2, L), generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([[3, 7, 12, 15], [5, 9, -1, -1]])
    with torch.no_grad():
        thoughts = qs.think(text, anchors=anchors, seed=7, greedy=False)
        found = thoughts.lengths
        assert found[1, 2:].sum() == 0 and len(found[anchors >= 0].unique()) > 5
        for b, p, n in ((0, 0, 0), (0, 2, 3), (0, 3, 1), (1, 1, 2), (1, 0, 0)):
            want = slowly(qs, text[b], int(anchors[b, p]), n, b, 7)
            assert thoughts.thought_ids[b, p, n, : int(found[b, p, n])].tolist() == want
        alone = qs.think(text[:1], anchors=anchors[:1, 1:3], seed=7, greedy=False)
        assert torch.equal(alone.lengths[0], found[0, 1:3])
        out = qs(text, anchors=anchors, seed=7)
        on = torch.arange(24) < found[..., None]
        torch.testing.assert_close(out.logprob, thoughts.logprob.where(on, 0), rtol=1e-3, atol=1e-4)


def test_anchors_in_chunks():
    """The same loss and gradients, with two anchors at a time."""
    text = torch.randint(256, (2, L), generator=torch.Generator().manual_seed(0))
    found = []
    for size in (None, 2):
        qs = online("grlp", thought_tokens=9)
        qs.anchor_chunk = size
        out = qs(text, anchors=torch.tensor([[3, 7, 12], [4, 9, -1]]), seed=1)
        out.loss.backward()
        found.append((out, gradients(qs)))
    (whole, wanted), (parts, got) = found
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-10, atol=0)
    assert torch.equal(parts.thought_ids, whole.thought_ids) and got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-10 * float(wanted[name].abs().max()))


def test_greedy_thoughts_are_one_for_all():
    qs = online("rlp", 3, torch.float32).eval()
    text = torch.randint(256, (1, L), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        thoughts = qs.think(text, anchors=torch.tensor([[3, 7]]))
        ids = text[0, :8].tolist() + list(qs.thinker.marks.start)
        length = int(thoughts.lengths[0, 1, 2])
        for _ in range(length):
            ids.append(int(qs.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert thoughts.thought_ids[0, 1, 2, :length].tolist() == ids[-length:]


def test_what_is_refused():
    with pytest.raises(ValueError, match="thought_start='<t>' needs a tokenizer: QuietStar\\(model, config, tokenizer\\)"):
        QuietStar(online("rlp").model, ThoughtConfig(preset="rlp", thought_start="<t>"), verify=False)
    with pytest.raises(ValueError, match="thought_end must be given together with thought_start, got ''"):
        ThoughtConfig(thought_start="<t>")
    with pytest.raises(ValueError, match="end_token_id must be left alone where thoughts are text \\(thought_start\\), got 3"):
        ThoughtConfig(preset="rlp", end_token_id=3)
    for start in ("<|t|>", "[at]"):
        config = ThoughtConfig(preset="rlp", thought_start=start)
        with pytest.warns(UserWarning, match=rf"thought_start={re.escape(repr(start))} is \d tokens, none of the vocabulary"):
            QuietStar(online("rlp").model, config, byte_tokenizer(), verify=False)
    with pytest.raises(ValueError, match="generate: think must be 'never' where thoughts are text"):
        online("rlp", dtype=torch.float32).generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match="text and thoughts need 72 positions and GPT2LMHeadModel has 64 learned positions"):
        online("rlp")(torch.zeros(1, 60, dtype=torch.long), anchors=torch.tensor([[58]]))
    with pytest.raises(ValueError, match="states: thoughts must stand between vectors"):
        online("rlp").thinker.states(None, None, None)
    with pytest.warns(UserWarning, match="reward='match' compares a thought's last token with the text's next one"):
        qs = QuietStar(online("rlp").model, ThoughtConfig(preset="rpt", thought_start="", thought_end=""), verify=False)
    with pytest.raises(ValueError, match="anchors='sentences' needs a tokenizer"):
        qs.use_config(ThoughtConfig(anchors="sentences"))
        qs.choose_anchors(torch.zeros(1, 9, dtype=torch.long))


def leaking(examples):
    """With thoughts that copy the next tokens at one anchor of each text."""
    for example in examples:
        after = example["input_ids"][4:10]
        thoughts = torch.stack([after, after.roll(1)])[None]  # the second has them from its second token on, but for the last
        yield {**example, "anchors": torch.tensor([3]), "thought_ids": thoughts, "thought_lengths": torch.tensor([[6, 6]])}


def test_a_policy_that_copies_the_target_is_named(tmp_path, capsys):
    """In the metrics, the evaluation and the summary; and groups whose thoughts earn the same are counted."""
    texts = texts_of([14] * 4)
    data = list(leaking(texts))
    qs = online("rlp", dtype=torch.float32, thoughts=2, anchors="all")
    one = [{name: x[:, :1] if name.startswith("thought") else x for name, x in example.items()} for example in data]
    evaluated = {"evaluate": lambda qs: evaluate(qs, one, controls=False), "eval_every": 4}
    lines = short_run(qs, data, tmp_path, learning_rate=1e-6, **evaluated)
    assert {line["leak_rate"] for line in lines} == {1.0} and lines[-1]["eval_leak_rate"] == 1.0
    assert lines[-1]["thought_length"] == 6 and lines[0]["dead_groups"] == 0
    said = finish(str(tmp_path), [{"seconds": 1.0, "thoughts_per_second": 1.0, **line} for line in lines], held_out=True)
    assert said.count("leak: 100% of thoughts hold the next four tokens of the text, which games the reward") == 2
    for example in data:
        example["thought_ids"] = example["thought_ids"][:, :1].expand(-1, 2, -1)
    lines = short_run(qs, data, tmp_path / "dead", learning_rate=1e-6)
    assert lines[0]["dead_groups"] == 1 and lines[0]["advantage"] == lines[0]["policy_loss"] == 0
    assert alarms(lines[0])[1].startswith("dead groups: at 100% of the anchors all thoughts earn the same")
    assert alarms({"thought_length": 3.0}, {"thought_length": 8.0})[0].startswith("thoughts shrank from 8.0 to 3.0 tokens")
    assert not alarms({"thought_length": 5.0, "leak_rate": 0.05, "dead_groups": 0.2}, {"thought_length": 8.0})


def test_a_run_with_thoughts_that_end_themselves(tmp_path):
    """Accumulation changes nothing, a resumed run is the same, and held-out texts are evaluated at the anchors of a choice."""
    data = texts_of([20, 16, 22, 18, 20, 21])
    found, evaluated = [], {"evaluate": lambda qs: evaluate(qs, data[:2]), "eval_every": 4}
    for parts, options in ((1, evaluated), (2, {"steps": 2})):
        qs = online("rlp", dtype=torch.float64, anchor_count=2)
        found.append(short_run(qs, data, tmp_path / str(parts), accumulation=parts, learning_rate=1e-3, **options))
    assert found[0][-1]["eval_tokens"] == 4 and found[0][0]["anchors"] == 8 and "eval_content" in found[0][-1]
    for one, two in zip(found[0][:2], found[1], strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9)
    qs = online("rlp", seed=1, dtype=torch.float64, anchor_count=2)
    checkpoint = tmp_path / "1" / "checkpoints" / "step-000002"
    again = short_run(qs, data, tmp_path / "again", resume=checkpoint, learning_rate=1e-3, **evaluated)
    assert again[-1] == found[0][-1]


def test_generate_begins_with_a_thought(tmp_path, capfd):
    """The command puts the start string after the prompt; the checkpoint keeps the strings."""
    qs = online("rlp", 3, torch.float32).eval()
    qs.save_pretrained(tmp_path)
    Generate(str(tmp_path), "It is", max_new_tokens=4).run()
    ids = byte_tokenizer()("It is" + START, return_tensors="pt")["input_ids"]
    want = qs.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert capfd.readouterr().out.strip() == byte_tokenizer().decode(want).strip()
