"""The trainings of pretrained.py. Each resumes from its last checkpoint, and one that is done is only loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pretrained_evaluation import NEW_TOKENS, answered
from pretrained_problems import line, problems, warm_lines
from torch import Tensor
from torch.nn.functional import cross_entropy

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints.pretrained import load_model, load_tokenizer
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.data.texts import DataConfig, load_data
from quietstar.objective import Counts
from quietstar.run.batches import Example, collate
from quietstar.texts import Texts
from quietstar.training import Loss, thought_loss, train

THOUGHTS = ThoughtConfig(preset="small", thoughts=4, thought_tokens=16, lookahead=3, embedding_init=" (")
FREE = ThoughtConfig(preset="small", thoughts=2, thought_tokens=8, lookahead=4, anchors="entropy", anchor_share=1 / 12)
# Plain training: the text's own loss. The one thought of one token a text is not trained.
PLAIN = ThoughtConfig(thoughts=1, thought_tokens=1, lookahead=1, base_weight=1, mix_weight=0, policy_weight=0)
LINES = 16  # of a step
RATE = 1e-4  # of all but the warm start; with 3e-4 the mixing weight overshoots
REHEARSED = 16  # lines of the warm start in a step of the control that rehearses them


@dataclass(frozen=True)
class Arm:
    """A way to train from the warm start on lines without a chain.

    Attributes:
        thinks: the thoughts at "A:" and the objective.
        lines: of a step.
        frozen: train the mixing head alone, on the warm start's thoughts.
        rehearses: add the loss on lines of the warm start, so that chains are not forgotten where no reward asks for them.
    """

    thinks: ThoughtConfig = field(default_factory=lambda: THOUGHTS)
    lines: int = LINES
    frozen: bool = False
    rehearses: bool = False


# Of preset lora: thoughts are weighed at the temperature at which they are sampled, and those below the mean are weakened.
SAMPLED, SIGNED = replace(THOUGHTS, policy_temperature=1.0), replace(THOUGHTS, advantage="leave_one_out")
ARMS = {
    "quiet-star": Arm(),
    "temperature-1-signed": Arm(replace(SAMPLED, advantage="leave_one_out")),
    "temperature-1": Arm(SAMPLED),
    "signed": Arm(SIGNED),
    "mixing-head-alone": Arm(frozen=True),
    "no-reinforce-rehearsal": Arm(replace(THOUGHTS, policy_weight=0.0), rehearses=True),
    "plain-4-times-the-text": Arm(PLAIN, lines=4 * LINES),
}


def warm_start(model: str, out: Path, seed: int, steps: int) -> None:
    """Train all weights on lines with and without chains, so that a thought can be one."""
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)
    qs = QuietStar(load_model(model, dtype="float32"), PLAIN, tokenizer)
    lines = warm_lines(tokenizer, problems(LINES * steps, seed, "train"), seed)
    train(qs, lines, training(out, steps, LINES, seed, 3e-4, schedule="linear"), resume="auto")


def train_arm(warm: str, arm: Arm, out: Path, seed: int, steps: int) -> tuple[QuietStar, Any]:
    """The trained model with its tokenizer. LoRA, of rank 16, but for the frozen arm."""
    tokenizer = load_tokenizer(warm)
    qs = think(warm, tokenizer, arm.thinks, seed)
    if arm.frozen:
        qs.requires_grad_(False)
        qs.mixing_head.requires_grad_(True)
    else:
        qs.add_adapters(AdapterConfig(lora_rank=16))
    asked = problems(arm.lines * steps, seed + 1000, "train")  # not those of the warm start
    lines = [line(tokenizer, problem) for problem in asked]
    loss = with_rehearsal(tokenizer, seed) if arm.rehearses else thought_loss
    train(qs, lines, training(out, steps, arm.lines, seed, RATE), loss=loss, resume="auto")
    return qs.eval(), tokenizer


def train_on_text(model: str, data: DataConfig, out: Path, seed: int, steps: int) -> tuple[QuietStar, list[Example]]:
    """Quiet-STaR on free text, a thought at the twelfth of the tokens that are hardest to predict; with what is held out."""
    tokenizer = load_tokenizer(model)
    texts = load_data(data, tokenizer, FREE.lookahead)
    qs = think(model, tokenizer, FREE, seed)
    qs.add_adapters(AdapterConfig(lora_rank=16))
    train(qs, texts.train, training(out, steps, 8, seed, RATE), resume="auto")
    return qs.eval(), texts.held_out


def think(warm: str, tokenizer: Any, config: ThoughtConfig, seed: int) -> QuietStar:
    """The warm start, whose thoughts begin as an aside does."""
    torch.manual_seed(seed)  # for the mixing head and the adapters
    return QuietStar(load_model(warm, dtype="float32"), config, tokenizer)


def training(out: Path, steps: int, lines: int, seed: int, rate: float, **options: Any) -> TrainConfig:
    saves = {"save_every": max(1, steps // 8), "keep": 1, "eval_every": 0, "fast_linear": True}
    return TrainConfig(
        out=str(out), steps=steps, batch_size=lines, learning_rate=rate, warmup=min(10, steps), seed=seed, **saves, **options
    )


def with_rehearsal(tokenizer: Any, seed: int) -> Loss:
    """The Quiet-STaR objective plus the plain loss on some lines of the warm start."""
    lines = warm_lines(tokenizer, problems(64 * REHEARSED, seed + 2000, "train"), seed)

    def loss(qs: Any, texts: Texts, counts: Counts, seed: int) -> tuple[Tensor, Any]:
        value, out = thought_loss(qs, texts, counts, seed)
        return value + lm_loss(qs.model, random.Random(seed).sample(lines, REHEARSED)), out

    return loss


def lm_loss(model: Any, lines: Sequence[Example]) -> Tensor:
    (batch,) = collate(list(lines), list(range(len(lines))), 1)
    logits = model(batch["input_ids"]).logits[:, :-1]
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_group_rl(warm: str, out: Path, seed: int, steps: int) -> tuple[Any, Any]:
    """The rival: GRPO in TRL with shared prompts, rewarded for a right answer after whatever chain; LoRA of the same rank."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from quietstar import SharedPrompts

    class SharedGRPOTrainer(SharedPrompts, GRPOTrainer):
        pass

    def reward(completions: list[str], answer: list[int], **_: Any) -> list[float]:
        return [float(answered(text, right)) for text, right in zip(completions, answer, strict=True)]

    tokenizer = load_tokenizer(warm)
    asked = problems(LINES * steps, seed + 1000, "train")
    rows = [{"prompt": x.asked, "answer": x.answer} for x in asked]
    arguments = GRPOConfig(
        str(out), max_steps=steps, per_device_train_batch_size=4 * LINES, num_generations=4, max_completion_length=NEW_TOKENS,
        learning_rate=RATE, beta=0.0, save_steps=max(1, steps // 8), save_total_limit=1, report_to=[], seed=seed, use_cpu=True,
        bf16=False, activation_checkpointing=False, logging_steps=5,
    )  # fmt: skip
    torch.manual_seed(seed)
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SharedGRPOTrainer(
        load_model(warm, dtype="float32"), reward, arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=adapters,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)
    return trainer.model, tokenizer
