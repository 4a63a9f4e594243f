"""Wherever a thought is mixed in, the prediction is that of the wrapper's own forward, with either preset.

Losses are the mixed log-probabilities themselves. Tokens are drawn from them, and answers scored, after they are made to add up
to 1, which those of the preset paper don't.
"""

import pytest
import torch
from torch.testing import assert_close

from quietstar import explain
from quietstar.evaluation.questions.answers import STOP, cut
from quietstar.evaluation.questions.asking import Asking, ask, prompt, scored_answers
from quietstar.evaluation.questions.reading import parse
from tests.quietstar.common import wrap

TEXT = "9 bytes\n,"


@pytest.fixture(params=["official", "paper"])
def qs(tiny, byte_tokenizer, request):
    model = tiny("llama", vocab_size=len(byte_tokenizer), eos_token_id=0, bos_token_id=None)
    return wrap(model, byte_tokenizer, preset=request.param, thoughts=2, thought_tokens=3, lookahead=2).eval()


@torch.no_grad()
def forward(qs, ids, places):
    """log p_mix [P,V] after each place of a text, from the loss alone: there a token is only a label, so try every one."""
    V = qs.lm_head.linear.out_features
    input_ids = torch.tensor([*ids, 0, 0]).expand(V, -1)  # the last place needs a target, and the text J + 2 tokens
    labels = torch.arange(V)[:, None].expand_as(input_ids)
    return -qs(input_ids, labels=labels, anchors=torch.tensor(places).expand(V, -1)).nll_mix[:, :, 0, 0].T


def of(logprobs, tokens):
    """Those [P] of one token for each place."""
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_only_the_paper_does_not_add_up(qs):
    total = forward(qs, qs.tokenizer(TEXT).input_ids, range(9)).logsumexp(1)
    assert (total.abs() < 1e-5).all() if qs.thought_config.mixing == "logits" else (total < -1e-3).all()


def test_explain(qs):
    report = explain(qs, TEXT)
    ids = [token.id for token in report.tokens]
    mixed = forward(qs, ids, range(8))
    assert_close(torch.tensor([token.mixed for token in report.tokens[1:]]), -of(mixed, ids[1:]))
    likeliest = [[(top.id, top.probability) for top in token.thoughts[0].top] for token in report.tokens[1:]]
    found, probability = torch.tensor(likeliest).unbind(-1)
    assert_close(probability, mixed.exp().gather(1, found.long()))
    assert torch.equal(found[:, 0].long(), mixed.argmax(1))


def test_generate(qs):
    ids = qs.tokenizer(TEXT, return_tensors="pt").input_ids
    out = qs.generate(ids, torch.ones_like(ids), 4, return_dict_in_generate=True, output_logits=True, do_sample=False)
    mixed = forward(qs, out.sequences[0].tolist(), range(8, 12)).log_softmax(1)
    assert_close(torch.cat(out.logits).log_softmax(1), mixed)
    assert out.sequences[0, 9:].tolist() == mixed.argmax(1).tolist()


def test_questions(qs):
    question = parse({"question": "2 and 2?", "answer": "#### 42"}, "row 0")
    answer = ask(qs, [question], Asking(max_new_tokens=3)).asked[0].answers["thinking"]
    (scored,) = scored_answers(qs, [question])
    among = forward(qs, scored.ids, [place - 1 for place in scored.places])[:, scored.allowed].log_softmax(1)
    own = [scored.allowed.tolist().index(scored.ids[place]) for place in scored.places]
    assert answer.probability == pytest.approx(float(of(among, own).sum().exp()), rel=1e-5)

    ids = qs.tokenizer(prompt(question)).input_ids
    for _ in range(3):
        ids = [*ids, int(forward(qs, ids, [len(ids) - 1]).argmax())]
    assert answer.text == cut(qs.tokenizer.decode(ids[-3:]), STOP)
