"""The settings of natural_text.py: model, data, arms and lengths; each is an option of the command."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from quietstar import ThoughtConfig
from quietstar.config import MAY_DIFFER, TrainConfig

Arm = Literal["plain", "official", "paper", "small", "no-reinforce"]

# What the arms train with. The plain one has the text's own loss alone; its single thought a text is not trained.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"thoughts": 1, "thought_tokens": 1, "anchors": "every", "base_weight": 1, "mix_weight": 0, "policy_weight": 0},
    "official": {"preset": "official"},
    "paper": {"preset": "paper"},
    "small": {"preset": "small"},
    "no-reinforce": {"preset": "official", "policy_weight": 0},
}


@dataclass(frozen=True)
class Experiment:
    """Model, data, arms and lengths. Warm-up, schedule and weight decay are those of ``quietstar train``.

    Raises:
        ValueError: a number of 0 or less, or an arm twice.
    """

    out: Annotated[str, arg(help="folder of the experiment")] = field(default="runs/natural-text", metadata=MAY_DIFFER)
    model: Annotated[str, arg(help="hub name or folder, such as Qwen/Qwen3-1.7B-Base")] = "Qwen/Qwen3-0.6B-Base"
    data: Annotated[str, arg(help="text to train on: a data set on the hub, a .jsonl or a .txt file")] = (
        "open-web-math/open-web-math"
    )
    texts: Annotated[int, arg(help="texts to read from the start of a data set on the hub")] = 10_000
    held_out: Annotated[int, arg(help="texts that are held out, at most a tenth of all")] = 512
    length: Annotated[int, arg(help="L, tokens of a text")] = 256
    arms: Annotated[tuple[Arm, ...], arg(help="ways to train; plain is without thoughts")] = field(
        default=("plain", "official"), metadata=MAY_DIFFER
    )
    seeds: Annotated[int, arg(help="how often each arm is trained")] = field(default=3, metadata=MAY_DIFFER)
    thoughts: Annotated[int, arg(help="N, thoughts sampled at every position")] = ThoughtConfig.thoughts
    thought_tokens: Annotated[int, arg(help="T, tokens in a thought")] = ThoughtConfig.thought_tokens
    lookahead: Annotated[int, arg(help="J, next tokens predicted after a thought")] = ThoughtConfig.lookahead
    steps: Annotated[int, arg(help="optimizer steps")] = 1000
    batch_size: Annotated[int, arg(help="texts per step, over all GPUs")] = 8
    learning_rate: Annotated[float, arg(help="of all arms; 1e-3 with the arm small")] = TrainConfig.learning_rate
    accumulation: Annotated[int, arg(help="parts of a step, to save memory")] = field(default=1, metadata=MAY_DIFFER)
    checkpointing: Annotated[bool, arg(help="recompute activations, to save memory")] = field(default=True, metadata=MAY_DIFFER)
    save_every: Annotated[int, arg(help="steps between checkpoints")] = field(default=100, metadata=MAY_DIFFER)
    precision: Annotated[Literal["no", "bf16"], arg(help="of training; weights and evaluation are in fp32")] = "bf16"
    gpus: Annotated[int, arg(help="GPUs to train on; evaluation uses one")] = field(default=1, metadata=MAY_DIFFER)
    gsm8k: Annotated[str, arg(help="questions: a data set on the hub or a .jsonl file")] = "openai/gsm8k:main"
    commonsense_qa: Annotated[str, arg(help="the same, of its split validation")] = "tau/commonsense_qa"
    questions: Annotated[int, arg(help="how many of each to ask, from the start")] = 10_000
    gsm8k_tokens: Annotated[int, arg(help="most tokens of an answer")] = 256
    commonsense_qa_tokens: Annotated[int, arg(help="most tokens of an answer")] = 16
    block: Annotated[int, arg(help="questions whose answers are saved together")] = 128
    eval_batch: Annotated[int, arg(help="texts or questions evaluated at a time")] = 32

    def __post_init__(self) -> None:
        for number in fields(self):
            value = getattr(self, number.name)
            if type(value) in (int, float) and value <= 0:
                raise ValueError(f"Experiment: {number.name} must be above 0, got {value}")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"Experiment: arms must be different, got {', '.join(self.arms)}")
        for arm in self.arms:
            self.thought_config(arm)

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def texts_file(self) -> Path:
        """The texts as they were read at first, so that a data set that changes changes nothing."""
        return self.folder / "texts.jsonl"

    def thought_config(self, arm: str) -> ThoughtConfig:
        own = {"thoughts": self.thoughts, "thought_tokens": self.thought_tokens, "lookahead": self.lookahead}
        return ThoughtConfig(**{**own, "anchor_stride": self.length, **ARMS[arm]})

    def training(self, arm: str, seed: int, out: Path) -> dict[str, Any]:
        """The options of ``quietstar train`` for one arm, by name."""
        shared = ("model", "held_out", "length", "steps", "batch_size", "accumulation", "learning_rate")
        shared += ("save_every", "precision")
        return {name: getattr(self, name) for name in shared} | {
            **self.thought_config(arm).to_dict(),
            "data": str(self.texts_file),
            "gradient_checkpointing": self.checkpointing,
            "eval_every": max(1, self.steps // 4),
            "keep": 1,
            "seed": seed,
            "out": str(out),
        }
