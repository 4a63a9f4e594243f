"""docs/group-rl.md's stand-ins for what other trainers compute equal their own functions, where these are installed."""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import quietstar
from quietstar.testing import tiny_model

PAGE = (Path(__file__).parents[3] / "docs/group-rl.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE[PAGE.index("\n### verl") :], re.MULTILINE | re.DOTALL)
PROMPTS = [5, 6, 7, 8], [20, 21]
SEQUENCES = [PROMPTS[0] + [9, 10], PROMPTS[0] + [9, 11, 12], PROMPTS[1] + [30], PROMPTS[1] + [31, 32, 33, 34]]
STARTS = [4, 4, 2, 2]  # of completions


@pytest.fixture(scope="module")
def ours():
    """The functions of the page, by name; the other code of their blocks runs on what its earlier blocks make."""
    model = tiny_model()
    quietstar.register_attention("sdpa")
    model.set_attn_implementation("quietstar")
    packed = {"packed": torch.tensor([5, 6, 7]), "cu_seqlens": torch.tensor([0, 3])}
    names = {"quietstar": quietstar, "torch": torch, "model": model, "print": lambda *_: None, **packed}
    for code in BLOCKS:
        exec(code, names)
    return SimpleNamespace(**names)


@pytest.fixture
def theirs(monkeypatch):
    """A module of a trainer. Stubbed are packages that need a GPU and that the function under test doesn't call."""

    def load(name, stubs=(), bare=()):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            pytest.skip(f"{name.partition('.')[0]} is not installed")
        for stub in stubs:
            spec = importlib.machinery.ModuleSpec(stub, None)
            monkeypatch.setitem(sys.modules, stub, MagicMock(__spec__=spec, __path__=[]))
        for package in bare:  # without what its __init__ imports
            parent = importlib.import_module(package.rpartition(".")[0])
            module = ModuleType(package)
            module.__path__ = [f"{parent.__path__[0]}/{package.rpartition('.')[2]}"]
            monkeypatch.setitem(sys.modules, package, module)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name}: {error}")

    return load


@pytest.fixture
def compare(tiny):
    def compare(ours, theirs, mask, entropies=True):
        """Functions of a model give log-probabilities and entropies; those that the mask selects are alike, and gradients."""
        assert mask.any()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(2, int(mask.sum()), generator=generator)
        weights[1] *= entropies
        results = []
        for run, attention in ((ours, "quietstar"), (theirs, "sdpa")):
            model = tiny("llama")
            model.set_attn_implementation(attention)
            found = [x[mask] for x in run(model)]
            (weights * torch.stack(found)).sum().backward()
            results.append(found[: 1 + entropies] + [x.grad for x in model.parameters()])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

    return compare


def padded(left):
    """Ids and attention mask [4,9], and the mask of completions [4,5]. With ``left`` prompts end alike, else completions do."""
    ids, attention, actions = torch.zeros(3, 4, 9, dtype=torch.int64)
    for i, (row, start) in enumerate(zip(SEQUENCES, STARTS, strict=True)):
        first = 4 - start if left else 9 - len(row)
        ids[i, first : first + len(row)] = torch.tensor(row)
        attention[i, first : first + len(row)] = 1
        actions[i, first + start : first + len(row)] = 1
    return ids, attention, actions[:, 4:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf(ours, theirs, compare, temperature):
    flash = [f"flash_attn{name}" for name in ("", ".bert_padding", ".utils", ".utils.distributed")]
    actors = theirs("openrlhf.models.actor", [*flash, "deepspeed"])
    ids, attention, actions = padded(left=True)

    def run(forward):
        def results(model):
            actor = actors.Actor(model, temperature=temperature)
            actor.packing_samples = False
            with torch.compiler.set_stance("force_eager"):
                logprobs, output = forward(actor, ids, actions, attention, return_output=True, return_entropy=True)
                assert torch.equal(logprobs, forward(actor, ids, actions, attention))
            return logprobs, output.entropy[:, -5:]

        return results

    compare(run(ours.openrlhf_forward), run(actors.Actor.forward), actions.bool())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_skyrl(ours, theirs, compare, temperature):
    name = "skyrl.backends.skyrl_train.workers.model_wrapper"
    wrapper = theirs(name, ["flash_attn", "flash_attn.bert_padding"], ["skyrl.backends"]).HFModelWrapper
    ids, attention, actions = padded(left=False)

    def run(forward):
        def results(model):
            wrapped = wrapper(model)
            given = wrapped, ids, 5, attention, temperature
            logprobs, output = forward(*given, return_output=True, compute_entropy=True)
            _, detached = forward(*given, return_output=True, compute_entropy=True, entropy_requires_grad=False)
            assert not detached["entropy"].requires_grad
            torch.testing.assert_close(forward(*given), logprobs)
            return logprobs, output["entropy"][:, -6:-1]

        return results

    compare(run(ours.skyrl_forward), run(wrapper.forward), actions.bool())


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.7, 1.0, 1.3, 0.5])], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_verl(ours, theirs, compare, monkeypatch, temperature, packed):
    module = theirs("verl.workers.engine.fsdp.transformer_impl")
    monkeypatch.setattr(module, "get_device_id", lambda: "cpu")
    rows = [torch.tensor(row) for row in SEQUENCES]
    ids = torch.nested.nested_tensor(rows, layout=torch.jagged)
    positions = torch.nested.nested_tensor([torch.arange(len(row)) for row in rows], layout=torch.jagged)
    batch = module.tu.get_tensordict({"input_ids": ids, "position_ids": positions})
    module.tu.assign_non_tensor(batch, use_remove_padding=packed, calculate_entropy=True)
    if isinstance(temperature, torch.Tensor):
        batch["temperature"] = temperature
    else:
        module.tu.assign_non_tensor(batch, temperature=temperature)
    names = "log_probs", "entropy"

    def own(model):
        engine = module.FSDPEngineWithLMHead.__new__(module.FSDPEngineWithLMHead)
        options = {"entropy_checkpointing": False, "entropy_from_logits_with_chunking": False}
        vars(engine).update(module=model, engine_config=SimpleNamespace(**options), use_ulysses_sp=False, pad_to_length=False)
        vars(engine).update(_autocast_dtype=torch.float32, get_data_parallel_group=lambda: None)
        engine.compute_entropy_from_logits = module.verl_F.entropy_from_logits
        found = {}

        def loss(model_output, **_):
            found.update(model_output)
            return torch.zeros(()), {}

        engine.forward_step(batch, loss, forward_only=False)
        return [found[name].values() for name in names]

    def shared(model):
        assert ours.verl_outputs(model, batch, False).keys() == {"log_probs"}
        found = ours.verl_outputs(model, batch, True)
        assert torch.equal(found["log_probs"].offsets(), ids.offsets())
        return [found[name].values() for name in names]

    compare(shared, own, torch.cat([torch.arange(len(row)) < len(row) - 1 for row in rows]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_slime(ours, theirs, compare, temperature):
    """Its entropies are those at temperature 1."""
    sglang = [f"sglang{name}" for name in ("", ".srt", ".srt.patch_torch", ".srt.utils", ".srt.model_executor")]
    actors = theirs("slime.backends.fsdp_utils.actor", [*sglang, "sglang.srt.model_executor.model_runner", "wandb"])
    lengths = torch.tensor([0, *map(len, SEQUENCES)])
    batch = {
        "tokens": torch.tensor(sum(SEQUENCES, [])),
        "position_ids": torch.cat([torch.arange(len(row)) for row in SEQUENCES]),
        "cu_seqlens": lengths.cumsum(0).int(),
        "response_lengths": [len(row) - start for row, start in zip(SEQUENCES, STARTS, strict=True)],
    }

    def own(model):
        model.config.use_cache = False  # SDPA keeps packed sequences apart without a cache alone, FlashAttention always
        model_args = actors.FSDPTrainRayActor._get_model_inputs_args(None, batch)
        logits = model(**model_args).logits.squeeze(0).float()
        return actors.get_logprob_and_entropy(logits, batch["tokens"], allow_compile=False, temperature=temperature)

    def responses(run):
        def results(model):
            logprobs, entropies = run(model)
            rows = actors.unpack_sequences({**batch, "cur_log_probs": logprobs, "entropy": entropies})
            return [torch.cat([row[name] for row in rows]) for name in ("cur_log_probs", "entropy")]

        return results

    mask = torch.ones(sum(batch["response_lengths"]), dtype=torch.bool)
    shared = responses(lambda model: ours.slime_outputs(model, batch, temperature))
    compare(shared, responses(own), mask, entropies=temperature == 1)
