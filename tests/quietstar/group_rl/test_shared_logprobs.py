"""shared_logprobs: what a forward for each sequence gives, gradients too, with each shared token computed once."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quietstar

# Two prompts; a prompt with two answers, of which one has two more turns; one sequence twice, one that another begins with.
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 12], [5, 6, 7, 20, 21], [5, 6, 7], [3, 4, 4, 5], [5, 6, 7, 8, 9, 12], [9]]


@pytest.fixture
def model(tiny):
    def make(name, **changes):
        quietstar.register_attention("sdpa")
        plain = tiny(name, **changes)
        plain.set_attn_implementation("eager")  # the others leave out Gemma 2's soft cap in some releases
        shared = copy.deepcopy(plain)
        shared.set_attn_implementation("quietstar")
        return shared, plain

    return make


def one_by_one(model, sequences, temperature=1.0):
    found = []
    for ids in map(torch.tensor, sequences):
        logits = model(ids[None]).logits[0, :-1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return found


@pytest.mark.parametrize("name, changes", [("llama", {}), ("gemma2", {"sliding_window": 3}), ("gpt2", {})])
def test_equals_a_forward_for_each(model, name, changes):
    shared, plain = model(name, **changes)
    weights = [torch.randn(len(x) - 1, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(SEQUENCES)]
    for one, run in ((shared, quietstar.shared_logprobs), (plain, one_by_one)):
        one.results = run(one, SEQUENCES, temperature=0.7)
        sum((weight * x).sum() for weight, x in zip(weights, one.results, strict=True)).backward()
    for got, want in zip(shared.results, plain.results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for (what, x), y in zip(shared.named_parameters(), plain.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), what
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4, msg=lambda m, what=what: f"{what}: {m}")


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_wrapped_models(model, one_process, wrap):
    """The call goes through what gathers weights and synchronises gradients."""
    shared, plain = model("llama")
    quietstar.shared_logprobs(shared, SEQUENCES)  # checks the model before it is sharded
    wrapped = wrap(shared)
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    for values in (quietstar.shared_logprobs(wrapped, SEQUENCES), one_by_one(plain, SEQUENCES)):
        sum(x.sum() for x in values).backward()
    assert calls == [1] and "forward" not in vars(shared)
    for x, y in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(getattr(x.grad, "full_tensor", lambda x=x: x.grad)(), y.grad, atol=1e-5, rtol=1e-4)


def test_each_shared_token_is_computed_once(model):
    shared, _ = model("llama")
    rows = []
    shared.get_decoder().layers[0].register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].shape[1]))
    quietstar.shared_logprobs(shared, SEQUENCES)
    # All but a sequence's last token, unless it is the only one.
    assert rows[-1] == len({tuple(x[:n]) for x in SEQUENCES for n in range(1, max(len(x), 2))})


def test_another_attention_is_refused(tiny):
    with pytest.raises(ValueError, match="shared_logprobs: model must be a transformers model with attn_impl"):
        quietstar.shared_logprobs(tiny("llama"), SEQUENCES)


def test_sequences_must_be_integers(model):
    with pytest.raises(ValueError, match=r"^shared_logprobs: sequence 1 must be integers \[T\], got torch.float32 \[2\]$"):
        quietstar.shared_logprobs(model("llama")[0], [[1, 2], [1, 0.5]])


def test_nothing_to_score(model):
    shared, _ = model("llama")
    for sequences in ([[4], [4], []], [[], []], []):
        assert [x.shape for x in quietstar.shared_logprobs(shared, sequences)] == [(0,)] * len(sequences)


@pytest.mark.parametrize(
    "call", [quietstar.QuietStar, quietstar.verify, lambda model: quietstar.shared_logprobs(model, SEQUENCES)]
)
def test_compiled_models_are_named(model, call):
    """``model.compile()`` keeps the class of the model, ``torch.compile(model)`` doesn't."""
    with pytest.raises(ValueError, match=r"got OptimizedModule: call model.compile\(\) in place of torch.compile\(model\)"):
        call(torch.compile(model("llama")[0]))
    with pytest.raises(ValueError, match="got DataParallel: pass the model in it"):
        quietstar.QuietStar(torch.nn.DataParallel(model("llama")[0]))
