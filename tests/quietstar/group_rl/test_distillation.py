"""On-policy distillation: shared_divergence is what forwards of both models for each sequence give, as TRL computes it."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quietstar
from tests.quietstar.group_rl.test_shared_logprobs import SEQUENCES, one_process  # noqa: F401  # a fixture

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from datasets import Dataset
from peft import LoraConfig
from trl import DistillationTrainer, GRPOTrainer
from trl.experimental.gkd import GKDTrainer

from tests.quietstar.group_rl.trainers import SharedDistilling, config_of, number_tokenizer, weights_of


@pytest.fixture
def models(tiny):
    """A student, a teacher of another architecture, and the same two with plain attention."""
    quietstar.register_attention("sdpa")
    plain = [tiny("llama"), tiny("gemma2", vocab_size=tiny("llama").config.vocab_size)]
    for one in plain:
        one.set_attn_implementation("eager")
    shared = copy.deepcopy(plain)
    for one in shared:
        one.set_attn_implementation("quietstar")
    return shared, plain


def one_by_one(student, teacher, sequences, beta, temperature):
    found = []
    for ids in sequences:
        logits = [model(torch.tensor(ids)[None]).logits[0, :-1].float() for model in (student, teacher)]
        found.append(GKDTrainer.generalized_jsd_loss(logits[0], logits[1].detach(), None, beta, temperature, "none").sum(-1))
    return found


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equals_forwards_for_each(models, beta):
    weights = [torch.randn(len(x) - 1, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(SEQUENCES)]
    found = [
        run(*pair, SEQUENCES, beta, 0.7) for pair, run in zip(models, (quietstar.shared_divergence, one_by_one), strict=True)
    ]
    for values in found:
        sum((weight * x).sum() for weight, x in zip(weights, values, strict=True)).backward()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for (what, x), y in zip(models[0][0].named_parameters(), models[1][0].parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4, msg=lambda m, what=what: f"{what}: {m}")
    assert all(x.grad is None for x in models[0][1].parameters())


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_wrapped_models(models, one_process, wrap):  # noqa: F811
    """Both heads' weights are there for the loss and for its backward, and the gradients are synchronised."""
    (student, teacher), plain = models
    wrapped = wrap(student), fully_shard(teacher.requires_grad_(False))
    calls = []
    wrapped[0].register_forward_hook(lambda *_: calls.append(1))
    quietstar.shared_divergence(*wrapped, SEQUENCES)  # checks the models
    del calls[:]
    for values in (quietstar.shared_divergence(*wrapped, SEQUENCES), one_by_one(*plain, SEQUENCES, 1.0, 1.0)):
        sum(x.sum() for x in values).backward()
    assert calls == [1] and "forward" not in vars(student) and "forward" not in vars(teacher)
    for x, y in zip(student.parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(getattr(x.grad, "full_tensor", lambda x=x: x.grad)(), y.grad, atol=1e-5, rtol=1e-4)


def test_each_shared_token_is_computed_once(models):
    rows = []
    for model in models[0]:
        model.get_decoder().layers[0].register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].shape[1]))
    quietstar.shared_divergence(*models[0], SEQUENCES)
    assert rows[-2:] == [len({tuple(x[:n]) for x in SEQUENCES for n in range(1, max(len(x), 2))})] * 2


def test_nothing_to_compare(models):
    for sequences in ([[4], [4], []], [[], []], []):
        assert [x.shape for x in quietstar.shared_divergence(*models[0], sequences)] == [(0,)] * len(sequences)


def test_bad_calls(models, tiny):
    student, teacher = models[0]
    with pytest.raises(ValueError, match="^shared_divergence: teacher must be a transformers model with attn_impl"):
        quietstar.shared_divergence(student, models[1][1], SEQUENCES)
    larger = tiny("llama", vocab_size=70)
    larger.set_attn_implementation("quietstar")
    message = "^shared_divergence: the teacher must have the student's vocabulary of 61, got 70: resize its embeddings$"
    with pytest.raises(ValueError, match=message):
        quietstar.shared_divergence(student, larger, SEQUENCES)
    with pytest.raises(ValueError, match="^shared_divergence: beta must be a number from 0 to 1, got 2$"):
        quietstar.shared_divergence(student, teacher, SEQUENCES, beta=2)


@pytest.fixture
def trained(tmp_path, tiny):
    """How two optimizer steps change the weights, the logs, and how many tokens the teacher's layers saw in each forward."""
    prompts = ["5 6 7 8", "5 6 9"]
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts for _ in range(4)] * 2)

    def train(cls, peft_config=None, **options):
        usual = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 5}
        usual |= {"shuffle_dataset": False, "logging_steps": 1}
        arguments = config_of(cls, tmp_path, **usual | options)
        student, teacher = tiny("llama"), tiny("gemma2", seed=1, hidden_size=32)
        made = cls(student, teacher, arguments, data, processing_class=number_tokenizer(), peft_config=peft_config)
        seen = []
        made.teacher_model.get_decoder().layers[0].register_forward_hook(
            lambda module, inputs, out: seen.append(inputs[0].shape[:2])
        )
        start = weights_of(made.model)
        made.train()
        return weights_of(made.model) - start, [log for log in made.state.log_history if "loss" in log], seen

    return train


@pytest.mark.parametrize("options", [
    {},
    pytest.param({"beta": 0.5, "temperature": 0.7, "activation_checkpointing": False}, marks=pytest.mark.long, id="JSD"),
    pytest.param({"beta": 0.0, "peft_config": LoraConfig(r=2)}, marks=pytest.mark.long, id="LoRA"),
])  # fmt: skip
def test_optimizer_steps_are_trls(trained, options):
    (stock, logs, seen), (ours, shared_logs, shared_seen) = (
        trained(DistillationTrainer, **options),
        trained(SharedDistilling, **options),
    )
    assert (stock - ours).norm() < 1e-4 * stock.norm()
    for log, shared in zip(logs, shared_logs, strict=True):
        assert shared["loss"] == pytest.approx(log["loss"], rel=1e-5)
        assert shared["completions/mean_length"] == log["completions/mean_length"]
    # Each microbatch is one row of what its four completions, all of one prompt, don't share.
    assert len(seen) == len(shared_seen) == 4
    assert all(rows == 1 and tokens <= 4 + 4 * 4 for rows, tokens in shared_seen) and all(rows == 4 for rows, _ in seen)


def test_other_trainers_are_refused(tiny, tmp_path):
    class Wrong(quietstar.SharedDistillation, GRPOTrainer):
        pass

    with pytest.raises(
        ValueError, match="^Wrong: put SharedDistillation before trl's DistillationTrainer, whose _get_last_hid"
    ):
        Wrong(tiny("llama"))
    arguments = config_of(SharedDistilling, tmp_path)
    with pytest.raises(ValueError, match="^SharedDistilling: teacher_model must be a model of this process, got None$"):
        SharedDistilling(tiny("llama"), None, arguments, processing_class=number_tokenizer())
