"""Generation by graphs gives bitwise what eager generation gives, even when the text outgrows the memory allocated for it."""

import pytest
import torch

import quietstar
from tests.quietstar.hf.recorded_graph import compile_recorded, eager, with_recorded_graphs


@pytest.fixture
def wrap(tiny):
    """``wrap(name, **config changes)``: a model whose graphs are recorded on the CPU."""
    return lambda name="llama", **changes: with_recorded_graphs(tiny(name), **{"thoughts": 2, "thought_tokens": 4, **changes})


def prompt(number, longest=9):
    return torch.randint(3, 59, (2, longest), generator=torch.Generator().manual_seed(number))


def generated(qs, number, lengths=(9, 6), **options):
    ids = prompt(number, max(lengths))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    seen = []
    options = {"eos_token_id": None, "pad_token_id": 0, "on_thoughts": seen.append, **options}
    out = qs.generate(ids, mask, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, 1), *seen


HOW = {"greedy": {}, "sampled": {"thoughts": 3, "sample_thoughts": True, "seed": 2**63 + 5}, "sometimes": {"think": None}}


MORE = (("gpt2", "greedy"), ("gpt_oss", "sometimes"), ("qwen3_5_text", "sampled"), ("granitemoehybrid", "greedy"))
LONG = [pytest.param(*case, marks=pytest.mark.long) for case in MORE]


@pytest.mark.parametrize("name, how", [("llama", "sampled"), *LONG])
def test_replayed_generation_equals_eager_generation(wrap, name, how):
    qs, options = wrap(name), HOW[how]
    if "think" in options:
        with torch.no_grad():
            options = {"think": float(torch.special.entr(qs.model(prompt(0)).logits.softmax(-1)).sum(-1).median())}
    capture = qs._graphs.capture
    for number, lengths in enumerate([(9, 6), (4, 11), (7, 7)]):
        got, want = (generated(x, number, lengths, **options) for x in (qs, eager(qs)))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(capture.recordings) == 2, "one for reading a token and one for thinking serve all texts"
    assert capture.replays >= 12 - 6 * (how == "sometimes")


def test_generation_with_thoughts_that_stop(wrap):
    qs = wrap(end_token_id=60, stop_threshold=1 / 61)
    for seed in range(2):
        got, want = (generated(x, 0, thoughts=3, sample_thoughts=True, seed=seed) for x in (qs, eager(qs)))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert len({int((row >= 0).sum()) for row in got[2].flatten(0, 1)}) > 1
    assert qs._graphs.capture.replays > 6


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_a_text_that_outgrows_its_memory(wrap, monkeypatch, compiled):
    """Its graphs are captured again."""
    torch.compiler.reset()
    monkeypatch.setattr(quietstar.thinking.generate, "ROOM", 4)
    monkeypatch.setattr(quietstar.thinking.generate, "AHEAD", 0)
    qs = wrap()
    if compiled:
        compile_recorded(qs)
    ids = torch.randint(3, 59, (1, 7), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 23, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(qs.generate(ids, **options), eager(qs).generate(ids, **options))
    assert len(qs._graphs.capture.recordings) == 5


def test_the_content_of_unused_memory_changes_nothing(wrap):
    qs = wrap("mistral")
    want = generated(qs, 0)
    store = qs._graphs.spare.store
    for entry in store.entries:
        for x in entry.text:
            x.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(generated(qs, 0), want, strict=True))
    assert qs._graphs.spare.store is store and store.entries[0].text[0][:, :, 20:].isnan().all()
