"""TRL's trainers with shared prompts: losses, gradients, entropies and whole runs equal the stock trainers'."""

import random
from contextlib import nullcontext

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from quietstar.group_rl.completions import without_padding
from quietstar.group_rl.shared_prompt import SharedPrompts, _sort_rows
from quietstar.hf.modules import unwrapped
from quietstar_kernels import ThoughtLayout
from tests.quietstar.group_rl.trainers import (
    PAIRS,
    SharedGRPO,
    V,
    config_of,
    number_tokenizer,
    sum_of_ids,
    weights_of,
)

PAD = 0
HOOK = "_get_per_token_logps_and_entropies"
BOUND = 1e-5


@pytest.fixture
def trainer(tmp_path):
    """``trainer(cls, model, **arguments)``; ``peft_config`` goes to the trainer, the others to its config."""
    data = Dataset.from_list([{"prompt": " ".join(str(3 + 5 * i + j) for j in range(1 + 3 * (i % 3)))} for i in range(8)])

    def make(cls, model, peft_config=None, **arguments):
        arguments = config_of(cls, tmp_path, **{"per_device_train_batch_size": 4, "max_completion_length": 5} | arguments)
        made = cls(model, sum_of_ids, arguments, data, processing_class=number_tokenizer(), peft_config=peft_config)
        made.current_gradient_accumulation_steps = 1  # as ``train`` does, and what follows
        if made.args.activation_checkpointing:  # TRL's default
            made.model.gradient_checkpointing_enable()
        made.model.train()
        return made

    return make


def batch(seed=0, prompts=(5, 1, 3), completions=((4, 1, 6), (2, 0, 5), (3, 6, 1)), order=None):
    """Generated inputs of a step: prompts padded on the left, completions on the right, rows in ``order``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(i, length) for i, group in enumerate(completions) for length in group]
    rows = rows if order is None else [rows[i] for i in order]
    texts = [torch.randint(3, V, (length,), generator=generator) for length in prompts]
    P, T = max(prompts) + 1, max(length for _, length in rows) + 1
    prompt_ids, completion_ids = torch.full((len(rows), P), PAD), torch.full((len(rows), T), PAD)
    prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
    for b, (i, length) in enumerate(rows):
        prompt_ids[b, P - prompts[i] :], prompt_mask[b, P - prompts[i] :] = texts[i], 1
        completion_ids[b, :length], completion_mask[b, :length] = torch.randint(3, V, (length,), generator=generator), 1

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": random(len(rows)) + 0.3,
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": -4 + 0.3 * random(len(rows), T),
        "ref_per_token_logps": -4 + 0.3 * random(len(rows), T),
        "old_logps": -12 + random(len(rows)),  # RLOO's, of whole completions
    }


def hook_arguments(inputs):
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    return ids, mask, inputs["completion_ids"].shape[1]


def distance(got, truth):
    return float((got.detach() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-30))


def step(trainer, inputs):
    """The loss of a step and all its gradients."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss, {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def check_equal(stock, ours, inputs, bound=BOUND):
    (loss, grads), (shared_loss, shared_grads) = step(stock, inputs), step(ours, inputs)
    assert distance(shared_loss, loss) < bound
    assert grads.keys() == shared_grads.keys() and all(grad is not None for grad in grads.values())
    far = {name: distance(shared_grads[name], grad) for name, grad in grads.items()}
    assert not {name: d for name, d in far.items() if not d < bound}


SHUFFLED = [7, 2, 4, 0, 8, 5, 1, 6, 3]


@pytest.mark.parametrize("activation_checkpointing", [True, False])
def test_loss_and_gradients(tiny, trainer, activation_checkpointing):
    """Of TRL's default loss; optimizer steps have the others."""
    options = {"activation_checkpointing": activation_checkpointing}
    stock, ours = (trainer(cls, tiny("llama").double(), **options) for cls in (GRPOTrainer, SharedGRPO))
    for order in (None, SHUFFLED):
        check_equal(stock, ours, batch(order=order))
    without_old = {name: value for name, value in batch(seed=1).items() if name != "old_per_token_logps"}
    check_equal(stock, ours, without_old)


def test_prompts_and_completions_that_begin_alike(tiny, trainer):
    """As with a system prompt; and completions that are the same, of which a prefix is one."""
    stock, ours = (trainer(cls, tiny("llama").double()) for cls in (GRPOTrainer, SharedGRPO))
    inputs = batch(order=SHUFFLED, prompts=(5, 5, 5))
    inputs["prompt_ids"][:, 1:4] = 7
    inputs["completion_ids"][:, :3] = inputs["completion_mask"][:, :3] * 8
    check_equal(stock, ours, inputs)


# A window and soft caps; a scale of logits; normalised queries and keys; experts; layers that drop the layout; recurrent ones.
MORE = ("granite", "qwen3", "mixtral", "stablelm", "granitemoehybrid")


@pytest.mark.parametrize("name", ["gemma2", "qwen3_5_text", *(pytest.param(x, marks=pytest.mark.long) for x in MORE)])
def test_architectures(tiny, trainer, name, monkeypatch):
    monkeypatch.setitem(tiny.__globals__["ARCHITECTURES"], "stablelm", {})
    options = {"router_aux_loss_coef": 0.0} if name in ("mixtral", "granitemoehybrid") else {}
    stock, ours = (trainer(cls, tiny(name), **options) for cls in (GRPOTrainer, SharedGRPO))
    check_equal(stock, ours, batch(order=SHUFFLED), bound=5e-5)  # fp32: some can't run in fp64


@pytest.mark.parametrize("room", [18, 19])
def test_rotary_embeddings_that_change_with_the_longest_position(tiny, trainer, room):
    """TRL's rows of this batch are 19 long, padding included, and its completions end by position 17."""
    inputs = batch(prompts=(11, 1, 3))
    factors = {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": room, **factors}
    made = [tiny("llama", rope_parameters=dict(rope)).double() for _ in range(2)]
    stock, ours = (trainer(cls, model) for cls, model in zip((GRPOTrainer, SharedGRPO), made, strict=True))
    if room == 19:
        check_equal(stock, ours, inputs)
    else:
        with pytest.raises(ValueError, match="need 19 positions and LlamaForCausalLM has 18 positions before longrope"):
            step(ours, inputs)


def lora():
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.long
def test_lora(tiny, trainer):
    """Gradients, and log-probabilities of the reference: the model with its adapters off."""
    stock, ours = (trainer(cls, tiny("llama").double(), peft_config=lora(), beta=0.1) for cls in (GRPOTrainer, SharedGRPO))
    for weight, other in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        weight.data = other.data.double().clone()
        other.data = weight.data.clone()
    inputs = batch(order=SHUFFLED)
    check_equal(stock, ours, inputs)

    def reference(one):
        with torch.no_grad(), one.model.disable_adapter():
            return getattr(one, HOOK)(one.model, *hook_arguments(inputs))[0]

    assert distance(reference(ours), reference(stock)) < BOUND
    on, _, _ = getattr(ours, HOOK)(ours.model, *hook_arguments(inputs))
    assert distance(reference(ours), on) > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_that_are_trained_as_a_whole(tiny, trainer, tied):
    whole = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    stock, ours = (trainer(x, tiny("llama", tie_word_embeddings=tied), peft_config=whole) for x in (GRPOTrainer, SharedGRPO))
    inputs = batch(order=SHUFFLED)
    for one in (stock, ours):
        with torch.no_grad():
            for i, weight in enumerate(x for x in one.model.parameters() if x.requires_grad):
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    for on in (True, False):
        with torch.no_grad(), nullcontext() if on else ours.model.disable_adapter():
            ours_now = getattr(ours, HOOK)(ours.model, *hook_arguments(inputs))[0]
        with torch.no_grad(), nullcontext() if on else stock.model.disable_adapter():
            truth = getattr(stock, HOOK)(stock.model, *hook_arguments(inputs))[0]
        torch.testing.assert_close(ours_now, truth, rtol=1e-4, atol=1e-4)
    ours.compute_loss(ours.model, inputs).backward()
    assert unwrapped(ours.model).lm_head.modules_to_save["default"].weight.grad.abs().max() > 0


def test_lists_are_sorted_with_their_rows():
    """Also over the steps, as tensors are: the row of a list is of the same completion."""
    ids = torch.tensor([[5], [3], [4], [3], [5], [4]])
    whole = {f"{part}_ids": ids for part in ("prompt", "completion")}
    whole |= {f"{part}_mask": torch.ones_like(ids) for part in ("prompt", "completion")}
    whole |= {"names": [f"row {i} of {int(x)}" for i, x in enumerate(ids)], "number": 2, "rewards": torch.arange(6)}
    steps = [{name: x if name == "number" else x[i : i + 2] for name, x in whole.items()} for i in (0, 2, 4)]
    found = _sort_rows(steps)
    assert [step["number"] for step in found] == [2, 2, 2] and [len(step["names"]) for step in found] == [2, 2, 2]
    assert [step["prompt_ids"].flatten().tolist() for step in found] == [[3, 3], [4, 4], [5, 5]]
    for step in found:
        rows = zip(step["rewards"].tolist(), step["prompt_ids"].flatten().tolist(), strict=True)
        assert step["names"] == [f"row {i} of {x}" for i, x in rows]


@pytest.mark.long
def test_a_reference_adapter(tiny, trainer):
    """TRL copies the adapter of a model that already has one."""
    one = trainer(SharedGRPO, get_peft_model(tiny("llama"), lora()), beta=0.1)
    arguments = hook_arguments(batch())
    with torch.no_grad():
        before, _, _ = getattr(one, HOOK)(one.model, *arguments)
        for name, weight in one.model.named_parameters():
            if ".default." in name:
                weight.mul_(2)
        after, _, _ = getattr(one, HOOK)(one.model, *arguments)
        one.model.set_adapter("ref")
        reference, _, _ = getattr(one, HOOK)(one.model, *arguments)
    assert distance(reference, before) < BOUND < 0.01 < distance(after, before)


@pytest.mark.parametrize("batch_size", [None, pytest.param(2, marks=pytest.mark.long)])
def test_logprobs_and_entropies(tiny, trainer, batch_size):
    stock, ours = (trainer(cls, tiny("llama").double()) for cls in (GRPOTrainer, SharedGRPO))
    for inputs in (batch(), batch(order=SHUFFLED), batch(seed=1, prompts=(4,), completions=((0, 0),))):
        arguments = hook_arguments(inputs)
        with torch.no_grad():
            pairs = [getattr(one, HOOK)(one.model, *arguments, batch_size, compute_entropy=True) for one in (ours, stock)]
        for got, truth in zip(*(pair[:2] for pair in pairs), strict=True):
            assert got.shape == truth.shape and bool((got[inputs["completion_mask"] == 0] == 0).all())
            assert distance(got, truth) < BOUND or not truth.any()
    assert getattr(ours, HOOK)(ours.model, *arguments)[1:] == (None, None)


def test_each_prompt_is_computed_once(tiny, trainer, monkeypatch):
    """Of 4 prompts with 4 completions each, in 4 microbatches."""
    found, made = [], ThoughtLayout.from_sequences
    monkeypatch.setattr(ThoughtLayout, "from_sequences", lambda *args: found.append(made(*args)[0]) or made(*args))
    trainer(SharedGRPO, tiny("llama"), gradient_accumulation_steps=4, max_steps=1).train()
    assert [layout.lo.unique().numel() for layout in found] == [1, 1, 1, 1]


def test_other_padding_is_refused():
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    for row, values, message in (
        (0, [1, 0, 1, 1, 1, 1], "prompts must be padded on the left alone, broken in row 0"),
        (1, [1, 1, 1, 0, 1, 1], "completions must be padded on the right alone, broken in row 1"),
        (1, [0, 0, 0, 1, 1, 1], "prompts must hold at least one token, broken in row 1"),
    ):
        wrong = mask.clone()
        wrong[row] = torch.tensor(values)
        with pytest.raises(ValueError, match=f"^attention_mask: {message}$"):
            without_padding(ids, wrong, 3)
    with pytest.raises(ValueError, match="^completion_length must be 1 to 5, got 6$"):
        without_padding(ids, mask, 6)


class Weights(TrainerCallback):
    """The weights before training and after each optimizer step."""

    def on_train_begin(self, args, state, control, model, **_):
        self.all = [weights_of(model)]

    def on_step_end(self, args, state, control, model, **_):
        self.all.append(weights_of(model))


def random_options(seed):
    """A trainer and its options, drawn at random: how a generation is cut, and all that a loss depends on."""
    draw = random.Random(seed)
    size, steps = draw.choice([(1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (4, 1), (4, 2), (4, 4)])
    options = {
        "per_device_train_batch_size": size,
        "steps_per_generation": steps,
        "gradient_accumulation_steps": draw.choice([1, 2, 3, 4]),
        "num_generations": draw.choice([n for n in (2, 4) if size * steps % n == 0]),
        "num_iterations": draw.choice([1, 1, 2]),
        "loss_type": draw.choice(["grpo", "bnpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]),
        "importance_sampling_level": draw.choice(["token", "sequence"]),
        "scale_rewards": draw.choice(["group", "batch", "none"]),
        "beta": draw.choice([0.0, 0.2]),
        "delta": draw.choice([None, 1.5]),
        "off_policy_mask_threshold": draw.choice([None, None, 0.1]),
        "top_entropy_quantile": draw.choice([1.0, 1.0, 1.0, 0.5]),
        "entropy_coef": draw.choice([0.0, 0.0, 0.0, 0.3]),
        "use_adaptive_entropy": draw.random() < 0.1,
        "entropy_target": 9.0,  # below it the bonus counts
        "mask_truncated_completions": draw.choice([False, True]),
        "max_grad_norm": draw.choice([0.0, 1.0]),
        "temperature": draw.choice([1.0, 0.7]),
    }
    trainer = draw.choice([GRPOTrainer] * 4 + [RLOOTrainer])
    known = RLOOConfig if trainer is RLOOTrainer else GRPOConfig
    return trainer, {name: value for name, value in options.items() if name in known.__dataclass_fields__}


def completions_at_random(self, prompt_ids, *_):
    """In place of generation, so that about half of these end."""
    draw = random.Random(self._step)
    rows = [[draw.randrange(3, V) for _ in range(draw.randrange(1, 5))] + draw.choice([[], [2]]) for _ in prompt_ids]
    return (rows, None) if isinstance(self, GRPOTrainer) else rows


# A quantile of entropies, a bonus for them, bnpo, RLOO, and TRL's generation; with generations that cross optimizer steps.
SHORT = (4, 8, 20, 33, 39)
SEEDS = sorted({*range(16), *SHORT})


@pytest.mark.parametrize("seed", [pytest.param(x, marks=() if x in SHORT else pytest.mark.long) for x in SEEDS])
def test_optimizer_steps(tiny, trainer, tmp_path, monkeypatch, seed):
    cls, options = random_options(seed)
    tiny("llama", num_hidden_layers=1).double().save_pretrained(tmp_path / "base")  # the reference is loaded by its name
    found = []
    for one in (cls, PAIRS[cls]):
        if seed % 3 or options.get("mask_truncated_completions"):
            monkeypatch.setattr(one, "_generate_single_turn", completions_at_random)
        model, weights = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), Weights()
        made = trainer(one, model, max_steps=3, learning_rate=0.03, **options)
        made.add_callback(weights)
        made.train()
        assert len(weights.all) == 1 + 3
        found.append([after - before for before, after in zip(weights.all, weights.all[1:], strict=False)])
    assert max(float(update.norm()) for update in found[0]) > 1e-3
    far = [distance(update, truth) for truth, update in zip(*found, strict=True)]
    assert max(far) < BOUND, (cls, options, far)


@pytest.mark.long
def test_bf16(tiny, trainer):
    """Under autocast, and with a head in fp32; also of a model that was trained so before."""
    try:
        trainer(SharedGRPO, model := tiny("llama"), bf16=True, max_steps=1).train()
        one = trainer(SharedGRPO, model, bf16=True, cast_lm_head_to_fp32=True, max_steps=1)
        one.train()
        logprob = getattr(one, HOOK)(one.model, *hook_arguments(batch()))[0]
        with torch.no_grad():
            truth = getattr(GRPOTrainer, HOOK)(one, one.model, *hook_arguments(batch()))[0]
        assert logprob.dtype == torch.float32 and distance(logprob, truth) < 0.02
    finally:  # a precision is the whole process's
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_model_stays_usable(tiny, trainer, tmp_path):
    model = tiny("llama")
    prompt = torch.tensor([[0, 5, 6], [7, 8, 9]])
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 4, "do_sample": False}
    before = model.generate(prompt, **options)
    one = trainer(SharedGRPO, model, activation_checkpointing=False)
    assert torch.equal(model.generate(prompt, **options), before)
    one.save_model(tmp_path / "saved")
    assert "quietstar" not in (tmp_path / "saved/config.json").read_text()


REFUSED = {
    "liger": ({"use_liger_kernel": True}, "leave out use_liger_kernel"),
    "compile": ({"torch_compile": True}, "leave out torch_compile"),
    "paged": ({"use_transformers_continuous_batching": True}, "leave out use_transformers_continuous_batching"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_refused_options(tiny, trainer, options, message):
    with pytest.raises(ValueError, match=f"^SharedGRPO: .*{message}$"):
        trainer(SharedGRPO, tiny("llama"), **options)


def test_refused_sharding(tiny, trainer, monkeypatch):
    """Accelerate offers these on GPUs alone, so its state is set by hand."""
    made = trainer(SharedGRPO, tiny("llama"))
    for name in ("tp", "cp", "sp"):
        monkeypatch.setattr(made.accelerator.state, "parallelism_config", ParallelismConfig(**{f"{name}_size": 2}))
        with pytest.raises(ValueError, match="^SharedGRPO: .*leave out tensor, context and sequence parallelism$"):
            made._check_options()
    monkeypatch.setattr(made.accelerator.state, "parallelism_config", None)
    monkeypatch.setattr(made, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="^SharedGRPO: FSDP1 .*set fsdp_version: 2 in Accelerate's configuration$"):
        made._check_options()


def test_refused_models(tiny, trainer):
    falcon = FalconForCausalLM(FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="^model type 'falcon' cannot think: its attention does not go through"):
        trainer(SharedGRPO, falcon)
    with pytest.raises(ValueError, match="^SharedGRPO: .*set router_aux_loss_coef=0$"):
        trainer(SharedGRPO, tiny("mixtral"), router_aux_loss_coef=0.1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="^adapters must change layers only, got PROMPT_TUNING"):
        trainer(SharedGRPO, tiny("llama"), peft_config=config)


def test_refused_releases():
    class Without(SharedPrompts):
        pass

    class Renamed(torch.nn.Module):
        def _get_per_token_logps_and_entropies(self, model, input_ids, keep):
            pass

    class Other(SharedPrompts, Renamed):
        pass

    with pytest.raises(ValueError, match="^Without: put SharedPrompts before trl's GRPOTrainer or RLOOTrainer"):
        Without()
    with pytest.raises(ValueError, match=r"must be as in trl 1\.16, got the parameters self, model, input_ids, keep$"):
        Other()
