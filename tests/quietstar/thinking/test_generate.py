"""Generation with thoughts against a slow generator that runs everything anew, packed, for every token of every thought."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softmax
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar_kernels import ThoughtLayout, sample_token

T, NEW, LENGTHS = 3, 4, (9, 6)
BOUND = 1e-4  # the largest difference of logits in fp32 that the project accepts


@pytest.fixture
def qs(thinker):
    return thinker("mistral").eval()


def prompts(lengths=LENGTHS, seed=0):
    """The texts, and the same as a batch padded on the left: ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, 61, (length,), generator=generator) for length in lengths]
    pad = [torch.zeros(max(lengths) - length, dtype=torch.long) for length in lengths]
    ids = torch.stack([torch.cat([zeros, text]) for zeros, text in zip(pad, texts, strict=True)])
    mask = torch.stack([torch.cat([zeros, torch.ones_like(text)]) for zeros, text in zip(pad, texts, strict=True)])
    return texts, ids, mask


@torch.no_grad()
def slow_logprob(qs, text, name, thoughts, seed, threshold=-1.0):
    """Log-probabilities [V] of the token after ``text`` [L], and the thoughts [N,T], or None where it does not think."""
    config, embed, L = qs.thought_config, qs.model.get_input_embeddings(), len(text)
    layout = ThoughtLayout.at(torch.tensor([[L - 1]]), thoughts, T + 2, text_length=L)
    z = torch.zeros(thoughts, T, dtype=torch.long)

    def packed():
        rows = embed(torch.cat([z.new_zeros(thoughts, 1), z, z.new_zeros(thoughts, 1)], 1))
        rows[:, 0] = config.embedding_scale * qs.start_embedding
        rows[:, T + 1] = config.embedding_scale * qs.end_embedding
        embeds = torch.cat([embed(text), rows.flatten(0, 1)])[None]
        hidden = decode_rows(qs.model, embeds, layout.position_ids(), PackedPass(layout))[0]
        return hidden[L - 1], hidden[L:].unflatten(0, (thoughts, T + 2))

    base = softmax(qs.lm_head.logits(packed()[0]), -1)
    if -(base * base.log()).sum() <= threshold:
        return base.log(), None
    for s in range(T):
        counters = torch.tensor([[name, L - 1, n, s] for n in range(thoughts)], dtype=torch.int32)
        rows, weight, bias = qs.lm_head.operands(packed()[1][:, s])
        head = {"bias": bias, "scale": qs.lm_head.scale, "softcap": qs.lm_head.softcap}
        z[:, s], _ = sample_token(rows, weight, counters, seed or 0, temperature=0.0 if seed is None else 1.0, **head)
    h_base, h_thought = packed()[0], packed()[1][:, T + 1]
    mixed = []
    for h in h_thought:
        w = qs.mixing_head(torch.cat([h_base, h]))
        if config.mixing == "logits":
            mixed.append(softmax(qs.lm_head.logits((1 - w) * h_base + w * h), -1))
        else:
            w = torch.sigmoid(w)
            p = base ** (1 - w) * softmax(qs.lm_head.logits(h), -1) ** w
            mixed.append(p / p.sum())
    return (sum(mixed) / thoughts).log(), z


def slow_generate(qs, texts, new=NEW, thoughts=1, seed=None, threshold=-1.0, processors=None, names=range(9)):
    """New tokens [B,new] and the log-probabilities [B,new,V] they come from; with processors they are sampled."""
    texts, logprobs = list(texts), []
    for _ in range(new):
        rows = [slow_logprob(qs, text, b, thoughts, seed, threshold)[0] for b, text in zip(names, texts, strict=False)]
        logprobs.append(torch.stack(rows))
        if processors is None:
            tokens = logprobs[-1].argmax(-1)
        else:
            # Row by row, since padding may count as repeated; no prompt here holds the pad id.
            scores = torch.cat([processors(text[None], row[None]) for text, row in zip(texts, rows, strict=True)])
            tokens = torch.multinomial(softmax(scores, -1), 1)[:, 0]
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, tokens, strict=True)]
    return torch.stack([text[-new:] for text in texts]), torch.stack(logprobs, 1)


def fast_generate(qs, ids, mask, **options):
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    out = qs.generate(ids, mask, return_dict_in_generate=True, output_logits=True, **options)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def test_tokens_are_those_of_a_slow_generator(thinker, architecture):
    qs = thinker(architecture).eval()
    texts, ids, mask = prompts()
    truth, truth_logprob = slow_generate(qs, texts, thoughts=2, seed=5, names=(7, 3))
    options = {"thoughts": 2, "sample_thoughts": True, "seed": 5, "sequence_ids": torch.tensor([7, 3])}
    tokens, logits = fast_generate(qs, ids, mask, **options)
    assert torch.equal(tokens, truth)
    assert (logits - truth_logprob).abs().max() <= BOUND  # averages are log-probabilities
    _, plain = fast_generate(qs, ids, mask, think="never")
    assert (plain[:, 0].log_softmax(-1) - logits[:, 0]).abs().max() > 0.01


CASES = {
    "greedy thoughts": ({}, {}),
    "paper": ({"preset": "paper"}, {"thoughts": 2, "seed": 7}),
    "one sampled thought": ({"preset": "paper"}, {"seed": 8}),
    "threshold": ({}, {"thoughts": 2, "seed": 9, "threshold": None}),
}


@torch.no_grad()
def dividing_threshold(qs, texts):
    """Nats that one of the texts' next tokens exceeds and another doesn't."""
    entropy = sorted(float(torch.special.entr(softmax(qs.model(text[None]).logits[0, -1], -1)).sum()) for text in texts)
    return (entropy[-2] + entropy[-1]) / 2


@pytest.mark.parametrize("case", CASES)
def test_ways_to_think(thinker, case):
    changes, how = CASES[case]
    qs = thinker("qwen2", **changes).eval()
    texts, ids, mask = prompts((9, 6, 1), seed=1)
    if "threshold" in how:
        how = {**how, "threshold": dividing_threshold(qs, texts)}
    truth, truth_logprob = slow_generate(qs, texts, **how)
    options = {"thoughts": how.get("thoughts", 1), "sample_thoughts": "seed" in how, "seed": how.get("seed")}
    seen = []
    tokens, logits = fast_generate(qs, ids, mask, think=how.get("threshold", "always"), on_thoughts=seen.append, **options)
    assert torch.equal(tokens, truth)
    assert (logits.log_softmax(-1) - truth_logprob).abs().max() <= BOUND
    for b, text in enumerate(texts):
        _, z = slow_logprob(qs, text, b, how.get("thoughts", 1), how.get("seed"), how.get("threshold", -1))
        assert torch.equal(seen[0][b], torch.full_like(seen[0][b], -1) if z is None else z)
    assert int((seen[0][:, 0, 0] >= 0).sum()) == (1 if case == "threshold" else 3)


@pytest.mark.parametrize("stop", [{}, {"end_token_id": 60, "stop_threshold": 1 / 61}])
@pytest.mark.parametrize("name", ["mistral", "qwen3_5_text"])
def test_tokens_behind_one_thought_are_predicted_as_in_training(thinker, name, stop):
    """The mean of what the differentiable pass predicts for the next tokens behind the same thoughts, in every place."""
    qs = thinker(name, **stop).eval()
    _, ids, mask = prompts()
    seen = []
    how = {"think": "once", "thoughts": 2, "sample_thoughts": True, "seed": 5, "on_thoughts": seen.append}
    tokens, logits = fast_generate(qs, ids, mask, **how)
    assert len(seen) == 1 and (len({int(n) for n in (seen[0] >= 0).sum(-1).flatten()}) > 1) == bool(stop)
    trained = qs.with_config(replace(qs.thought_config, thoughts=2, lookahead=NEW, reward="gain", advantage="relu"))
    longer, ones = torch.cat([ids, tokens], 1), torch.ones_like(tokens)
    lengths = (seen[0] >= 0).sum(-1)[:, None]
    given = {"thought_ids": seen[0].clamp(min=0)[:, None], "thought_lengths": lengths if stop else None}
    with torch.no_grad():
        out = trained(longer, torch.cat([mask, ones], 1), anchors=torch.full((2, 1), ids.shape[1] - 1), **given)
    got = logits.gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(got.exp(), (-out.nll_mix[:, 0]).exp().mean(1), rtol=1e-4, atol=1e-6)
    always, _ = fast_generate(qs, ids, mask, **{**how, "think": "always"})
    assert torch.equal(always[:, 0], tokens[:, 0]) and len(seen) == 1 + NEW


def test_sampled_tokens_are_those_of_a_slow_generator(qs):
    texts, ids, mask = prompts()
    ids = ids + (1 - mask)  # pads with 1, which no text holds: the penalty sees padding
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), *warpers])
    torch.manual_seed(11)
    truth, _ = slow_generate(qs, texts, 8, 2, 5, processors=processors)
    how = {"do_sample": True, "max_new_tokens": 8, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    how |= {"repetition_penalty": 1.5, "eos_token_id": 60_000, "pad_token_id": 0}  # an end that is never sampled
    for options in (how, {"generation_config": GenerationConfig(**how)}):
        torch.manual_seed(11)
        out = qs.generate(ids, mask, thoughts=2, sample_thoughts=True, seed=5, **options)
        assert torch.equal(out[:, 9:], truth)


def test_without_thoughts_it_is_the_plain_models_generate(tiny, thinker, architecture):
    qs, plain = thinker(architecture).eval(), tiny(architecture)
    plain.set_attn_implementation("eager")
    _, ids, mask = prompts()
    for options in ({}, {"do_sample": True, "top_p": 0.9}, {"cache_implementation": "static"}, {"num_beams": 2}):
        torch.manual_seed(0)
        truth = plain.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
        torch.manual_seed(0)
        assert torch.equal(qs.generate(ids, mask, max_new_tokens=8, think="never", **options), truth)


def test_a_thinking_token_costs_T_plus_2_rows_and_the_text_runs_once(thinker):
    qs = thinker("qwen2").eval()
    forwards = []
    for layer in qs.model.model.layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: forwards.append((layer, (args or list(kwargs.values()))[0])), with_kwargs=True
        )
    _, ids, mask = prompts()

    def rows(**options):
        forwards.clear()
        tokens, _ = fast_generate(qs, ids, mask, **options)
        counts = [[x.shape[1] for layer, x in forwards if layer is mine] for mine in qs.model.model.layers]
        assert counts[0] == counts[1]
        return counts[0]

    prompt = ids.shape[1]
    assert rows(think="never") == [prompt] + [1] * (NEW - 1)
    assert rows() == [prompt] + [1] * (T + 2) + ([1] + [1] * (T + 2)) * (NEW - 1)
    assert rows(thoughts=4) == rows()
    assert rows(thoughts=2, sample_thoughts=True) == [prompt] + [2] * (T + 2) + ([1] + [2] * (T + 2)) * (NEW - 1)
    assert rows(think=1000.0) == rows(think="never")


def test_a_row_that_ends_does_not_disturb_the_others(qs):
    _, ids, mask = prompts()
    free, _ = fast_generate(qs, ids, mask, max_new_tokens=8)
    tokens, others = free.tolist()
    place = next(i for i in range(1, 8) if tokens[i] not in others + tokens[:i])
    options = {"max_new_tokens": 8, "eos_token_id": tokens[place], "pad_token_id": 1}
    out = qs.generate(ids, mask, **options)[:, 9:]
    assert out[1].tolist() == others
    assert out[0].tolist() == tokens[: place + 1] + [1] * (7 - place)
    assert qs.generate(ids[:1], mask[:1], **options)[0, 9:].tolist() == tokens[: place + 1]


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_streamers_criteria_and_processors(qs):
    _, ids, mask = prompts()
    streamer = Collect()
    free, _ = fast_generate(qs, ids, mask)
    forbidden = int(free[0, 0])

    def forbid(input_ids, scores):
        return scores.index_fill(1, torch.tensor([forbidden]), -torch.inf)

    out = qs.generate(
        ids,
        mask,
        max_new_tokens=8,
        eos_token_id=None,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([StopAt(12)]),
        logits_processor=LogitsProcessorList([forbid]),
    )
    assert out.shape == (2, 12) and forbidden not in out[0, 9:] and streamer.ended
    assert torch.equal(streamer.pieces[0], ids)
    assert torch.equal(torch.stack(streamer.pieces[1:], 1), out[:, 9:])


def test_start_and_end_ids_do_not_enter_the_text(thinker):
    qs = thinker("llama").eval()
    _, ids, mask = prompts()
    free, _ = fast_generate(qs, ids, mask)
    first, second = int(free[0, 0]), int(free[1, 0])
    assert first != second and first not in ids and second not in ids
    banning = thinker("llama", start_token_id=first, end_token_id=second).eval()
    for think in ("always", 0.0, 1000.0):
        tokens, _ = fast_generate(banning, ids, mask, think=think)
        assert first not in tokens and second not in tokens


@pytest.mark.parametrize("think", ["always", "once", "never", 1.0])
def test_prompts_without_a_meaning(qs, think):
    _, ids, mask = prompts()
    with pytest.raises(ValueError, match="at least one text of one token"):
        qs.generate(ids[:, :0], think=think)
    with pytest.raises(ValueError, match="from 0 to V-1=60, got 61"):
        qs.generate(ids.masked_fill(ids == ids[0, 3], 61), think=think)
    if think != "never":
        with pytest.raises(ValueError, match="pad on the left, row 1 ends in padding"):
            qs.generate(ids.flip(1), mask.flip(1), think=think, max_new_tokens=2)
        with pytest.raises(ValueError, match="row 0 has padding inside the text"):
            qs.generate(ids, mask.index_fill(1, torch.tensor([4]), 0), think=think, max_new_tokens=2)


def test_past_the_learned_positions(tiny, thinker):
    qs = thinker(tiny("gpt2", n_positions=24, max_position_embeddings=24)).eval()
    _, ids, mask = prompts((16, 10))
    # The fourth new token's thought comes after 19 tokens and takes T + 2 more rows.
    assert qs.generate(ids, mask, max_new_tokens=4, eos_token_id=None).shape == (2, 20)
    message = "text and thoughts need 25 positions and GPT2LMHeadModel has 24 learned positions"
    for options in ({"max_new_tokens": 5}, {"generation_config": GenerationConfig(max_new_tokens=5)}, {"max_length": 21}):
        with pytest.raises(ValueError, match=message):
            qs.generate(ids, mask, eos_token_id=None, **options)
    with pytest.raises(ValueError, match="need 25 positions"):
        qs.generate(torch.randint(3, 61, (1, 25)), think="never", max_new_tokens=1)
    padded, narrow = torch.zeros(1, 30, dtype=torch.long), torch.zeros(1, 30, dtype=torch.long)
    padded[:, 20:], narrow[:, 20:] = ids[1, 6:], 1
    assert torch.equal(qs.generate(padded, narrow, max_new_tokens=2)[:, 20:], qs.generate(padded[:, 20:], max_new_tokens=2))


def test_dropout_is_off_and_modes_come_back(thinker):
    """In rollouts too."""
    qs = thinker("gpt2")
    layers = qs.model.transformer.h
    layers[0].eval()
    _, ids, mask = prompts()
    for think in ("always", "never"):
        assert torch.equal(*(fast_generate(qs, ids, mask, think=think)[1] for _ in range(2)))
    assert torch.equal(*(qs.think(ids, mask, seed=1).logprob for _ in range(2)))
    assert qs.training and not layers[0].training and layers[1].training


def test_seeds(qs):
    """Without a seed, thoughts draw one from PyTorch's generator; nothing else there is used."""
    _, ids, mask = prompts()
    how = {"max_new_tokens": 6, "sample_thoughts": True}
    torch.manual_seed(0)
    first, second = (fast_generate(qs, ids, mask, **how)[1] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(fast_generate(qs, ids, mask, **how)[1], first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    fast_generate(qs, ids, mask)
    fast_generate(qs, ids, mask, **how, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_no_cache_but_the_wrappers(qs, name):
    """Under the names of transformers before and since 5.24."""
    with pytest.raises(ValueError, match=f"generate: {name} must be None where the model thinks.*got DynamicCache"):
        qs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, **{name: DynamicCache()})
