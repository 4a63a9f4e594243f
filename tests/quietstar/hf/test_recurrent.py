"""Hybrid models: packed rows give the logits and gradients of ordinary forwards, through every kind of recurrent layer."""

import copy
import functools
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache

import quietstar
from quietstar import QuietStar, evaluate
from quietstar.hf import recurrent
from quietstar.hf.attention import WRAPPED_NAME
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.lm_head import find_lm_head
from quietstar.hf.modules import backbone, embeddings
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.testing.tolerance import FACTOR, FLOOR_ULPS
from tests.quietstar.common import assert_same_gradients, text, texts_of
from tests.quietstar.evaluation import test_losses
from tests.quietstar.hf import all_architectures as everything
from tests.quietstar.thinking import test_chunks, test_generate, test_online
from tests.quietstar.thinking.test_rollout import slow_thoughts

FEW = ["qwen3_5_text", "lfm2", "bamba"]
TYPES = [
    *FEW, "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2_moe", "lfm3",
    "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2", "mamba2",
]  # fmt: skip


def few(*names):
    return [pytest.param(name, marks=() if name in names else pytest.mark.long) for name in TYPES]


def tree():
    a = torch.arange(3, 43).tolist()
    layout, _, _ = ThoughtLayout.from_sequences([a[:35] + [7, 8, 9], a[:35] + [7, 8, 5, 6], a[:35] + [9], a[:20] + [30, 31]])
    return layout


LAYOUTS = {
    "packed": lambda: ThoughtLayout.packed(
        torch.tensor([[0, 3, 3, 11, 11], [5, 9, 9, -1, -1]]), torch.tensor([[4, 1, 6, 0, 5], [2, 3, 7, 0, 0]]), text_length=12
    ),
    "every position, over chunks": lambda: ThoughtLayout.every_position(1, 40, 1, 3),
    "tree": tree,
    "documents": lambda: ThoughtLayout.from_documents(torch.tensor([[0] * 7 + [1] * 2 + [2] * 9]), 2, 3),
    "left padding": lambda: ThoughtLayout.from_padding(torch.arange(9) >= torch.tensor([[4], [0]]), 2, 3),
}


class _Double:
    """``torch`` for a modeling file whose fp32 is fp64: norms, gates and chunk rules of transformers compute in fp32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def paths(layout):
    """(b, rows) of each leaf: all rows from its text's first one on."""
    seen = layout.dense_mask()
    leaves = (seen.sum(1) == 1) & seen.any(2)
    return [(b, seen[b, leaf].nonzero()[:, 0]) for b, leaf in leaves.nonzero().tolist()]


def ordinary(model, layout, ids, weights):
    """Logits [B,M,V] of one ordinary forward for each leaf, and the gradients of their weighted sum."""
    logits, there = torch.zeros_like(weights), torch.zeros_like(ids, dtype=torch.bool)
    leaves = paths(layout)
    for some in (leaves[i : i + 8] for i in range(0, len(leaves), 8)):
        found = model(input_ids=pad_sequence([ids[b, rows] for b, rows in some], batch_first=True), use_cache=False).logits
        loss = 0.0
        for (b, rows), own in zip(some, found, strict=False):
            new = ~there[b, rows]
            loss = loss + (own[: len(rows)][new] * weights[b, rows[new]]).sum()
            logits[b, rows], there[b, rows] = own[: len(rows)].detach(), True
        loss.backward()
    return logits, taken_gradients(model)


def packed(model, layout, ids, weights):
    hidden = decode_rows(model, embeddings(model)(ids), layout.position_ids(), PackedPass(layout))
    logits = find_lm_head(model).logits(hidden)
    live = layout.dense_mask().any(2, keepdim=True)
    (logits * weights * live).sum().backward()
    return (logits * live).detach(), taken_gradients(model)


def taken_gradients(model):
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return grads


def errors(got, truth):
    """Relative: of the logits; of all gradients together, since a small one may be a sum that cancels; of the worst one."""
    assert got[1].keys() == truth[1].keys()
    sizes = torch.stack([x.norm() for x in truth[1].values()])
    off = torch.stack([(got[1][name] - x).norm() for name, x in truth[1].items()])
    return [float(x) for x in ((got[0] - truth[0]).norm() / truth[0].norm(), off.norm() / sizes.norm(), (off / sizes).max())]


def nudged(model, seed):
    """A copy whose weights are off by one in their last place, up or down at random."""
    nudged, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in nudged.parameters():
            x += x * (torch.randint(2, x.shape, generator=generator) * 2 - 1) * torch.finfo(x.dtype).eps
    return nudged


@contextmanager
def in_fp64(model):
    """All of it in fp64, by transformers' own code."""
    model.double().set_experts_implementation("eager")  # others refuse fp64
    file = mock.patch.object(sys.modules[type(model).__module__], "torch", _Double())
    with file, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model_type", few(*FEW))
def test_packed_rows_are_those_of_ordinary_forwards(model_type, name):
    """In fp32 they err twice as much as ordinary ones do at most, and in fp64 by as much less as its last place is smaller."""
    model, layout = everything.tiny_model(model_type), LAYOUTS[name]()
    model.set_attn_implementation(WRAPPED_NAME)
    ids = torch.randint(3, 61, (layout.B, layout.M), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(layout.B, layout.M, 61, generator=torch.Generator().manual_seed(2))
    weights = weights.where(layout.dense_mask().any(2, keepdim=True), 0)
    case = layout, ids, weights
    plain = [ordinary(x, *case) for x in (model, nudged(model, 1), nudged(model, 2))]
    got = packed(model, *case)
    with in_fp64(model):
        truth, got64 = (run(model, layout, ids, weights.double()) for run in (ordinary, packed))
    units = [max(some) for some in zip(*(errors(x, truth) for x in plain), strict=True)]
    found, found64 = errors(got, truth), errors(got64, truth)
    finest, floor = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps, FLOOR_ULPS * torch.finfo(torch.float32).eps
    for unit, error, error64 in zip(units[:2], found, found64, strict=False):
        assert error <= FACTOR * unit + floor
        assert error64 <= ((FACTOR + 1) * unit + floor) * finest  # the truth errs too
    assert found64[2] <= units[1]


@pytest.mark.parametrize("model_type", few("mamba2"))
def test_half_precision(model_type):
    """Mamba-2's last hidden state is fp32."""
    assert quietstar.verify(everything.tiny_model(model_type).bfloat16()).ok


@pytest.mark.parametrize("model_type", few(*FEW))
def test_thoughts_are_those_of_a_slow_sampler(thinker, model_type):
    """Of a text that crosses a chunk."""
    qs, ids = thinker(everything.tiny_model(model_type), thoughts=1), text(1, 36)
    truth, logprob = slow_thoughts(qs, ids, seed=5)
    thoughts = qs.think(ids, seed=5)
    assert torch.equal(thoughts.thought_ids, truth)
    torch.testing.assert_close(thoughts.logprob, logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("what", test_chunks.batches())
@pytest.mark.parametrize("model_type", few())
def test_anchors_in_chunks_and_layers_computed_again(thinker, model_type, what):
    model = everything.tiny_model(model_type)
    with in_fp64(model):
        qs = thinker(model).double()
        batch = {"input_ids": text(), "seed": 4, **test_chunks.batches()[what]}
        _, want = test_chunks.step_in(None, qs, **batch)
        qs.gradient_checkpointing_enable()
        for chunk in (None, 5):
            test_chunks.assert_same(qs, batch, 3 if what == "anchors" else 5)
            assert_same_gradients(test_chunks.step_in(chunk, qs, **batch)[1], want, 1e-12)


@pytest.mark.parametrize("model_type", few())
def test_generation_is_that_of_a_slow_generator(thinker, model_type):
    qs = thinker(everything.tiny_model(model_type)).eval()
    texts, ids, mask = test_generate.prompts()
    truth, logprob = test_generate.slow_generate(qs, texts, thoughts=2, seed=5)
    tokens, logits = test_generate.fast_generate(qs, ids, mask, thoughts=2, sample_thoughts=True, seed=5)
    assert torch.equal(tokens, truth) and (logits - logprob).abs().max() <= test_generate.BOUND


@pytest.mark.parametrize("model_type", few())
def test_evaluation_also_of_what_was_saved(thinker, model_type, tmp_path):
    qs = thinker(everything.tiny_model(model_type))
    base, mixed, another = test_losses.by_hand(qs, texts_of(test_losses.LENGTHS))
    figures = evaluate(qs, texts_of(test_losses.LENGTHS), 2)
    test_losses.close(figures, {"base": base.mean(), "mixed": mixed.mean(), "another": another.mean()})
    qs.save_pretrained(tmp_path)
    assert evaluate(QuietStar.from_pretrained(tmp_path), texts_of(test_losses.LENGTHS), 2) == figures


ADAPTED = r"(?!.*shared).*(in_proj|in_proj_\w+|[qkv]_proj)"  # peft refuses others here and there; Zamba 2 shares weights


@pytest.mark.parametrize("model_type", few("lfm2"))
def test_adapters_are_as_if_merged_and_saved(model_type, tmp_path):
    peft_models = pytest.importorskip("tests.quietstar.hf.lora_models")
    everything.tiny_model(model_type).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    qs = peft_models.wrap(base, target_modules=ADAPTED, modules_to_save=["conv1d"])
    out, grads = peft_models.gradients(qs)
    assert all(x.any() for name, x in grads.items() if "lora_" in name)
    qs.save_pretrained(tmp_path / "adapters")
    again = QuietStar.from_pretrained(tmp_path / "adapters").train()
    assert torch.equal(again(peft_models.IDS, seed=4).loss, out.loss)
    qs.merge_adapters()
    merged = qs(peft_models.IDS, seed=4)
    assert torch.equal(merged.thought_ids, out.thought_ids)
    torch.testing.assert_close(merged.nll_mix, out.nll_mix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", few())
def test_written_thoughts(model_type, monkeypatch):
    """Their loss and gradients, and sampling while others end."""
    model = everything.tiny_model(model_type, vocab_size=256)
    test_online.test_thoughts_that_end_themselves(2, "ee", 14.0, monkeypatch, model)
    model = everything.tiny_model(model_type, vocab_size=256)
    with in_fp64(model):
        test_online.test_loss_and_every_gradient("rlp", 0, model)


def test_rows_of_thoughts_outgrow_their_memory(monkeypatch):
    """Where a branch keeps rows and no state."""
    monkeypatch.setattr("quietstar.hf.decoder.as_state", lambda *_: False)
    model = everything.tiny_model("qwen3_5_text", vocab_size=256)
    test_online.test_thoughts_that_end_themselves(None, "e", 10.0, monkeypatch, model)


@pytest.fixture
def drop_in():
    """``drop_in(model_type)``: a model, what takes a layout, since Mamba-2's head drops keywords, and its arguments."""

    def make(model_type):
        model, layout = everything.tiny_model(model_type), ThoughtLayout.every_position(1, 6, 1, 2)
        model.set_attn_implementation(quietstar.register_attention("sdpa"))
        ids = torch.randint(3, 61, (1, layout.M), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids, "position_ids": layout.position_ids(), "use_cache": False, "thought_layout": layout}
        return model, backbone(model) if model_type == "mamba2" else model, inputs

    yield make
    quietstar.register_attention()


@pytest.mark.parametrize("model_type", few(*FEW, "mamba2"))
def test_a_layout_that_would_be_swallowed_is_an_error(drop_in, model_type):
    model, run, inputs = drop_in(model_type)
    case = inputs["thought_layout"], inputs["input_ids"], torch.zeros(1, 18, 61)
    mask = torch.ones(1, 6)  # of the text: padding is in the layout
    hidden = run(**inputs, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(find_lm_head(model).logits(hidden), packed(model, *case)[0], rtol=1e-5, atol=1e-5)
    if run is not model:
        with pytest.raises(ValueError, match="doesn't hand thought_layout on"):
            model(**inputs)
    for change, message in (
        ({"use_cache": True}, "there can be no cache"),
        ({"past_key_values" if run is model else "cache_params": DynamicCache(config=model.config)}, "there can be no cache"),
        ({"seq_idx": torch.zeros(1, 18, dtype=torch.int32)}, "there can be no cu_seqlens or seq_idx"),
        ({"cu_seq_lens_q": torch.tensor([0, 18])}, "there can be no cu_seqlens or seq_idx"),
        ({"thought_layout": replace(inputs["thought_layout"], own="full")}, "must have own='causal'"),
        ({"thought_layout": 3}, "thought_layout must be a ThoughtLayout, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**inputs | change)
    if run is model:  # a mask for each kind of layer, of which attention takes none
        masks = dict.fromkeys(("full_attention", "sliding_attention"))
        masks |= dict.fromkeys(("linear_attention", "conv"), torch.ones(1, 18))
        with pytest.raises(ValueError, match="got a prepared mask tensor"):
            run(**inputs, attention_mask=masks)


def test_layers_of_another_file_are_refused(drop_in, monkeypatch):
    """As those that come with weights on the hub."""
    monkeypatch.setattr("quietstar.hf.attention.FILES", recurrent.FILES - {"transformers.models.qwen3_5.modeling_qwen3_5"})
    _, run, inputs = drop_in("qwen3_5_text")
    with pytest.raises(ValueError, match="model type 'qwen3_5_text' cannot think: it mixes positions outside attention"):
        run(**inputs)


class Fused(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("model_type", few(*FEW, "mamba2"))
def test_a_layer_that_a_kernel_replaces_is_an_error(drop_in, model_type):
    """As the kernels package does it: every layer gets a forward of its own, also those that have no kernel."""
    model, run, inputs = drop_in(model_type)
    want = run(**inputs)[0]
    of_layers = [name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
    for name in of_layers:
        layer = model.get_submodule(name)
        layer.forward = MethodType(type(layer).forward, layer)
    assert torch.equal(run(**inputs)[0], want)
    layer.forward = MethodType(Fused.forward, layer)
    for message in ("something else runs the layer", "a kernel replaces its recurrent layers"):
        with pytest.raises(ValueError, match=message):
            run(**inputs)
        with pytest.raises(ValueError, match=message):
            packed(model, inputs["thought_layout"], inputs["input_ids"], torch.zeros(1, 18, 61))
        model.set_submodule(of_layers[-1], Fused())


@pytest.mark.parametrize("model_type", few(*FEW))
def test_functions_and_layers_replaced_later_are_an_error(drop_in, model_type, monkeypatch):
    """As a user replaces them, after quietstar was imported. A function that wraps ours is welcome."""
    model, run, inputs = drop_in(model_type)
    want, file = run(**inputs)[0], sys.modules[type(model).__module__]
    case = inputs["thought_layout"], inputs["input_ids"], torch.zeros(1, 18, 61)
    plain = {name: x for name, x in inputs.items() if name != "thought_layout"}

    def refused(message):
        for call in (lambda: run(**inputs), lambda: packed(model, *case)):
            with pytest.raises(ValueError, match=message):
                call()
        run(**plain)

    for name in [x for x in recurrent._FUNCTIONS if hasattr(file, x)]:
        with monkeypatch.context() as patch:
            ours = getattr(file, name)
            patch.setattr(file, name, functools.wraps(ours)(lambda *args, _ours=ours, **kwargs: _ours(*args, **kwargs)))
            assert torch.equal(run(**inputs)[0], want)
            patch.setattr(file, name, ours.__wrapped__)
            refused(f"{name} was replaced after quietstar was imported")
    layer = next(x for x in model.modules() if any(isinstance(child, torch.nn.Conv1d) for child in x.children()))

    class Mine(type(layer)):
        def forward(self, *args, thought_layout=None, **kwargs):
            return super().forward(*args, **kwargs)

    layer.__class__ = Mine
    refused("its forward is not transformers'")


@pytest.mark.parametrize("model_type", ["qwen3_5_text", pytest.param("bamba", marks=pytest.mark.long)])
def test_kernels_of_single_functions_run_without_a_layout_alone(drop_in, model_type, monkeypatch):
    """Those of a file, and the one for a whole mixer of Mamba-2 in training."""
    model, run, inputs = drop_in(model_type)
    want, file, called = run.train()(**inputs)[0], sys.modules[type(model).__module__], []
    whole = "mamba2_split_conv1d_scan_combined"
    kernels = {"causal_conv1d_fn": lambda x, *_, **__: called.append("conv") or x}
    kernels |= {whole: lambda x, *_, **__: called.append("whole") or x[..., :64]} if hasattr(file, whole) else {}
    for name in [x for x in vars(file) if callable(getattr(file, x)) and x.islower()]:
        monkeypatch.setattr(file, name, kernels.get(name, getattr(file, name)))  # all of them come back in the end
    recurrent.take_layouts(file)
    assert torch.equal(run(**inputs)[0], want) and not called
    run(**{name: x for name, x in inputs.items() if name != "thought_layout"})
    assert {*called} == {"whole" if whole in kernels else "conv"}


@pytest.mark.long
@pytest.mark.parametrize("model_type", [*FEW, "kimi_linear"])
def test_compiled_equals_eager(drop_in, model_type):
    model, run, inputs = drop_in(model_type)
    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        call(**inputs).logits.log_softmax(-1)[..., 0].mean().backward()
        found.append(taken_gradients(model))
    assert_same_gradients(*found, 1e-5)
