"""SharedPrompts for rollouts of several turns that TRL makes with tools, environments or a function: the stock trainer's steps,
with each token that completions share computed once."""

import random

import pytest

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from datasets import Dataset
from tokenizers import AddedToken
from trl import GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from quietstar.group_rl.shared_prompt import SharedPrompts
from tests.quietstar.conftest import make_byte_tokenizer
from tests.quietstar.group_rl.trainers import config_of, sum_of_ids, weights_of

BOUND = 1e-5
CALL = 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call><|im_end|>'
# The first turns of a group: five that call the tool and get the same answer, one that gets another, two that don't call it.
FIRST = [CALL % "Oslo"] * 5 + [CALL % "Rome", "It rains.<|im_end|>", "Let me not.<|im_end|>"]


def weather(city: str) -> str:
    """The weather.

    Args:
        city: where
    """
    return f"It rains in {city}."


class Environment:
    def reset(self, **_) -> str:
        return " Say it in a word."

    def weather(self, city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return weather(city)


def turn(self, prompt_ids, *_, **__):
    """In place of generation: what a model may have said, the same to both trainers."""
    encode = self.processing_class.encode
    if not any("It rains in" in self.processing_class.decode(ids) for ids in prompt_ids):
        return [encode(FIRST[i % len(FIRST)]) for i in range(len(prompt_ids))], None
    draw = random.Random(self._step)
    return [encode(draw.choice(["Rain", "Rain!", "Wet"]) + str(draw.randrange(10**6)) + "<|im_end|>") for _ in prompt_ids], None


def rollout(prompts, trainer):
    """Two turns without TRL's tools; what the environment said is marked."""
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
    first, _ = turn(trainer, prompt_ids)
    said = tokenizer.encode("<|im_start|>user\nIt rains in Oslo.<|im_end|><|im_start|>assistant\n")
    last, _ = turn(trainer, [ids + said for ids in prompt_ids])
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [a + said + b for a, b in zip(first, last, strict=True)],
        "logprobs": [[0.0] * len(a + said + b) for a, b in zip(first, last, strict=True)],
        "env_mask": [[1] * len(a) + [0] * len(said) + [1] * len(b) for a, b in zip(first, last, strict=True)],
    }


class Recorded(GRPOTrainer):
    """Keeps what it has generated, and how many rows its model reads at a time."""

    _generate_single_turn = turn

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sequences, self.masked, self.rows = [], 0, []
        self.model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: self.rows.append(inputs[0].numel()))

    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        self.rows.clear()
        parts = [(made[f"{part}_ids"], made[f"{part}_mask"]) for part in ("prompt", "completion")]
        self.sequences += [[*p[m > 0].tolist(), *c[n > 0].tolist()] for (p, m, c, n) in zip(*parts[0], *parts[1], strict=True)]
        self.masked += int((made["completion_mask"] * (1 - made["tool_mask"])).sum())
        return made


class Shared(SharedPrompts, Recorded):
    pass


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """``trained(cls, **options)``: a trainer after an optimizer step, how much that changed the weights, and the loss."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "pad_token": "<end>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.add_tokens([AddedToken(word) for word in ("<tool_call>", "</tool_call>")])
    tokenizer.chat_template = qwen2_5_chat_template
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Does it rain in place {i}?"}]} for i in range(2)])

    def train(cls, tools=None, environment_factory=None, rollout_func=None, **options):
        model = tiny("llama", num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=2048).double()
        before = weights_of(model)
        usual = {"num_generations": 8, "max_steps": 1, "max_completion_length": 300, "activation_checkpointing": False}
        config = config_of(cls, tmp_path, **usual | options)
        more = {"tools": tools, "environment_factory": environment_factory, "rollout_func": rollout_func}
        made = cls(model, sum_of_ids, config, data, processing_class=tokenizer, **more)
        loss = made.train().training_loss
        return made, weights_of(model) - before, loss

    return train


ROLLOUTS = {
    "tools": {"tools": [weather]},
    "environment": {"environment_factory": Environment},
    "function": {"rollout_func": rollout},
}


@pytest.mark.parametrize("kind", [pytest.param(x, marks=() if x == "tools" else pytest.mark.long) for x in ROLLOUTS])
def test_an_optimizer_step(trained, kind):
    (stock, truth, loss), (ours, update, our_loss) = (
        trained(cls, per_device_train_batch_size=8, **ROLLOUTS[kind]) for cls in (Recorded, Shared)
    )
    assert ours.sequences == stock.sequences and len(ours.sequences) == 8 and ours.masked == stock.masked > 8
    assert float(truth.norm()) > 1e-3 and float((update - truth).norm() / truth.norm()) < BOUND
    assert our_loss == pytest.approx(loss, rel=1e-6, abs=1e-9)
    # Rows are the tokens after which another comes, each of those that sequences begin with once.
    assert ours.rows == [len({tuple(ids[:n]) for ids in ours.sequences for n in range(1, len(ids))})]
    assert stock.rows[0] > 4 * ours.rows[0]


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "max_steps": 2}], ids=["", "again"])
def test_microbatches(trained, options):
    """Of two groups, four completions at a time."""
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "tools": [weather], **options}
    (_, truth, _), (ours, update, _) = (trained(cls, **cut) for cls in (Recorded, Shared))
    assert len(ours.sequences) == 16
    assert float(truth.norm()) > 1e-3 and float((update - truth).norm() / truth.norm()) < BOUND
