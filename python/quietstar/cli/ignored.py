"""Options that would have no effect, because of what other options say: typed ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from quietstar.cli.errors import UsageError


class Rule(NamedTuple):
    """When some options are ignored.

    Attributes:
        options: their names, with spaces between.
        ignored: from all options of the command to whether these have no effect.
        where: how the error ends, after "has no effect".
    """

    options: str
    ignored: Callable[[Any], bool]
    where: str


def check_ignored(command: str, options: Mapping[str, Any], typed: Collection[str]) -> None:
    """Raises UsageError for the first option that was typed and would be ignored.

    Args:
        options: all options of the command by name, with their values.
        typed: names of those that were typed, some of them as no_name; those of a config file don't count.
    """
    values = SimpleNamespace(**options)
    for rule in RULES[command]:
        for name in rule.options.split():
            if (name in typed or f"no_{name}" in typed) and rule.ignored(values):
                raise UsageError(f"--{name.replace('_', '-')} has no effect {rule.where}")


def _from_hub(o: Any) -> bool:
    return o.data != "builtin" and not o.data.endswith((".txt", ".jsonl"))


def _revises(o: Any) -> bool:
    return bool(o.attempts and (o.revise_steps or o.judge_steps))


def _searches(o: Any) -> bool:
    return bool(o.process_steps or o.process_verifier)


def _trains_process(o: Any) -> bool:
    return bool(o.process_steps and not o.process_verifier)


DATA = [
    Rule("split hub_texts held_out_split", lambda o: not _from_hub(o), "with a file or the built-in text"),
    Rule("text_field", lambda o: o.data == "builtin" or o.data.endswith(".txt"), "with a .txt file or the built-in text"),
    Rule("held_out_seed", lambda o: o.held_out == 0, "with --held-out=0"),
]
THOUGHTS = [
    Rule(
        "anchor_share", lambda o: o.anchors not in ("random", "entropy", "gate"), "unless --anchors is random, entropy or gate"
    ),
    Rule("anchor_stride", lambda o: o.anchors != "every", "without --anchors=every"),
    Rule("gate_cost", lambda o: o.anchors != "gate", "without --anchors=gate"),
    Rule("base_model_decay", lambda o: o.base_model != "ema", "without --base-model=ema"),
    Rule(
        "base_model",
        lambda o: o.reward == "likelihood" and not o.kl_weight,
        "with --reward=likelihood, unless --kl-weight is above 0",
    ),
]
LORA = [Rule("lora_targets lora_alpha lora_dropout", lambda o: not o.lora_rank, "without --lora-rank")]
TASK = [
    Rule("digits", lambda o: o.task not in ("multiplication", "addition"), "unless --task is multiplication or addition"),
]
SFT = "learning_rate warmup weight_decay clip batch_tokens lora_rank lora_targets lora_alpha lora_dropout"
STEPWISE = "steps_per_token final_steps smoothing reset_optimizer side remove_all_beyond keep_position gate gate_rounds"
MEMORY = "batch_size length thoughts thought_tokens lookahead lora_rank lora_targets dtype precision processes sharding"

RULES: dict[str, list[Rule]] = {
    "train": [
        *DATA,
        *THOUGHTS,
        *LORA,
        Rule("eval_every controls", lambda o: o.held_out < 2, "unless --held-out is 2 or more"),
        Rule("controls", lambda o: not o.eval_every, "with --eval-every=0"),
    ],
    "think": [],
    "generate": [
        Rule("thoughts sample_thoughts", lambda o: o.think == "never", "with --think=never"),
        Rule("thoughts", lambda o: not o.sample_thoughts, "without --sample-thoughts"),
        Rule("top_p top_k", lambda o: o.temperature == 0, "without --temperature above 0"),
        Rule(
            "seed",
            lambda o: o.temperature == 0 and not o.sample_thoughts,
            "without --temperature above 0 or --sample-thoughts",
        ),
    ],
    "explain": [Rule("held_out", lambda o: bool(o.text or o.file), "with a text")],
    "eval": [
        Rule("held_out held_out_seed held_out_split", lambda o: o.all, "with --all"),
        *DATA,
    ],
    "ask": [
        Rule("questions_split", lambda o: o.questions.endswith(".jsonl"), "with a file"),
        Rule("temperature seed", lambda o: not o.votes, "without --votes"),
    ],
    "export": DATA,
    "doctor": [
        Rule(f"{MEMORY} anchor_chunk verify", lambda o: not o.model, "without --model"),
        Rule("lora_targets", lambda o: not o.lora_rank, "without --lora-rank"),
    ],
    "star": [
        *TASK,
        *LORA,
        Rule("top_p", lambda o: o.temperature == 0, "with --temperature=0"),
        Rule("hint_share", lambda o: not o.sft_steps, "without --sft-steps"),
        Rule("rationalize", lambda o: not o.filter, "with --no-filter, which keeps all chains"),
        Rule("rationale_check", lambda o: not (o.rationalize and o.filter), "without --rationalize"),
        Rule(
            "least_likelihood",
            lambda o: not (o.rationalize and o.filter and o.rationale_check == "likelihood"),
            "without --rationalize and --rationale-check=likelihood",
        ),
    ],
    "vstar": [*TASK, *LORA, Rule("sft_problems", lambda o: not o.sft_steps, "without --sft-steps")],
    "solve": [
        *TASK,
        Rule("revise_steps judge_steps", lambda o: not o.attempts, "with --attempts=0"),
        Rule("revise_samples", lambda o: not (o.revise_steps and o.attempts), "without --revise-steps"),
        Rule("history", lambda o: not (o.judge_steps and o.attempts), "without --judge-steps"),
        Rule("revise_problems", lambda o: not _revises(o), "without --revise-steps or --judge-steps"),
        Rule("process_steps", lambda o: bool(o.process_verifier), "with --process-verifier"),
        Rule("process_problems process_samples rollouts", lambda o: not _trains_process(o), "without --process-steps"),
        Rule("beam_width lookahead", lambda o: not _searches(o), "without --process-steps or --process-verifier"),
        Rule(
            SFT, lambda o: not (_revises(o) or _trains_process(o)), "without --revise-steps, --judge-steps or --process-steps"
        ),
        *LORA,
    ],
    "internalize": [
        *TASK,
        Rule(f"{STEPWISE} compare eval_every", lambda o: o.method == "kd", "with --method=kd"),
        Rule(
            "student_steps emulator_steps coupled_steps coupled_rate components",
            lambda o: o.method != "kd",
            "without --method=kd",
        ),
        Rule("gate_rounds", lambda o: not o.gate, "without --gate"),
        Rule(
            "explicit_steps smoothing reset_optimizer side gate gate_rounds",
            lambda o: o.method != "kd" and o.remove_all_beyond == 0,
            "with --remove-all-beyond=0",
        ),
        Rule("steps_per_token", lambda o: o.remove_all_beyond in (0, 1), "unless --remove-all-beyond is above 1"),
    ],
    "score": [
        *TASK,
        Rule("two_turn_problems two_turn_rate", lambda o: not o.two_turn_steps, "without --two-turn-steps"),
        Rule("first_kl", lambda o: not o.first_steps, "with --first-steps=0"),
        Rule("bonus", lambda o: not o.second_steps, "with --second-steps=0"),
        Rule("bonus credit", lambda o: o.single_turn, "with --single-turn"),
    ],
    "fast": [
        *DATA,
        *THOUGHTS,
        Rule("thought_tokens lookahead", lambda o: True, "here: --curriculum sets it"),
        Rule("later_rate", lambda o: "," not in o.curriculum, "with a curriculum of one stage"),
        Rule(
            "plain_weight plain_temperature clamp_reward",
            lambda o: o.objective not in ("sampled", "observed"),
            "unless --objective is sampled or observed",
        ),
    ],
}
