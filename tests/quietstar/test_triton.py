"""The wrapper end to end on the Triton back end: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

import quietstar

pytestmark = pytest.mark.kernels
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = quietstar.ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2, policy_weight=1.0)


@pytest.fixture
def step(tiny, monkeypatch):
    """``step(backend)``: thoughts and loss and gradients of one training step of a fresh model."""
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(backend, **changes):
        monkeypatch.setenv("QUIETSTAR_BACKEND", backend)
        model = tiny("gemma2", **changes).to(DEVICE)
        qs = quietstar.QuietStar(model, CONFIG, verify=False).train()
        out = qs(ids, attention_mask=torch.ones_like(ids).index_fill_(1, torch.tensor([0], device=DEVICE), 0), seed=1)
        out.loss.backward()
        return out, {name: parameter.grad for name, parameter in qs.named_parameters()}

    return run


def test_training_step_equals_that_of_the_reference(step):
    want, want_grads = step("reference")
    got, got_grads = step("triton")
    assert torch.equal(got.thought_ids, want.thought_ids)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.reward, want.reward, rtol=1e-4, atol=1e-5)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_training_step_in_bf16_and_compiled(tiny):
    """`auto` takes Triton on a GPU; mixed precision and a compiled model run end to end."""
    ids = torch.randint(3, 61, (2, 16), device=DEVICE)
    qs = quietstar.QuietStar(tiny("llama").to(DEVICE), CONFIG, verify=False).train()
    qs.model.model = torch.compile(qs.model.model, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = qs(ids, seed=0)
    out.loss.backward()
    assert out.loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in qs.parameters())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_rollouts_and_generation_are_replayed(tiny, name):
    """The first call runs eagerly, the second captures, later ones replay: all give what launches one by one give.

    PyTorch's products of experts wait for the device in fp32.
    """
    config = quietstar.ThoughtConfig(thoughts=2, thought_tokens=3, lookahead=2)
    dtype = torch.bfloat16 if name == "gpt_oss" else torch.float32
    qs, plain = (quietstar.QuietStar(tiny(name).to(DEVICE, dtype), config, verify=False) for _ in range(2))
    plain.graphs = False
    for seed in range(4):
        ids = torch.randint(3, 61, (2, 12), device=DEVICE)
        got, want = (x.think(ids, seed=seed, greedy=False) for x in (qs, plain))
        assert torch.equal(got.thought_ids, want.thought_ids) and torch.equal(got.logprob, want.logprob)
        options = {"max_new_tokens": 8, "eos_token_id": None, "sample_thoughts": True, "thoughts": 2, "seed": seed}
        assert torch.equal(qs.generate(ids, **options), plain.generate(ids, **options))
        with torch.no_grad():
            for x in (qs, plain):
                x.model.get_input_embeddings().weight.mul_(1.1)
    assert qs._graphs.why is None and qs._graphs.spare.graphs.why is None
    kinds = [type(known).__name__ for known in (*qs._graphs._met.values(), *qs._graphs.spare.graphs._met.values())]
    assert kinds == ["_Graph"] * 3


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name, compiled", [("llama", False), ("llama", True), ("gemma3_text", False)])
def test_training_steps_are_replayed(tiny, name, compiled):
    """In two parts each. Sums of gradients may be atomic, so that eager steps too differ in rounding."""
    accelerate = pytest.importorskip("accelerate")  # a GPU may be measured without
    from quietstar.run.step_graphs import StepGraphs
    from quietstar.training import thought_loss

    found = []
    for use in ("auto", False):
        qs = quietstar.QuietStar(tiny(name).to(DEVICE), CONFIG, verify=False).train()
        qs.graphs = use
        if compiled:
            qs.compile()
        step = StepGraphs(qs, qs, accelerate.Accelerator(), thought_loss, None)
        optimizer = torch.optim.AdamW(qs.parameters(), lr=1e-3)
        for i in range(4):
            step.zero_grad(optimizer)
            generator = torch.Generator().manual_seed(i)
            for part in torch.randint(3, 61, (2, 2, 12), generator=generator).to(DEVICE):
                texts = qs.texts(part)
                loss, _ = step(texts, qs.count_targets(texts), seed=i)
            optimizer.step()
        found.append([loss, *(weight.grad.clone() for weight in qs.parameters() if weight.grad is not None)])
        if use:
            assert step.graphs.why is None and step.graphs.any
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
