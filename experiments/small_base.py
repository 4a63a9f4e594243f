"""Models that experiments start from: one that has learnt 2 x 2-digit multiplication from chains until about half is right, and
an untrained one with relative positions."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.training import SFTConfig, sft
from quietstar_recipes.tasks import Multiplication, Task

STEPS = {"tiny": 5, "quick": 200, "full": 200}
MORE, PIECE = 24, 25  # additional pieces of training at most, and updates in each
ENOUGH = 0.45  # share of held-out problems to solve; some seeds need twice the updates of others
HINTED = 0.3  # share of the rows that show the answer, so that the model can use a hint


def relative_model(task: Task, layers: int = 2, width: int = 128, seed: int = 0) -> LlamaForCausalLM:
    """As ``small_model``, but a Llama: what it has learnt at one place it can do at others, such as after a hint."""
    config = LlamaConfig(
        vocab_size=len(task.tokenizer),
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=(3 * width) ** -0.5,
        bos_token_id=task.end_id,
        eos_token_id=task.end_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def base(seed: int, size: str) -> tuple[PreTrainedModel, Task]:
    """A model of 0.4 million weights that solves about half of the problems, and the task."""
    task = Multiplication(2)
    model = small_model(task, seed=seed)
    generator = torch.Generator().manual_seed(mix_seed(seed, 1000))
    rows = task.sample(200 if size == "tiny" else 4000, "train", generator)
    hinted = (torch.rand(len(rows), generator=generator) < HINTED).tolist()
    examples = [
        (row.hinted_ids if hint else row.prompt_ids, task.completion_ids(row)) for row, hint in zip(rows, hinted, strict=True)
    ]
    sft(model, examples, STEPS[size], SFTConfig(learning_rate=1e-3, weight_decay=0.01), seed)
    held_out = task.sample(400, "valid", generator)
    for piece in range(MORE if size != "tiny" else 0):
        if evaluate(model, task, held_out, max_new=20)["accuracy"] >= ENOUGH:
            break
        sft(model, examples, PIECE, SFTConfig(learning_rate=1e-3, weight_decay=0.01, warmup=0), mix_seed(seed, piece))
    return model, task
