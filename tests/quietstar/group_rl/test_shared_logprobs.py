"""shared_logprobs: what a forward for each sequence gives, gradients too, with each shared token computed once."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quietstar
from quietstar.group_rl import shared_logprobs

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


def one_by_one(model, sequences, temperatures=1.0):
    """Log-probabilities and entropies; ``temperatures`` is a number, or tensors [T-1]."""
    found = []
    for i, ids in enumerate(map(torch.tensor, sequences)):
        temperature = temperatures if isinstance(temperatures, float) else temperatures[i][:, None]
        all_logprobs = (model(ids[None]).logits[0, :-1].float() / temperature).log_softmax(-1)
        found.append((all_logprobs.gather(1, ids[1:, None])[:, 0], -(all_logprobs.exp() * all_logprobs).sum(-1)))
    return [list(values) for values in zip(*found, strict=True)]


def check_equal(shared, plain, sequences, temperatures=1.0, **options):
    """Values, entropies, and gradients of a loss of both."""
    got = quietstar.shared_logprobs(shared, sequences, return_entropy=True, **options)
    want = one_by_one(plain, SEQUENCES, temperatures)
    for values, entropies in (got, want):
        weights = [torch.randn(len(x), generator=torch.Generator().manual_seed(i)) for i, x in enumerate(values)]
        sum((w * x + w.flip(0) * h).sum() for w, x, h in zip(weights, values, entropies, strict=True)).backward()
    for ours, theirs in zip(got, want, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    for (what, x), y in zip(shared.named_parameters(), plain.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), what
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, atol=2e-5, rtol=1e-4, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("name, changes", [("llama", {}), ("gemma2", {"sliding_window": 3}), ("gpt2", {})])
def test_equals_a_forward_for_each(model, name, changes):
    check_equal(*model(name, **changes), SEQUENCES, 0.7, temperature=0.7)


def test_temperatures(model):
    """One for each sequence, and one for each token; a soft cap comes before them."""
    each = [0.5, 2.0, 0.5, 1.0, 1.0, 0.7, 3.0]
    of_tokens = [torch.full((len(x) - 1,), t) for x, t in zip(SEQUENCES, each, strict=True)]
    check_equal(*model("gemma2"), SEQUENCES, of_tokens, temperature=each)
    tokens = [torch.rand(len(x), generator=torch.Generator().manual_seed(i)) + 0.5 for i, x in enumerate(SEQUENCES)]
    check_equal(*model("llama"), SEQUENCES, [x[1:] for x in tokens], temperature=tokens)


def test_packed_sequences(model):
    shared, plain = model("llama")
    ends = torch.tensor([0, *map(len, SEQUENCES)]).cumsum(0)
    tokens = [torch.rand(len(x), generator=torch.Generator().manual_seed(i)) + 0.5 for i, x in enumerate(SEQUENCES)]
    packed = torch.tensor(sum(SEQUENCES, []))
    check_equal(shared, plain, packed[None], [x[1:] for x in tokens], temperature=torch.cat(tokens), cu_seqlens=ends)


@pytest.mark.parametrize("max_rows", [1, 8, 100])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_cut_by_rows(model, max_rows, checkpointed):
    shared, plain = model("llama")
    shared.train(checkpointed)
    if checkpointed:
        shared.gradient_checkpointing_enable()
    rows = []
    shared.get_input_embeddings().register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].numel()))
    quietstar.shared_logprobs(shared, [[1, 2]])  # checks the model
    rows.clear()
    check_equal(shared, plain, SEQUENCES, max_rows=max_rows)
    assert max(rows) <= max(max_rows, max(map(len, SEQUENCES)))
    assert len(rows) == {1: 14, 8: 6, 100: 1}[max_rows]  # several are computed again in the backward


def test_dropout_is_drawn_again_in_the_recomputation(model, monkeypatch):
    """Checkpoints keep the random state of devices that they see among their inputs."""
    shared, _ = model("gpt2", resid_pdrop=0.3)
    shared.to("cuda" if torch.cuda.is_available() else "cpu").train()
    real, gradients = shared_logprobs.checkpoint, []

    def seen(call, *inputs, use_reentrant):
        assert shared.device in [x.device for x in inputs if isinstance(x, torch.Tensor)]
        return real(call, *inputs, use_reentrant=use_reentrant)

    for checkpoint in (seen, lambda call, *inputs, use_reentrant: call(*inputs)):
        monkeypatch.setattr(shared_logprobs, "checkpoint", checkpoint)
        torch.manual_seed(0)
        logprobs = quietstar.shared_logprobs(shared, SEQUENCES, max_rows=8)
        gradients.append(torch.autograd.grad(torch.cat(logprobs).sum(), shared.get_input_embeddings().weight)[0])
    torch.testing.assert_close(*gradients)


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
    for values in (quietstar.shared_logprobs(wrapped, SEQUENCES), one_by_one(plain, SEQUENCES)[0]):
        sum(x.sum() for x in values).backward()
    assert calls == [1] and "forward" not in vars(shared)
    for x, y in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(getattr(x.grad, "full_tensor", lambda x=x: x.grad)(), y.grad, atol=1e-5, rtol=1e-4)


def test_a_sharded_head_that_peft_trains_as_a_whole(model, one_process):
    shared, _ = model("llama")
    want = quietstar.shared_logprobs(copy.deepcopy(shared), SEQUENCES)
    tuned = get_peft_model(shared, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    fully_shard(shared.lm_head)
    got = quietstar.shared_logprobs(fully_shard(tuned), SEQUENCES)
    torch.testing.assert_close(got, want)


def test_offloaded_weights(model):
    """Accelerate moves the weights of a module to where it runs, for each of its calls."""
    shared, _ = model("llama")
    want = quietstar.shared_logprobs(copy.deepcopy(shared), SEQUENCES)
    offloaded = cpu_offload(shared, execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.is_meta
    with torch.no_grad():
        got = quietstar.shared_logprobs(offloaded, SEQUENCES)
    assert all(map(torch.equal, got, want))


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


WRONG = {
    "cu_seqlens must be integers [n+1] that grow from 0 to total=3": {
        "sequences": [1, 2, 3],
        "cu_seqlens": torch.tensor([0, 2]),
    },
    "with cu_seqlens, sequences must be one tensor": {"sequences": [[1, 2], [3, 4]], "cu_seqlens": torch.tensor([0, 2, 4])},
    "with cu_seqlens, sequences must be one tensor [total] or [1,total], got 'ab'": {
        "sequences": "ab",
        "cu_seqlens": torch.tensor([0, 2]),
    },
    "sequence 1 must hold token ids from 0 to V-1=60, got -100": {"sequences": [[1, 2], [1, -100]]},
    "sequence 0 must hold token ids from 0 to V-1=60, got 61": {"sequences": [[1, 61]]},
    "return_entropy must be True or False": {"return_entropy": None},
    "temperature must be a positive finite number": {"temperature": 0.0},
    "temperature must be positive and finite": {"temperature": [1.0, -1.0]},
    "temperature must be a positive number, one for each sequence": {"temperature": [1.0, 1.0, 1.0]},
    "temperature must be constant": {"temperature": torch.ones(2, requires_grad=True)},
    "max_rows must be 1 or more": {"max_rows": 0},
}


@pytest.mark.parametrize("message, arguments", WRONG.items(), ids=range(len(WRONG)))
def test_wrong_arguments(model, message, arguments):
    with pytest.raises(ValueError, match=f"^shared_logprobs: {re.escape(message)}"):
        quietstar.shared_logprobs(model("llama")[0], **{"sequences": [[1, 2], [1, 3]]} | arguments)


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
