"""The public names of ``quietstar``, by the modules that they come from: the only list of them, which __init__.py reads."""

from quietstar.config import AdapterConfig as AdapterConfig
from quietstar.config import ThoughtConfig as ThoughtConfig
from quietstar.config import TrainConfig as TrainConfig
from quietstar.data.texts import DataConfig as DataConfig
from quietstar.data.texts import load_all as load_all
from quietstar.data.texts import load_data as load_data
from quietstar.data.thoughts import (
    OfflineThoughts as OfflineThoughts,
)
from quietstar.data.thoughts import (
    export_thoughts as export_thoughts,
)
from quietstar.data.thoughts import (
    text_hash as text_hash,
)
from quietstar.data.thoughts import (
    tokenizer_hash as tokenizer_hash,
)
from quietstar.evaluation.difficulty import by_anchor_choice as by_anchor_choice
from quietstar.evaluation.difficulty import by_difficulty as by_difficulty
from quietstar.evaluation.intervals import mean_interval as mean_interval
from quietstar.evaluation.intervals import paired as paired
from quietstar.evaluation.intervals import wilson as wilson
from quietstar.evaluation.losses import (
    TokenLosses as TokenLosses,
)
from quietstar.evaluation.losses import (
    evaluate as evaluate,
)
from quietstar.evaluation.losses import (
    summary as summary,
)
from quietstar.evaluation.losses import (
    token_losses as token_losses,
)
from quietstar.evaluation.losses import (
    with_constant_thoughts as with_constant_thoughts,
)
from quietstar.evaluation.losses import (
    with_own_thoughts as with_own_thoughts,
)
from quietstar.evaluation.losses import (
    with_random_thoughts as with_random_thoughts,
)
from quietstar.evaluation.losses import (
    with_thoughts_of_another as with_thoughts_of_another,
)
from quietstar.evaluation.questions.asking import ask as ask
from quietstar.evaluation.questions.reading import Question as Question
from quietstar.evaluation.questions.reading import read_questions as read_questions
from quietstar.evaluation.questions.report import AccuracyReport as AccuracyReport
from quietstar.evaluation.questions.report import Asking as Asking
from quietstar.evaluation.scoring import score_tokens as score_tokens
from quietstar.explanation.report import Report as Report
from quietstar.explanation.report import explain as explain
from quietstar.group_rl.distillation import shared_divergence as shared_divergence
from quietstar.group_rl.likelihood_reward import LikelihoodReward as LikelihoodReward
from quietstar.group_rl.shared_distillation import SharedDistillation as SharedDistillation
from quietstar.group_rl.shared_logprobs import shared_logprobs as shared_logprobs
from quietstar.group_rl.shared_prompt import SharedPrompts as SharedPrompts
from quietstar.group_rl.tree_packing import register_tree_attention as register_tree_attention
from quietstar.hf.attention import register_attention as register_attention
from quietstar.hf.linear import fast_linear as fast_linear
from quietstar.hf.verify import VerifyReport as VerifyReport
from quietstar.hf.verify import verify as verify
from quietstar.memory.processes import (
    Processes as Processes,
)
from quietstar.memory.processes import (
    count_weights as count_weights,
)
from quietstar.memory.processes import (
    process_memory as process_memory,
)
from quietstar.memory.processes import (
    step_traffic as step_traffic,
)
from quietstar.memory.step import StepMemory as StepMemory
from quietstar.memory.step import step_memory as step_memory
from quietstar.model import QuietStar as QuietStar
from quietstar.objective import Counts as Counts
from quietstar.run.processes import Interrupted as Interrupted
from quietstar.thinking.forward import QuietStarOutput as QuietStarOutput
from quietstar.thinking.forward import Thinker as Thinker
from quietstar.thinking.rollout import Thoughts as Thoughts
from quietstar.trainer import ThoughtTrainer as ThoughtTrainer
from quietstar.trainer import pad_texts as pad_texts
from quietstar.training import thought_loss as thought_loss
from quietstar.training import train as train
from quietstar_kernels import __version__ as __version__

NEEDED: set[str]
