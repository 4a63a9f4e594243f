"""TRL's tree packing with our attention: what each sample gives alone, in attention, in models and in AsyncGRPO's trainer."""

import gc
import itertools
import queue
import random

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaConfig

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

import quietstar
from quietstar.group_rl import tree_packing
from quietstar.group_rl.tree_packing import TreeRowPass
from quietstar_kernels import ThoughtLayout
from tests.quietstar.group_rl.trainers import V, number_tokenizer


@pytest.fixture(autouse=True)
def name(monkeypatch):
    """Registered; TRL's own afterwards."""
    monkeypatch.setattr(packing, "tree_attention", packing.tree_attention)
    for changed in ("create_model_from_path", "get_peak_flops_per_device", "compute_flops_per_token"):
        monkeypatch.setattr(async_grpo_trainer, changed, getattr(async_grpo_trainer, changed))
    yield quietstar.register_tree_attention()
    monkeypatch.undo()
    packing.register_tree_attention()


def sample(ids, completion, group=0, advantage=1.0):
    """As AsyncGRPO's queue gives them: the last tokens are trained."""
    draw = np.random.default_rng(len(ids))
    mask = np.arange(len(ids)) >= len(ids) - completion
    old = np.where(mask, -4 + draw.normal(size=len(ids)), 0.0).astype(np.float32)
    return {
        "input_ids": np.array(ids), "completion_mask": mask.astype(int), "old_log_probs": old,
        "advantage": advantage, "group_id": group, "metrics": {},
    }  # fmt: skip


def random_samples(seed, roots=2, prompts=3, most=4):
    """Prompts, of which several have a first token in common, each with completions that fork; ragged."""
    draw = random.Random(seed)

    def ids(length):
        return [draw.randrange(3, 7) for _ in range(length)]

    samples = []
    for group in range(prompts):
        prompt = [10 + group % roots, 9, *ids(draw.randint(0, 5))]
        turn = ids(draw.randint(1, 4))
        for _ in range(draw.randint(1, most)):
            end = ids(draw.randint(1, 6))
            both = [*turn, *end] if draw.random() < 0.5 else end
            samples.append(sample(prompt + both, len(both), group, draw.choice([-1.0, 0.5, 2.0])))
    return samples


ROWS = {
    "one root": random_samples(0, roots=1),
    "several roots": random_samples(1, roots=3, prompts=5),
    "a sample": random_samples(2, prompts=1, most=1),
    "nothing shared": [sample([i, *range(20, 22 + i)], 2, i) for i in range(3, 7)],
    "a sample twice, and its beginning": [sample([5, 6, 7, 8], 2), sample([5, 6, 7, 8], 2), sample([5, 6, 7], 1)],
}
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 3, "scaling": 0.3},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 4, "sinks": True, "softcap": 1.5},
}


def pack(samples):
    row = packing.TreeRow()
    for one in samples:
        row.add(one)
    return row.pack()


def tensors(packed):
    given = {key: packed[key] for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    given["tree_max_seqlen_q"], given["tree_max_seqlen_k"] = packed["tree_max_seqlens"].tolist()
    return given


def dense(q, k, v, packed, sliding_window=None, scaling=None, softcap=None, s_aux=None):
    """The definition: the rows of a segment are the last ones of its path, and causal over it."""
    seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    cu_q, cu_k = (packed[f"tree_cu_seqlens_{x}"].tolist() for x in "qk")
    for s in range(len(cu_q) - 1):
        path = packed["tree_kv_index"][cu_k[s] : cu_k[s + 1]]
        for row in range(cu_q[s], cu_q[s + 1]):
            upto = len(path) - (cu_q[s + 1] - 1 - row)
            seen[row, path[max(0, upto - (sliding_window or upto)) : upto]] = True
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (scaling or q.shape[-1] ** -0.5) * q @ k.transpose(2, 3)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], 3)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def inputs(rows, dtype, sinks=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, rows, 16), (1, 2, rows, 16), (1, 2, rows, 16)] + [(4,)] * sinks
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(run, packed, options, dtype, atol):
    """``run`` of q, k, v and options against the definition in fp64, and the gradients of all."""
    options = dict(options)
    sinks = options.pop("sinks", False)
    results = []
    for function, kind in ((run, dtype), (lambda *x, **y: dense(*x, packed, **y), torch.float64)):
        given = inputs(len(packed["input_ids"]), kind, sinks)
        out = function(*given[:3], **options, **({"s_aux": given[3]} if sinks else {}))
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((out, *torch.autograd.grad((out * weight).sum(), given)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=atol)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("samples", ROWS.values(), ids=ROWS)
def test_attention_over_a_row(name, samples, options):
    packed = pack(samples)

    def run(q, k, v, **options):
        module = torch.nn.Module()
        module.config = LlamaConfig()
        out, weights = AttentionInterface()[name](module, q, k, v, None, **tensors(packed), **options)
        assert weights is None
        return out.transpose(1, 2)

    compare(run, packed, options, torch.float64, 1e-12)
    compare(run, packed, options, torch.float32, 1e-5)


@pytest.mark.kernels
def test_triton():
    """The kernels that GPUs run, in Triton's interpreter."""
    packed = pack(ROWS["several roots"])

    def run(q, k, v, sliding_window, softcap, s_aux):
        one = TreeRowPass(*list(tensors(packed).values())[:3], 99)
        return one.attend(q, k, v, window=sliding_window, softcap=softcap, sinks=s_aux, backend="triton")

    compare(run, packed, OPTIONS["all"], torch.float32, 1e-5)


def logprobs(model, packed, **given):
    """Of each trained token, as the trainer's forward finds it."""
    hidden = model.base_model(
        input_ids=packed["input_ids"][None], position_ids=packed["position_ids"][None], use_cache=False, **given
    ).last_hidden_state[0]
    labels = packed["shift_labels"][packed["token_index"]]
    logits = model.get_output_embeddings()(hidden)[packed["token_index"]]
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_models(tiny, name, architecture, monkeypatch):
    """A row of samples as one sample after the other with the model's own attention; with the layers checkpointed."""
    changes = {"final_logit_softcapping": None} if architecture == "gemma2" else {}
    changes |= {} if architecture == "llama" else {"sliding_window": 3}
    model, samples = tiny(architecture, **changes), ROWS["several roots"]
    made = []
    monkeypatch.setattr(ThoughtLayout, "tree", lambda *x, tree=ThoughtLayout.tree, **y: made.append(1) or tree(*x, **y))
    rows = {name: [pack(samples)], "eager": [pack([one]) for one in samples]}
    values, grads = {}, {}
    for attention, packed in rows.items():
        model.set_attn_implementation(attention)
        model.zero_grad()
        if attention == name:
            model.train().gradient_checkpointing_enable()
        else:
            model.eval()
        values[attention] = torch.cat([logprobs(model, x, **(tensors(x) if attention == name else {})) for x in packed])
        (values[attention] * torch.linspace(-1, 1, len(values[attention]))).sum().backward()
        grads[attention] = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(values[name], values["eager"], atol=1e-5, rtol=1e-5)
    assert grads[name].keys() == grads["eager"].keys()
    for key, want in grads["eager"].items():
        assert (grads[name][key] - want).norm() <= 1e-5 * want.norm(), key
    assert len(made) == 1  # for all layers, forward and backward
    del values, rows, packed
    gc.collect()
    assert not tree_packing._passes


class Rollouts:
    """A rollout worker and a transfer of weights that need no vLLM: samples made beforehand, again and again."""

    def __init__(self, samples):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        made = itertools.cycle(samples)  # the trainer asks for more than it trains on
        self.rollout_buffer.get = lambda timeout: RolloutSample([], [], model_version=0, **next(made))

    def send_weights(self, iterator):
        self.sent = [name for name, _ in iterator]

    def nothing(self, *_, **__):
        pass

    start = stop = update_model_version = check_health = init_weight_transfer = pause = resume = destroy = nothing


def train(folder, samples, batch, accumulation, attention=None):
    """Two optimizer steps; the weights, the losses, and what was sent to vLLM."""
    options = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 2}
    options |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "logging_steps": 1, "token_budget": 0}
    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "router_aux_loss_coef": 0.0}
    worker = Rollouts(samples)
    trainer = AsyncGRPOTrainer(
        str(folder), args=AsyncGRPOConfig(str(folder / "run"), **options), processing_class=number_tokenizer(),
        train_dataset=[{"prompt": "3"}], rollout_worker=worker, weight_transfer=worker,
    )  # fmt: skip
    if attention:
        trainer.model.set_attn_implementation(attention)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    ratios = [x["batch/packing_ratio"] for x in trainer.state.log_history if "loss" in x]
    return dict(trainer.model.named_parameters()), losses, ratios, worker.sent


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_trainer(tiny, tmp_path, architecture):
    """Two optimizer steps over packed trees as over one sample after the other with the model's own attention."""
    # As many trained tokens in each, so that microbatches of one sample add up.
    samples = [sample(one["input_ids"], 2, i // 4, one["advantage"]) for i, one in enumerate(ROWS["several roots"][:8])]
    model = tiny(architecture, vocab_size=V)
    model.save_pretrained(tmp_path)
    weights, losses, ratios, sent = train(tmp_path, samples, 4, 1)
    alone, want, stock, _ = train(tmp_path, samples, 1, 4, "eager")
    assert min(ratios) > 1.1 and max(stock) == 1
    assert sent == [key for key, _ in model.named_parameters()]
    torch.testing.assert_close(losses, want, atol=1e-5, rtol=1e-5)
    for key, start in model.named_parameters():
        change, expected = weights[key] - start, alone[key] - start
        assert (change - expected).norm() <= 1e-5 * expected.norm(), key
    assert (weights["model.norm.weight"] != model.model.norm.weight).all()


def test_refused(name, monkeypatch):
    """Other releases, and models that mix positions outside attention without saying so in the types of their layers."""
    module = torch.nn.Module()
    module.config = type("Config", (), {"model_type": "falcon_h1"})
    with pytest.raises(ValueError, match="^model type 'falcon_h1' cannot think: it mixes positions outside attention"):
        packing.tree_attention(module, *inputs(4, torch.float32), None, **tensors(pack(ROWS["a sample"])))
    monkeypatch.setattr(packing, "tree_attention", lambda module, query, key, value, paths: None)
    with pytest.raises(ValueError, match=r"must be as in trl 1.16, got the parameters module, query, key, value, paths$"):
        quietstar.register_tree_attention()
    monkeypatch.delattr(packing, "tree_attention")
    with pytest.raises(ValueError, match="trl must be release 1.16, whose AsyncGRPO packs trees, got: module .*attention"):
        quietstar.register_tree_attention()
