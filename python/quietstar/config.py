"""ThoughtConfig: every number of a Quiet-STaR run that is not the model's."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from quietstar.run.optimizers import OPTIMIZERS

__all__ = ["AdapterConfig", "Dtype", "ThoughtConfig", "TrainConfig"]

Dtype = Literal["float32", "bfloat16", "float16"]  # of a model's weights

PRESETS: dict[str, dict[str, Any]] = {
    "official": {
        "mixing": "logits",
        "reward": "gain",
        "base_weight": 0.5,
        "mix_weight": 0.5,
        "policy_temperature": 3.0,
    },
    "paper": {
        "mixing": "logprobs",
        "reward": "likelihood",
        "base_weight": 0.0,
        "mix_weight": 1.0,
        "policy_temperature": 1.0,
    },
}


def check_anchor_chunk(size: Any) -> None:
    if size not in (None, "auto") and not (isinstance(size, int) and size >= 1):
        raise ValueError(f"anchor_chunk must be 1 or more, 'auto' or None, got {size!r}")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ThoughtConfig:
    """How thoughts are made and learned from. Fields left at None take the preset's value.

    ``official`` is what the published code computes, ``paper`` what arXiv 2403.09629 describes.

    Raises:
        ValueError: a value outside its range, by name.
    """

    thoughts: int = _option(2, "N, thoughts sampled at every anchor")
    thought_tokens: int = _option(9, "T, sampled tokens in a thought")
    lookahead: int = _option(4, "J, next tokens predicted after a thought")
    preset: str = _option("official", "official or paper: fills the fields below that are None")
    mixing: str = _option(None, "what the mixing head mixes: logits, or logprobs with a sigmoid weight")
    reward: str = _option(None, "gain over the base prediction, or likelihood alone")
    base_weight: float = _option(None, "weight of the base model's cross entropy")
    mix_weight: float = _option(None, "weight of the mixed prediction's cross entropy")
    policy_weight: float = _option(1e6, "weight of the REINFORCE term")
    policy_temperature: float = _option(None, "temperature of the thoughts' log-probability in the REINFORCE term")
    advantage: str = _option("relu", "relu, mean, leave_one_out or zscore: reward to advantage, over the N thoughts")
    ratio_clip: float = _option(0.0, "PPO's clip range, for several updates on the same thoughts; 0 is REINFORCE")
    kl_weight: float = _option(0.0, "weight of the thoughts' divergence from the reference's own continuation")
    entropy_weight: float = _option(0.0, "weight of the thoughts' entropy")
    reference: str = _option("current", "language model that reward and divergence compare with: current, frozen or ema")
    reference_decay: float = _option(0.999, "share of itself that an ema reference keeps at each step")
    anchors: str = _option("all", "which positions think in training: all, random, entropy, every or gate")
    anchor_share: float = _option(0.25, "share of them, for random and entropy; where a gate begins")
    anchor_stride: int = _option(4, "k, for every k-th position")
    gate_cost: float = _option(0.0, "what a thinking position must gain for the gate to open, nats")
    start_token_id: int | None = _option(None, "id of a start-of-thought token, where the vocabulary has one")
    end_token_id: int | None = _option(None, "id of an end-of-thought token, where the vocabulary has one")
    stop_threshold: float | None = _option(None, "a thought ends where end_token_id is likelier than this; None is never")
    embedding_scale: float = _option(100.0, "the start and end vectors are this times their parameters")
    embedding_init: int | str | None = _option(None, "token id or text whose embedding start and end begin with")

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"ThoughtConfig: preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("thoughts", "thought_tokens", "lookahead"):
            self._check(name, isinstance(getattr(self, name), int) and 1 <= getattr(self, name) < 65536, "1 to 65,535")
        for name in ("base_weight", "mix_weight", "policy_weight", "kl_weight", "entropy_weight"):
            self._check(name, 0 <= getattr(self, name) < float("inf"), "0 or more")
        for name in ("ratio_clip", "reference_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._check("anchor_share", 0 < self.anchor_share <= 1, "above 0, 1 at most")
        self._check("anchor_stride", isinstance(self.anchor_stride, int) and self.anchor_stride >= 1, "1 or more")
        self._check("gate_cost", float("-inf") < self.gate_cost < float("inf"), "a number")
        for name in ("policy_temperature", "embedding_scale"):
            self._check(name, 0 < getattr(self, name) < float("inf"), "above 0")
        self._check("stop_threshold", self.stop_threshold is None or 0 <= self.stop_threshold < 1, "None, or 0 to below 1")
        if self.stop_threshold is not None and self.end_token_id is None:
            raise ValueError(
                "ThoughtConfig: end_token_id must be given where a thought stops at the end token's probability "
                f"(stop_threshold={self.stop_threshold}), got None"
            )
        self._choice("mixing", ("logits", "logprobs"))
        self._choice("reward", ("gain", "likelihood"))
        self._choice("advantage", ("relu", "mean", "leave_one_out", "zscore"))
        self._choice("reference", ("current", "frozen", "ema"))
        self._choice("anchors", ("all", "random", "entropy", "every", "gate"))
        if self.thoughts == 1 and (self.reward == "likelihood" or self.advantage != "relu"):
            raise ValueError(
                "ThoughtConfig: thoughts must be at least 2 where a reward is compared with the other thoughts' mean "
                f"(reward={self.reward!r}, advantage={self.advantage!r}), got 1"
            )
        if (self.kl_weight or self.entropy_weight) and self.policy_temperature != 1:
            raise ValueError(
                "ThoughtConfig: policy_temperature must be 1, at which thoughts are sampled, "
                f"where kl_weight or entropy_weight is not 0, got {self.policy_temperature}"
            )
        if self.anchors == "gate" and self.reward != "gain":
            raise ValueError(f"ThoughtConfig: reward must be gain where a gate weighs it against a cost, got {self.reward!r}")

    @property
    def rows(self) -> int:
        """S = T + J + 1: start, T sampled tokens, end and J-1 teacher-forced ones."""
        return self.thought_tokens + self.lookahead + 1

    @property
    def policy_terms(self) -> dict[str, float]:
        """Weights of the objective's ``POLICY_TERMS`` that take part."""
        weights = {"divergence": self.kl_weight, "entropy": self.entropy_weight}
        return {"clipped" if self.ratio_clip else "reinforce": 1.0} | {name: x for name, x in weights.items() if x}

    @property
    def banned(self) -> list[int]:
        """Ids that are never sampled."""
        return [token for token in (self.start_token_id, self.end_token_id) if token is not None]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ThoughtConfig:
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"ThoughtConfig: unknown field {', '.join(sorted(unknown))}")
        return cls(**values)

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"ThoughtConfig: {name} must be {wanted}, got {getattr(self, name)!r}")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")


@dataclass
class AdapterConfig:
    """LoRA adapters (arXiv 2106.09685), which are trained instead of the language model's own weights.

    Raises:
        ValueError: a value outside its range, by name.
    """

    lora_rank: int = _option(0, "rank of LoRA adapters, which are trained while the language model is frozen; 0 is none")
    lora_targets: str = _option("all-linear", "names of the layers that get adapters, with commas between, as q_proj,v_proj")
    lora_alpha: float | None = _option(None, "what adapters add is times this by the rank; default twice the rank")
    lora_dropout: float = _option(0.0, "dropout before the adapters")

    def __post_init__(self) -> None:
        if not (isinstance(self.lora_rank, int) and self.lora_rank >= 0):
            raise ValueError(f"AdapterConfig: lora_rank must be 0 or more, got {self.lora_rank!r}")
        if not all(name.strip() for name in self.lora_targets.split(",")):
            raise ValueError(f"AdapterConfig: lora_targets must be names with commas between, got {self.lora_targets!r}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"AdapterConfig: lora_alpha must be above 0, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"AdapterConfig: lora_dropout must be from 0 to below 1, got {self.lora_dropout!r}")


@dataclass
class TrainConfig:
    """One training run: optimizer, schedule, cadence, where its files go.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = _option("runs/quietstar", "folder for checkpoints, metrics and the resolved config")
    steps: int = _option(100, "optimizer steps")
    batch_size: int = _option(8, "texts per optimizer step, over all processes and accumulation steps")
    accumulation: int = _option(1, "parts that a process cuts its texts of a step into, one after the other")
    updates: int = _option(1, "optimizer steps on the same texts and thoughts; more than 1 need ratio_clip")
    anchor_chunk: int | Literal["auto"] | None = _option(None, "anchors at a time, for less memory; auto: by free memory")
    learning_rate: float = _option(1e-6, "peak learning rate of AdamW")
    optimizer: str = _option("adamw", "adamw, fused (in one kernel) or 8bit (moments in 8 bits, by bitsandbytes)")
    warmup: int = _option(20, "steps of linear warm-up")
    schedule: str = _option("constant", "constant, linear or cosine, after the warm-up")
    weight_decay: float = _option(1e-3, "weight decay of AdamW")
    clip: float = _option(1.0, "largest gradient norm; 0 does not clip")
    precision: str = _option("no", "mixed precision: no, bf16 or fp16")
    sharding: str = _option(
        "no", "of weights, gradients and moments over the processes, by FSDP2: no, full_shard (least memory) or shard_grad_op"
    )
    seed: int = _option(0, "fixes data order, thoughts and dropout")
    eval_every: int = _option(50, "steps between evaluations on held-out text; 0 never")
    save_every: int = _option(50, "steps between checkpoints; the last step saves too")
    keep: int = _option(2, "checkpoints kept, the newest ones")
    tracker: str = _option("", "one of Accelerate's trackers: tensorboard, wandb, ...; empty for none")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "updates", "save_every", "keep"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "1 or more")
        check_anchor_chunk(self.anchor_chunk)
        for name in ("warmup", "eval_every", "weight_decay", "clip"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("learning_rate", self.learning_rate > 0, "above 0")
        self._check("schedule", self.schedule in ("constant", "linear", "cosine"), "constant, linear or cosine")
        self._check("precision", self.precision in ("no", "bf16", "fp16"), "no, bf16 or fp16")
        self._check("optimizer", self.optimizer in OPTIMIZERS, "adamw, fused or 8bit")
        strategies = ("no", "full_shard", "shard_grad_op")
        self._check("sharding", self.sharding in strategies, "no, full_shard or shard_grad_op")

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"TrainConfig: {name} must be {wanted}, got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - progress)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate
