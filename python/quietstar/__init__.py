"""Quiet-STaR for any Hugging Face causal language model: wrapper, training, evaluation.

The dimension key of shapes in docstrings and errors is in ``quietstar_kernels``. A name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quietstar.config import AdapterConfig, ThoughtConfig, TrainConfig
    from quietstar.data.texts import DataConfig, load_all, load_data
    from quietstar.data.thoughts import OfflineThoughts, export_thoughts, text_hash, tokenizer_hash
    from quietstar.evaluation.difficulty import by_anchor_choice, by_difficulty
    from quietstar.evaluation.intervals import mean_interval, paired, wilson
    from quietstar.evaluation.losses import (
        TokenLosses,
        evaluate,
        summary,
        token_losses,
        with_constant_thoughts,
        with_own_thoughts,
        with_random_thoughts,
        with_thoughts_of_another,
    )
    from quietstar.evaluation.questions.asking import ask
    from quietstar.evaluation.questions.reading import Question, read_questions
    from quietstar.evaluation.questions.report import AccuracyReport, Asking
    from quietstar.evaluation.scoring import score_tokens
    from quietstar.explanation.report import Report, explain
    from quietstar.hf.attention import register_attention
    from quietstar.hf.linear import fast_linear
    from quietstar.hf.verify import VerifyReport, verify
    from quietstar.likelihood_reward import LikelihoodReward
    from quietstar.memory.processes import Processes, count_weights, process_memory, step_traffic
    from quietstar.memory.step import StepMemory, step_memory
    from quietstar.model import QuietStar
    from quietstar.objective import Counts
    from quietstar.packed import QuietStarOutput, Thinker
    from quietstar.rollout import Thoughts
    from quietstar.run.processes import Interrupted
    from quietstar.sequences import shared_logprobs
    from quietstar.shared_prompt import SharedPrompts
    from quietstar.trainer import ThoughtTrainer, pad_texts
    from quietstar.training import thought_loss, train

# The names of each module.
_NAMES = {
    "config": "AdapterConfig ThoughtConfig TrainConfig",
    "data.texts": "DataConfig load_all load_data",
    "data.thoughts": "OfflineThoughts export_thoughts text_hash tokenizer_hash",
    "evaluation.difficulty": "by_anchor_choice by_difficulty",
    "evaluation.intervals": "mean_interval paired wilson",
    "evaluation.losses": "TokenLosses evaluate summary token_losses with_constant_thoughts with_own_thoughts "
    "with_random_thoughts with_thoughts_of_another",
    "evaluation.questions.asking": "ask",
    "evaluation.questions.reading": "Question read_questions",
    "evaluation.questions.report": "AccuracyReport Asking",
    "evaluation.scoring": "score_tokens",
    "explanation.report": "Report explain",
    "hf.attention": "register_attention",
    "hf.linear": "fast_linear",
    "hf.verify": "VerifyReport verify",
    "likelihood_reward": "LikelihoodReward",
    "memory.processes": "Processes count_weights process_memory step_traffic",
    "memory.step": "StepMemory step_memory",
    "model": "QuietStar",
    "objective": "Counts",
    "packed": "QuietStarOutput Thinker",
    "rollout": "Thoughts",
    "run.processes": "Interrupted",
    "sequences": "shared_logprobs",
    "shared_prompt": "SharedPrompts",
    "trainer": "ThoughtTrainer pad_texts",
    "training": "thought_loss train",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

# What the train extra installs, by the names of modules; kernels alone do without.
NEEDED = {"transformers", "tokenizers", "accelerate", "safetensors", "tqdm", "numpy", "tyro", "yaml", "msgspec", "psutil"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'quietstar' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"quietstar.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        text = f"quietstar.{name} needs {error.name}, of the train extra: pip install -e '.[train]' in a checkout"
        raise ModuleNotFoundError(text, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "AccuracyReport",
    "AdapterConfig",
    "Asking",
    "Counts",
    "DataConfig",
    "Interrupted",
    "LikelihoodReward",
    "OfflineThoughts",
    "Processes",
    "Question",
    "QuietStar",
    "QuietStarOutput",
    "Report",
    "SharedPrompts",
    "StepMemory",
    "Thinker",
    "ThoughtConfig",
    "ThoughtTrainer",
    "Thoughts",
    "TokenLosses",
    "TrainConfig",
    "VerifyReport",
    "ask",
    "by_anchor_choice",
    "by_difficulty",
    "count_weights",
    "evaluate",
    "explain",
    "export_thoughts",
    "fast_linear",
    "load_all",
    "load_data",
    "mean_interval",
    "pad_texts",
    "paired",
    "process_memory",
    "read_questions",
    "register_attention",
    "score_tokens",
    "shared_logprobs",
    "step_memory",
    "step_traffic",
    "summary",
    "text_hash",
    "thought_loss",
    "token_losses",
    "tokenizer_hash",
    "train",
    "verify",
    "wilson",
    "with_constant_thoughts",
    "with_own_thoughts",
    "with_random_thoughts",
    "with_thoughts_of_another",
]
