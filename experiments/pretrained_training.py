"""The trainings of pretrained.py. Each resumes from its last checkpoint, and one that is done is only loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pretrained_evaluation import NEW_TOKENS, without_aside, writing
from pretrained_problems import (
    MARK,
    ONE_DIGIT,
    TWO_DIGITS,
    Problem,
    Triple,
    chain_lines,
    form_lines,
    ids,
    line,
    problems,
    sum_lines,
)  # fmt: skip

from quietstar import OfflineThoughts, QuietStar, ThoughtConfig, export_thoughts
from quietstar.checkpoints.pretrained import load_model, load_tokenizer
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.data.filtering import ThoughtFilter
from quietstar.run.batches import Example
from quietstar.training import train

THOUGHTS = ThoughtConfig(preset="lora", thoughts=4, thought_tokens=16, lookahead=3, embedding_init=MARK)
# As text, a thought is the aside that the warm start writes.
RLP = ThoughtConfig(
    preset="rlp", thoughts=4, thought_tokens=16, lookahead=3, anchors="all", thought_start=" (", thought_end=")"
)
# Plain training: the text's own loss. The one thought of one token a text is given, and not trained.
PLAIN = ThoughtConfig(thoughts=1, thought_tokens=1, lookahead=1, base_weight=1, mix_weight=0, policy_weight=0)
LINES = 16  # of a step
LORA = 16


@dataclass(frozen=True)
class Arm:
    """A way to train from the start on problems with their answers.

    Attributes:
        rates: the learning rates that are tried with the seed for tuning.
        rate: the one that was better there.
        thinks: the thoughts at "A:" and the objective.
        lines: of a step.
        weights: what is trained: adapters, all, or head alone, which learns to use the start's own thoughts.
        chains: lines have the right chain: supervision in what the others must find.
        star: lines have one of N asides that the start writes, with which it answers right.
        offline: train on thoughts that were sampled once, by the model of arm "head": the best of each four, where it helps.
        writes: its answers stand behind an aside that it writes, and begins with.
        in_trl: GRPO, rewarded for a right answer.
    """

    rates: tuple[float, float] = (1e-4, 3e-4)
    rate: float = 1e-4
    thinks: ThoughtConfig = field(default_factory=lambda: THOUGHTS)
    lines: int = LINES
    weights: str = "adapters"
    chains: bool = False
    star: bool = False
    offline: bool = False
    writes: bool = False
    in_trl: bool = False


ARMS = {
    "head": Arm((3e-4, 1e-3), 3e-4, weights="head"),
    "quiet-star": Arm(),
    "no-reward": Arm(thinks=replace(THOUGHTS, policy_weight=0.0)),
    "offline": Arm(rate=3e-4, offline=True),
    "star": Arm(thinks=PLAIN, star=True, writes=True),
    "grpo": Arm(writes=True, in_trl=True),
    "rlp": Arm(thinks=RLP, writes=True),
    "plain": Arm((1e-4, 3e-4), 1e-4, PLAIN, 4 * LINES, "all"),
    "chains": Arm(rate=3e-4, thinks=PLAIN, chains=True, writes=True),
}


@dataclass(frozen=True)
class Setting:
    """What is practised before thoughts are rewarded, and what then.

    Attributes:
        practises: the lines of the start, which trains all weights.
        numbers: of the problems.
        practice: updates of the start.
        arms: what is trained from it; none where only the start is looked at.
        steps: updates of each arm.
        enough: the share of right chains, written, at which practice ends; it is looked at after each tenth of the updates.
        forced: a token that the control with asides that are asked for may not write until one of others stands there.
        seeds: of the claim, all of them.
    """

    practises: Callable[..., list[Example]]
    numbers: dict[tuple[str, str], list[Triple]] = field(default_factory=lambda: ONE_DIGIT)
    practice: int = 200
    enough: float | None = None
    arms: tuple[str, ...] = ()
    steps: int = 20
    thought_tokens: int = 16
    lookahead: int = 3
    forced: tuple[str, tuple[str, ...]] | None = None
    seeds: tuple[int, ...] = (100, 101, 102)

    def thinks(self, config: ThoughtConfig) -> ThoughtConfig:
        """With thoughts as long as this setting's."""
        return config if config is PLAIN else replace(config, thought_tokens=self.thought_tokens, lookahead=self.lookahead)

    def problems(self, count: int, seed: int, part: str) -> list[Problem]:
        return problems(count, seed, part, self.numbers)


SETTINGS = {
    "form": Setting(form_lines, practice=100, arms=tuple(ARMS), forced=(",", ("+", "-"))),
    "sums": Setting(sum_lines, forced=(")", (",",))),
    "steps": Setting(
        chain_lines, TWO_DIGITS, 200, 0.4, ("head", "quiet-star", "no-reward", "offline", "star", "grpo", "chains"),
        steps=40, thought_tokens=20, lookahead=4, seeds=(100, 101, 102, 103, 104),
    ),
}  # fmt: skip


def warm_start(model: str, setting: Setting, out: Path, seed: int, steps: int, practised: int) -> QuietStar:
    """Train all weights on lines that teach what a thought can be: the first ``practised`` of ``steps`` updates."""
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)
    qs = QuietStar(load_model(model, dtype="float32"), PLAIN, tokenizer)
    lines = plain(setting.practises(tokenizer, LINES * steps, seed))
    # A schedule needs to know its end.
    schedule = "linear" if practised == steps and setting.enough is None else "constant"
    given = {"schedule": schedule, "warmup": min(10, steps), "save_every": max(1, steps // 8)}
    train(qs, lines, training(out, practised, LINES, seed, 3e-4, **given), resume="auto")
    return qs


def plain(lines: Sequence[Example]) -> list[Example]:
    """For training with ``PLAIN``, which would sample thoughts otherwise."""
    return [{**x, "thought_ids": torch.zeros(len(x["anchors"]), 1, 1, dtype=torch.int64)} for x in lines]


def train_arm(
    warm: str, head: Path, setting: Setting, arm: Arm, out: Path, seed: int, steps: int, rate: float
) -> tuple[QuietStar, Any]:
    """The trained model with its tokenizer. ``head``: the run of arm "head", whose thoughts are chosen from."""
    tokenizer = load_tokenizer(warm)
    asked = setting.problems(arm.lines * steps, seed + 1000, "train")
    # A thought is rewarded where all J tokens follow, and kept where one more does: " 7.", and then ends.
    ends = setting.lookahead - 2
    lines: Sequence[Example] = [line(tokenizer, x, x.chain if arm.chains else "", ends) for x in asked]
    if arm.star:
        lines = right_asides(warm, tokenizer, asked)
    torch.manual_seed(seed)  # for the mixing head and the adapters
    if arm.offline:
        qs, lines = chosen_thoughts(head, lines, out.with_name(f"{out.name}.jsonl"), seed)
    else:
        qs = think(warm, tokenizer, setting.thinks(arm.thinks))
    if arm.weights == "head":
        qs.requires_grad_(False)
        qs.mixing_head.requires_grad_(True)
    if arm.weights == "adapters":
        qs.add_adapters(AdapterConfig(lora_rank=LORA))
    if arm.thinks is PLAIN:
        lines = plain(lines)
    if lines:  # STaR has none where the start never answers right
        train(qs, lines, training(out, steps, arm.lines, seed, rate), resume="auto")
    return qs.eval(), tokenizer


def chosen_thoughts(head: Path, lines: Sequence[Example], file: Path, seed: int) -> tuple[QuietStar, Sequence[Example]]:
    """The model of a run, and the lines with the best of N thoughts that it samples about each, where that helps."""
    qs = QuietStar.from_pretrained(head)
    qs.requires_grad_(True)
    if not file.exists():
        export_thoughts(qs.train(), lines, file, seed, LINES, wanted=ThoughtFilter(keep=1, leaks=True))
    qs.use_config(replace(qs.thought_config, thoughts=1, reward="gain", advantage="relu"))
    return qs, OfflineThoughts(file, lines, qs)


def right_asides(warm: str, tokenizer: Any, asked: Sequence[Problem]) -> list[Example]:
    """STaR's data: of each problem one of N sampled asides after which the start answers right, where there is one."""
    texts = writing(load_model(warm), tokenizer, asked, begin=MARK, times=THOUGHTS.thoughts)["texts"]
    lines = []
    for i, problem in enumerate(asked):
        own = texts[THOUGHTS.thoughts * i : THOUGHTS.thoughts * (i + 1)]
        right = [text for text in own if without_aside(text) == f" {problem.answer}."]
        lines += [line(tokenizer, problem, text[len(MARK) : text.index(")")]) for text in right[:1]]
    return lines


def think(warm: str, tokenizer: Any, config: ThoughtConfig) -> QuietStar:
    """Thoughts begin and end as an aside does: those that were practised aren't understood after another vector."""
    qs = QuietStar(load_model(warm, dtype="float32"), config, tokenizer)
    if config.embedding_init == MARK:
        with torch.no_grad():
            (bracket,) = ids(tokenizer, ")")
            qs.end_embedding.copy_(qs.model.get_input_embeddings().weight[bracket] / config.embedding_scale)
    return qs


def training(out: Path, steps: int, lines: int, seed: int, rate: float, **options: Any) -> TrainConfig:
    saves = {"save_every": max(1, steps // 8), "keep": 1, "eval_every": 0, "fast_linear": True, "optimizer": "fused"}
    given = {"warmup": min(10, steps), **saves, **options}
    return TrainConfig(out=str(out), steps=steps, batch_size=lines, learning_rate=rate, seed=seed, **given)


def train_group_rl(warm: str, setting: Setting, out: Path, seed: int, steps: int, rate: float) -> tuple[Any, Any]:
    """The rival: GRPO in TRL with shared prompts, rewarded for a right answer after whatever chain; LoRA of the same rank."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from quietstar import SharedPrompts

    class SharedGRPOTrainer(SharedPrompts, GRPOTrainer):
        pass

    def reward(completions: Sequence[str], answer: Sequence[int], **_: Any) -> list[float]:
        whole = (without_aside(MARK + text) for text in completions)
        return [float(text == f" {right}.") for text, right in zip(whole, answer, strict=True)]

    tokenizer = load_tokenizer(warm)
    rows = [{"prompt": x.asked + MARK, "answer": x.answer} for x in setting.problems(LINES * steps, seed + 1000, "train")]
    arguments = GRPOConfig(
        str(out), max_steps=steps, per_device_train_batch_size=4 * LINES, num_generations=4, max_completion_length=NEW_TOKENS,
        learning_rate=rate, lr_scheduler_type="constant_with_warmup", warmup_steps=min(10, steps), beta=0.0,
        save_steps=max(1, steps // 8), save_total_limit=1, report_to=[], seed=seed, use_cpu=True, bf16=False,
        activation_checkpointing=False, logging_steps=5,
    )  # fmt: skip
    torch.manual_seed(seed)
    adapters = LoraConfig(r=LORA, lora_alpha=2 * LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SharedGRPOTrainer(
        load_model(warm, dtype="float32"), reward, arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=adapters,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)
    return trainer.model, tokenizer
