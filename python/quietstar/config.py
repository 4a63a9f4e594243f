"""Every setting of a run that is not the model's: how thoughts are made and rewarded, adapters, the training loop.

A field's help text is what ``--help`` shows, and its ``may_differ`` what ``quietstar.run.resume`` allows to change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quietstar.objective import ADVANTAGES, MATCH, RELATIVE_TO_BASE, REWARDS
from quietstar_kernels.checks import (
    LARGEST_FP32,
    as_integer,
    check,
    check_at_least,
    check_choice,
    check_positive,
    check_types,
    choice,
    integer,
    mapping,
    refusal,
)

Dtype = Literal["float32", "bfloat16", "float16"]  # of a model's weights

# What a preset leaves open.
_DEFAULTS: dict[str, Any] = {
    "thoughts": 2,
    "thought_tokens": 9,
    "lookahead": 4,
    "lookahead_discount": 1.0,
    "temperature": 1.0,
    "ratio_clip": 0.0,
    "token_mean": "tokens",
    "base_model": "current",
    "anchors": "all",
    "anchor_count": 0,
    "thought_start": "",
    "thought_end": "",
}
PRESETS: dict[str, dict[str, Any]] = {
    "official": {
        "mixing": "logits",
        "reward": "gain",
        "base_weight": 0.5,
        "mix_weight": 0.5,
        "policy_temperature": 3.0,
        "policy_weight": 1e6,
        "advantage": "relu",
        "embedding_scale": 100.0,
    },
}
# Mixing and reward as the paper's text has them; the weights and temperature that the published file lists as the paper's.
PRESETS["paper"] = {**PRESETS["official"], "mixing": "logprobs", "reward": "likelihood"}
# The official objective with weights for small models at a large learning rate: an effect shows in a hundred steps, as in
# docs/results.md.
PRESETS["small"] = {**PRESETS["official"], "policy_weight": 10.0, "embedding_scale": 1.0}
# Adapters of a pretrained model; with the published policy term its thoughts became certain, not better: docs/pretrained.md.
PRESETS["lora"] = {**PRESETS["small"], "policy_temperature": 1.0, "advantage": "leave_one_out"}
# Reinforcement learning on ordinary text: long thoughts at few positions, no mixing head. Each with its source; docs/online.md
# says what the source leaves open.
_ONLINE = {
    "mixing": "none",
    "base_weight": 0.0,
    "mix_weight": 0.0,
    "policy_weight": 1.0,
    "thought_start": "<think>",
    "thought_end": "</think>",
    "embedding_scale": 1.0,
}
PRESETS["rlp"] = {  # arXiv 2510.01265, equations 3 to 8, table S.1, which has no clip bounds: these are DAPO's
    **_ONLINE,
    "thoughts": 16,
    "thought_tokens": 2048,
    "lookahead": 1,
    "reward": "gain",
    "advantage": "leave_one_out",
    "temperature": 0.7,
    "ratio_clip": 0.2,
    "ratio_clip_high": 0.28,
    "token_mean": "thought",
    "base_model": "ema",
    "anchors": "random",
    "anchor_count": 8,
}
PRESETS["grlp"] = {  # github.com/natekimball/GRLP: ratios of untempered probabilities
    **PRESETS["rlp"],
    "lookahead": 8,
    "lookahead_discount": 0.7,
    "policy_temperature": 1.0,
    "base_weight": 0.1,
    "ratio_clip": 0.1,
    "ratio_clip_high": 0.1,
    "anchor_count": 16,
}
PRESETS["rpt"] = {  # arXiv 2506.08007, section 3
    **_ONLINE,
    "thoughts": 8,
    "thought_tokens": 4096,
    "lookahead": 1,
    "reward": "match",
    "advantage": "zscore",
    "temperature": 0.8,
    "ratio_clip": 0.2,
    "token_mean": "thought",
    "anchors": "entropy",
    "anchor_count": 8,
}
# What a preset sets besides, in ``quietstar train``.
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "small": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-4, "lora_rank": 16},
    "rlp": {"learning_rate": 1e-6},
    "grlp": {"learning_rate": 1e-6, "updates": 3},
    "rpt": {"learning_rate": 1e-6},
}
# Most losses explode where the learning rate times the policy weight is this or more: ten times the published 1e-6 * 1e6.
LARGE_STEP = 10.0

OPTIMIZERS = ("adamw", "fused", "8bit")  # made by quietstar.run.optimizers

# Metadata of a field that may differ between a run and its continuation: no number of the run depends on it.
MAY_DIFFER = {"may_differ": True}


def option(default: Any, help: str, may_differ: bool = False) -> Any:
    """A dataclass field with a help text.

    Args:
        help: shown by the command line.
        may_differ: whether a run may be resumed with another value, since none of its numbers depend on it.
    """
    return field(default=default, metadata={"help": help, "may_differ": may_differ})


def check_anchor_chunk(size: Any) -> None:
    number = as_integer(size)
    named = size is None or (isinstance(size, str) and size == "auto")
    if not named and (number is None or number < 1):
        raise refusal("anchor_chunk", "1 or more, 'auto' or None", size)


def _described(functions: Mapping[str, Callable[..., Any]]) -> str:
    """ "name: what it computes; name: ..." """
    return "; ".join(f"{name}: {(function.__doc__ or '').partition(chr(10))[0]}" for name, function in functions.items())


def step_size_warning(thoughts: ThoughtConfig, learning_rate: float) -> str:
    """A sentence on steps that are likely too large for the policy weight; empty for others."""
    if learning_rate * thoughts.policy_weight < 0.999 * LARGE_STEP:
        return ""
    return (
        f"a policy_weight of {thoughts.policy_weight:g} belongs to a learning rate of {1 / thoughts.policy_weight:.0e}: with "
        f"{learning_rate:g} the loss may explode; the presets lora and small have a weight for 1e-4 and 1e-3"
    )


def filled_by(preset: str) -> dict[str, Any]:
    """The fields that a preset fills where they are None."""
    return {**_DEFAULTS, **PRESETS[preset]}


@dataclass
class ThoughtConfig:
    """How thoughts are made and rewarded. Fields left at None take the preset's value.

    ``official`` is what the published code computes; ``paper`` mixes and rewards as arXiv 2403.09629 does, otherwise the same.
    ``small`` is ``official`` with a policy weight of 10 and an embedding scale of 1, for small models at a learning rate of
    1e-3; ``lora`` is for adapters of a pretrained model at 1e-4: ``small`` with a policy temperature of 1 and signed
    advantages (leave_one_out).
    ``rlp`` (arXiv 2510.01265), ``grlp`` (its re-implementation) and ``rpt`` (arXiv 2506.08007) are reinforcement learning on
    ordinary text: long thoughts at few positions, no mixing head and no loss of the text (``grlp``: a tenth of it).

    Raises:
        ValueError: a value out of range, by name.
    """

    thoughts: int = option(None, "N, thoughts sampled at each anchor")
    thought_tokens: int = option(None, "T, sampled tokens in a thought")
    lookahead: int = option(None, "J, next tokens predicted after a thought")
    preset: str = option(
        "official",
        "official, paper, small (small models, rate 1e-3), lora (adapters, 1e-4), rlp, grlp or rpt (docs/online.md): fills "
        "fields that are None; --preset NAME --help shows with what",
    )
    mixing: str = option(
        None, "what the mixing head mixes: logits, or logprobs with a sigmoid weight; none: no head, the thought alone predicts"
    )
    reward: str = option(None, f"reward of a thought. {_described(REWARDS)}; match: {MATCH}")
    lookahead_discount: float = option(None, "weight of each further token in the reward, relative to the one before it")
    base_weight: float = option(None, "weight of the cross entropy without thoughts")
    mix_weight: float = option(None, "weight of the cross entropy with thoughts")
    policy_weight: float = option(None, "weight of the REINFORCE term; it belongs to a learning rate")
    temperature: float = option(None, "temperature at which thoughts are sampled in training")
    policy_temperature: float = option(
        None, "temperature of the thoughts' log-probability in the REINFORCE term; without a preset's, that of sampling"
    )
    advantage: str = option(None, f"from rewards to advantages. {_described(ADVANTAGES)}")
    ratio_clip: float = option(None, "PPO's clip range, for several updates on the same thoughts; 0 is REINFORCE")
    ratio_clip_high: float = option(None, "its upper bound, if it differs: ratios are cut at 1 + this")
    token_mean: str = option(
        None, "mean of the REINFORCE term: over all tokens, or over each thought's, then thoughts (thought)"
    )
    kl_weight: float = option(0.0, "weight of the thoughts' divergence from how the base model would continue the text")
    entropy_weight: float = option(0.0, "weight of the thoughts' entropy")
    base_model: str = option(None, "base model of reward and divergence: the model itself (current), a frozen copy or an ema")
    base_model_decay: float = option(0.999, "decay of the ema, per optimizer step")
    anchors: str = option(
        None, "which positions think in training: all, random, entropy, sentences (their ends), every or gate"
    )
    anchor_count: int = option(None, "positions of a text that think, for random, entropy and sentences; 0: by anchor_share")
    anchor_share: float = option(0.25, "share of positions that think, for random and entropy; initial share for gate")
    anchor_stride: int = option(4, "k, for every: each k-th position thinks")
    gate_cost: float = option(0.0, "for gate: reward that a thought must earn to be worth it, nats")
    thought_start: str = option(None, "text before a thought, such as <think>; a thought then ends itself. Empty: a vector")
    thought_end: str = option(None, "text after a thought, such as </think>, which ends it, as do an end of text and T tokens")
    start_token_id: int | None = option(None, "id of a start-of-thought token, if the vocabulary has one")
    end_token_id: int | None = option(None, "id of an end-of-thought token, if the vocabulary has one")
    stop_threshold: float | None = option(None, "end a thought when the probability of end_token_id exceeds this; None: never")
    embedding_scale: float = option(None, "the start and end vectors are this times their parameters")
    embedding_init: int | str | None = option(None, "token id or text whose embedding initialises the start and end vectors")

    def __post_init__(self) -> None:
        owner = "ThoughtConfig"
        filled = filled_by(choice(f"{owner}: preset", self.preset, PRESETS))
        for name, value in filled.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, other in (("policy_temperature", "temperature"), ("ratio_clip_high", "ratio_clip")):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, other))
        check_types(owner, self)
        for name in ("thoughts", "thought_tokens", "lookahead"):
            check(owner, self, name, 1 <= getattr(self, name) < 65536, "1 to 65,535")
        check_at_least(owner, self, 0, ("base_weight", "mix_weight", "policy_weight", "kl_weight", "entropy_weight"))
        for name in ("ratio_clip", "base_model_decay"):
            check(owner, self, name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        check_at_least(owner, self, 0, ("ratio_clip_high", "anchor_count"))
        for name in ("anchor_share", "lookahead_discount"):
            check(owner, self, name, 0 < getattr(self, name) <= 1, "above 0, 1 at most")
        check_at_least(owner, self, 1, ("anchor_stride",))
        for name in ("temperature", "policy_temperature"):
            check(owner, self, name, 0 < getattr(self, name) <= LARGEST_FP32, f"above 0, {LARGEST_FP32:.2e} at most")
        check_positive(owner, self, ("embedding_scale",))
        stops = self.stop_threshold is None or 0 <= self.stop_threshold < 1
        check(owner, self, "stop_threshold", stops, "None, or 0 to below 1")
        check_choice(owner, self, "mixing", ("logits", "logprobs", "none"))
        check_choice(owner, self, "reward", (*REWARDS, "match"))
        check_choice(owner, self, "token_mean", ("tokens", "thought"))
        check_choice(owner, self, "advantage", ADVANTAGES)
        check_choice(owner, self, "base_model", ("current", "frozen", "ema"))
        check_choice(owner, self, "anchors", ("all", "random", "entropy", "sentences", "every", "gate"))
        # Fields that depend on each other.
        ends = self.stop_threshold is None or self.end_token_id is not None
        wanted = f"given where a thought stops at its probability (stop_threshold={self.stop_threshold})"
        check(owner, self, "end_token_id", ends, wanted)
        relative = self.reward in RELATIVE_TO_BASE
        wanted = "at least 2 if a reward is compared with the other thoughts' mean "
        wanted += f"(reward={self.reward!r}, advantage={self.advantage!r})"
        check(owner, self, "thoughts", self.thoughts > 1 or (relative and self.advantage == "relu"), wanted)
        compared = self.kl_weight or self.entropy_weight
        wanted = "1, as temperature, if kl_weight or entropy_weight is not 0"
        check(owner, self, "policy_temperature", not compared or self.policy_temperature == self.temperature == 1, wanted)
        check(owner, self, "thought_end", bool(self.thought_end) == self.written, "given together with thought_start")
        for name in ("start_token_id", "end_token_id", "stop_threshold", "kl_weight") if self.written else ():
            check(owner, self, name, not getattr(self, name), "left alone where thoughts are text (thought_start)")
        wanted = f"{' or '.join(RELATIVE_TO_BASE)} where a gate weighs it against a cost"
        check(owner, self, "reward", self.anchors != "gate" or relative, wanted)

    @property
    def written(self) -> bool:
        """Whether a thought is text between two strings, which ends itself."""
        return bool(self.thought_start)

    @property
    def stops(self) -> bool:
        """Whether sampled thoughts may have fewer than T tokens."""
        return self.written or self.stop_threshold is not None

    @property
    def rows(self) -> int:
        """S = T + J + 1: the start, T sampled tokens, the end and J-1 teacher-forced tokens."""
        return self.thought_tokens + self.lookahead + 1

    @property
    def policy_terms(self) -> dict[str, float]:
        """The weights of those of the objective's ``POLICY_TERMS`` that are used."""
        weights = {"divergence": self.kl_weight, "entropy": self.entropy_weight}
        return {"clipped" if self.ratio_clip else "reinforce": 1.0} | {name: x for name, x in weights.items() if x}

    @property
    def banned(self) -> list[int]:
        """Token ids that are never sampled."""
        return [token for token in (self.start_token_id, self.end_token_id) if token is not None]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as ``from_dict`` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ThoughtConfig:
        """A config from its fields by name. Missing fields take their default.

        Raises:
            ValueError: an unknown name, or a value out of range.
        """
        unknown = set(mapping("ThoughtConfig: values", values)) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"ThoughtConfig: unknown field {', '.join(sorted(map(str, unknown)))}")
        return cls(**values)


def read_thought_config(values: dict[str, Any], where: str) -> ThoughtConfig:
    """The config of a file. Raises ValueError, which begins with ``where``, for wrong types, names or ranges."""
    try:
        return ThoughtConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@dataclass
class AdapterConfig:
    """LoRA adapters (arXiv 2106.09685), trained instead of the language model's own weights.

    Raises:
        ValueError: a value out of range, by name.
    """

    lora_rank: int = option(0, "rank of LoRA adapters, trained while the language model is frozen; 0 for none")
    lora_targets: str = option("all-linear", "comma-separated names of the layers that get adapters, such as q_proj,v_proj")
    lora_alpha: float | None = option(None, "the adapters' output is scaled by this over the rank; default twice the rank")
    lora_dropout: float = option(0.0, "dropout before the adapters")

    def __post_init__(self) -> None:
        owner = "AdapterConfig"
        check_types(owner, self)
        check_at_least(owner, self, 0, ("lora_rank",))
        named = all(name.strip() for name in self.lora_targets.split(","))
        check(owner, self, "lora_targets", named, "names separated by commas")
        check(owner, self, "lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "above 0")
        check(owner, self, "lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to below 1")


@dataclass
class TrainConfig:
    """A training run: optimizer, learning rate schedule, how often to evaluate and save, and where to.

    Raises:
        ValueError: a value out of range, by name.
    """

    out: str = option("runs/quietstar", "folder for checkpoints, metrics and the options", may_differ=True)
    steps: int = option(100, "optimizer steps")
    batch_size: int = option(8, "texts per optimizer step, over all processes and accumulation steps")
    accumulation: int = option(1, "parts into which each process splits its texts of a step, to save memory", may_differ=True)
    updates: int = option(1, "optimizer steps on the same texts and thoughts; more than 1 needs ratio_clip")
    anchor_chunk: int | Literal["auto"] | None = option(
        None, "anchors processed at a time, to save memory; auto: as many as fit in free memory", may_differ=True
    )
    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    optimizer: str = option("adamw", "adamw, fused (AdamW in one kernel) or 8bit (moments in 8 bits, by bitsandbytes)")
    warmup: int = option(20, "steps of linear warm-up")
    schedule: str = option("constant", "constant, linear or cosine, after the warm-up")
    weight_decay: float = option(1e-3, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    precision: str = option("no", "mixed precision: no, bf16 or fp16")
    fast_linear: bool = option(
        False, "on AMD processors with AVX-512: products of linear layers by oneDNN, which rounds otherwise", may_differ=True
    )
    sharding: str = option(
        "no", "FSDP2 over the processes: no, full_shard (least memory) or shard_grad_op (less communication)", may_differ=True
    )
    rollout_weights: str = option(
        "sharded",
        "with full_shard, to sample thoughts and to evaluate: gather a layer each time it runs (sharded), or all weights once "
        "(gathered), if they fit",
        may_differ=True,
    )
    seed: int = option(0, "seed of the data order, thoughts and dropout")
    eval_every: int = option(50, "steps between evaluations on held-out text; 0 for none", may_differ=True)
    save_every: int = option(50, "steps between checkpoints; the last step is always saved", may_differ=True)
    keep: int = option(2, "number of checkpoints to keep", may_differ=True)
    tracker: str = option("", "one of Accelerate's trackers: tensorboard, wandb, ...; empty for none", may_differ=True)
    tracker_project: str = option("", "the tracker's project; default: wandb's WANDB_PROJECT or quietstar", may_differ=True)
    tracker_name: str = option("", "the run's name in it; default: wandb's WANDB_NAME or the name of out", may_differ=True)

    def __post_init__(self) -> None:
        owner = "TrainConfig"
        check_anchor_chunk(self.anchor_chunk)
        check_types(owner, self)
        check_at_least(owner, self, 1, ("steps", "batch_size", "accumulation", "updates", "save_every", "keep"))
        check_at_least(owner, self, 0, ("warmup", "eval_every", "weight_decay", "clip"))
        check_positive(owner, self, ("learning_rate",))
        check(owner, self, "seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        check_choice(owner, self, "schedule", ("constant", "linear", "cosine"))
        check_choice(owner, self, "precision", ("no", "bf16", "fp16"))
        check_choice(owner, self, "optimizer", OPTIMIZERS)
        check_choice(owner, self, "sharding", ("no", "full_shard", "shard_grad_op"))
        check_choice(owner, self, "rollout_weights", ("sharded", "gathered"))

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        step = integer("TrainConfig.rate: step", step, 0)
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - progress)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate
